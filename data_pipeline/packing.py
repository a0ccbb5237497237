"""Rows of the training batch: video prefixes, each with its questions.

The rows are a function of (seed, epoch). docs/glossary.md has the words row, group, prefix, slot and step.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError

Group = tuple[int, tuple[int, ...]]  # a video and the questions behind its prefix
Row = tuple[Group, ...]
Step = tuple[Row, ...]


LONG_EPOCH = 100  # an epoch of at least so many steps may end in two short steps


@dataclass(frozen=True)
class Prefix:
    """The tokens before the questions of one video.

    ids: (P,) int32. video_tokens: (P,) int32, the index of the video's token in this slot, -1 for text. supervised:
    (P,) bool; no token predicts the first one, so it never counts.
    """

    ids: np.ndarray
    video_tokens: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True)
class Question:
    """The tokens of a question and its answer, which follow the prefix. ids: (L,) int32. supervised: (L,) bool."""

    ids: np.ndarray
    supervised: np.ndarray


class RowBounds(NamedTuple):
    """The maxima over a plan, which are the static shapes of its batches."""

    rows_per_step: int
    groups_per_row: int
    targets_per_row: int
    slots_per_row: int


def plan_epoch(
    question_videos: Sequence[int] | np.ndarray,
    prefix_lengths: Sequence[int] | np.ndarray,
    question_lengths: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    batch_questions: int,
    pack: bool,
    seed: int,
    epoch: int,
) -> list[Step]:
    """Distributes every question once over steps of exactly `batch_questions` questions (the last step: the rest).

    question_videos: (Q,) the video of each question. prefix_lengths: (videos,). question_lengths: (Q,).
    Without `pack` a row is one question. With `pack` the questions of a video share one prefix, as many as fit a row.
    These groups are shuffled, cut when a step is full, and placed into the step's rows. Every step is computed at the
    size of the largest step, so no step takes more rows than it must: a group that would open one more row waits for
    the next step, and a later group takes its place. A long epoch may end in two short steps when one would be too
    large. Raises UserError for a question that fits no row.
    """
    question_videos, question_lengths = np.asarray(question_videos), np.asarray(question_lengths)
    prefix_lengths = np.asarray(prefix_lengths)
    needed = prefix_lengths[question_videos] + question_lengths
    if len(needed) and needed.max() > row_length:
        worst = int(needed.argmax())
        raise UserError(
            f"question {worst} (counted from 0) takes {needed[worst]} tokens with its video, rows hold "
            f"{row_length}: raise row_length, or drop the {int((needed > row_length).sum())} question(s) that long"
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = rng.permutation(len(question_videos))
    if not pack:
        rows = [((int(question_videos[question]), (question,)),) for question in order.tolist()]
        return [tuple(rows[i : i + batch_questions]) for i in range(0, len(rows), batch_questions)]
    videos, prefixes, lengths = (a.tolist() for a in (question_videos, prefix_lengths, question_lengths))
    groups = _group(order.tolist(), videos, prefixes, lengths, row_length)
    groups = [groups[i] for i in rng.permutation(len(groups))]
    sizes = [prefixes[video] + sum(lengths[q] for q in questions) for video, questions in groups]
    share = min(batch_questions / max(len(order), 1), 1)
    fewest = max(1, math.ceil(share * sum(sizes) / row_length))
    plans = (_steps(groups, prefixes, lengths, row_length, batch_questions, n) for n in range(fewest, len(order) + 1))
    return next(filter(None, plans), [])


def _group(order: list[int], videos, prefixes, lengths, row_length: int) -> list[Group]:
    """Collects the questions of each video, in the order given, into groups that fit a row."""
    members: list[list[int]] = []
    open_group: dict[int, tuple[int, int]] = {}  # video -> its last group and the slots left behind it
    for question in order:
        video, length = videos[question], lengths[question]
        group, room = open_group.get(video, (-1, -1))
        if length > room:
            group, room = len(members), row_length - prefixes[video]
            members.append([])
        members[group].append(question)
        open_group[video] = group, room - length
    return [(videos[questions[0]], tuple(questions)) for questions in members]


def _steps(
    groups: Iterable[Group], prefixes, lengths, row_length: int, batch_questions: int, max_rows: int
) -> list[Step] | None:
    """Steps of `batch_questions` questions in at most `max_rows` rows, or None when that is impossible.

    The groups keep their order, except those that wait for a later step.
    """
    steps, waiting, short = [], deque(groups), 0
    while waiting:
        step, late, room = StepRows(prefixes, lengths, row_length, max_rows), [], batch_questions
        while waiting and room:
            video, questions = waiting.popleft()
            group, rest = (video, questions[:room]), questions[room:]
            if not step.place(group):
                row, held = step.poorest()
                if held < len(questions):  # give its row to the group with more questions
                    late += step.empty(row)
                    room += held
                    waiting.appendleft((video, questions))
                else:
                    late.append((video, questions))
                if len(late) > 8 * batch_questions:  # it does not pay to look further
                    return None
                continue
            room -= len(group[1])
            if rest:
                waiting.appendleft((video, rest))
        short += room > 0
        if short > 1 + (len(steps) >= LONG_EPOCH):
            return None
        waiting.extendleft(reversed(late))
        steps.append(tuple(map(tuple, step.rows)))
    return steps


class StepRows:
    """The rows of one step while they are filled; a group goes into the fullest row that has room for it."""

    def __init__(self, prefixes, lengths, row_length: int, max_rows: int):
        self.prefixes, self.lengths, self.row_length, self.max_rows = prefixes, lengths, row_length, max_rows
        self.rows: list[list[Group]] = []
        self.rooms: list[int] = []

    def place(self, group: Group) -> bool:
        """Adds a group to a row. Returns False when no row has room for it."""
        video, questions = group
        size = self.prefixes[video] + sum(self.lengths[q] for q in questions)
        row = min((i for i, room in enumerate(self.rooms) if room >= size), key=self.rooms.__getitem__, default=None)
        if row is None and len(self.rows) < self.max_rows:
            row = len(self.rows)
            self.rows.append([])
            self.rooms.append(self.row_length)
        if row is None:
            return False
        self.rows[row].append(group)
        self.rooms[row] -= size
        return True

    def poorest(self) -> tuple[int, int]:
        """The index of the row with the fewest questions, and their number."""
        held = [sum(len(questions) for _, questions in row) for row in self.rows]
        return held.index(min(held)), min(held)

    def empty(self, row: int) -> list[Group]:
        """Removes a row's groups and returns them."""
        self.rooms[row] = self.row_length
        groups, self.rows[row] = self.rows[row], []
        return groups


def row_bounds(
    steps: Iterable[Step], prefixes: Sequence[Prefix] | Mapping[int, Prefix], questions: Sequence[Question]
) -> RowBounds:
    """Returns the maxima over all rows of `steps`, usually the plans of all epochs together.

    prefixes: by video. questions: by index.
    """
    lengths = [len(question.ids) for question in questions]
    targets = [int(question.supervised.sum()) for question in questions]
    bounds = (0, 0, 0, 0)
    for step in steps:
        for row in step:
            heads = [prefixes[video] for video, _ in row]
            members = [question for _, group in row for question in group]
            sizes = (
                len(step),
                len(row),
                sum(int(p.supervised[1:].sum()) for p in heads) + sum(targets[q] for q in members),
                sum(len(p.ids) for p in heads) + sum(lengths[q] for q in members),
            )
            bounds = tuple(map(max, bounds, sizes))
    return RowBounds(*bounds)


def fill_row(
    row: Row,
    prefixes: Sequence[Prefix] | Mapping[int, Prefix],
    questions: Sequence[Question],
    *,
    row_length: int,
    max_groups: int,
    max_targets: int,
    tokens_per_video: int,
) -> dict[str, np.ndarray]:
    """Lays a row out in arrays of static shape; the empty row () is the padding row.

    Over the S = row_length slots, all (S,) int32:
      token_ids        0 in padding.
      position_ids     restart with every group; each question continues right after its prefix.
      group_ids        1, 2, … in the row's order, 0 = padding.
      question_ids     1, 2, … within the row, 0 = prefix (or padding).
      video_tokens     -1 = text, else (group's index from 0) * tokens_per_video + the token's index.
    Over the supervised tokens, all (max_targets,):
      target_slots     int32, the slot whose hidden state predicts the token.
      target_ids       int32, the token.
      target_weights   float32, 1; in a prefix the number of its questions; 0 = padding.
      target_questions int32, the question's index, -1 in a prefix and in padding.
    videos             (max_groups,) int32, -1 = none.

    A token may attend to an earlier one of its own group that is in the prefix or in its own question.
    """
    out = {
        "token_ids": np.zeros(row_length, np.int32),
        "position_ids": np.zeros(row_length, np.int32),
        "group_ids": np.zeros(row_length, np.int32),
        "question_ids": np.zeros(row_length, np.int32),
        "video_tokens": np.full(row_length, -1, np.int32),
        "target_slots": np.zeros(max_targets, np.int32),
        "target_ids": np.zeros(max_targets, np.int32),
        "target_weights": np.zeros(max_targets, np.float32),
        "target_questions": np.full(max_targets, -1, np.int32),
        "videos": np.full(max_groups, -1, np.int32),
    }
    slots = targets = number = 0  # used so far

    def place(ids: np.ndarray, position: int, group: int, question: int) -> slice:
        nonlocal slots
        span = slice(slots, slots + len(ids))
        out["token_ids"][span] = ids
        out["position_ids"][span] = np.arange(position, position + len(ids))
        out["group_ids"][span] = group
        out["question_ids"][span] = question
        slots += len(ids)
        return span

    def supervise(at: np.ndarray, ids: np.ndarray, weight: int, question: int) -> None:
        nonlocal targets
        span = slice(targets, targets + len(ids))
        out["target_slots"][span] = at
        out["target_ids"][span] = ids
        out["target_weights"][span] = weight
        out["target_questions"][span] = question
        targets += len(ids)

    for index, (video, members) in enumerate(row):
        out["videos"][index] = video
        prefix = prefixes[video]
        span = place(prefix.ids, 0, index + 1, 0)
        static = index * tokens_per_video + prefix.video_tokens
        out["video_tokens"][span] = np.where(prefix.video_tokens < 0, -1, static)
        before = np.flatnonzero(prefix.supervised[1:])
        supervise(span.start + before, prefix.ids[before + 1], len(members), -1)
        last = span.stop - 1  # predicts the first token of each question
        for member in members:
            number += 1
            question = questions[member]
            span = place(question.ids, len(prefix.ids), index + 1, number)
            where = np.flatnonzero(question.supervised)
            at = np.where(where == 0, last, span.start + where - 1)
            supervise(at, question.ids[where], 1, member)
    if slots > row_length or targets > max_targets:
        raise ValueError(f"a row of {slots} slots, {targets} targets in {row_length}, {max_targets}")
    return out
