"""Estimates the rows of a train step without data, from the lengths of the paper's instruction set."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from data_pipeline.packing import Prefix, Question, fill_row, plan_epoch, row_bounds
from redvillm_jax.training.rows import pad_row

QUESTIONS, VIDEOS = 100_000, 13_303  # VideoInstruct-100K; docs/train_video_ids.txt of mbzuai-oryx/Video-ChatGPT
SAMPLE = 20_000  # number of questions in the planned epoch
TEXT_TOKENS, ANSWER_TOKENS = 90, 65  # averages: a question with its answer; its supervised part
TEMPLATE_TOKENS = 45  # before the video: LLaVA's system prompt; Qwen's is shorter
LONGEST_TEXT = 600


@dataclasses.dataclass(frozen=True)
class Workload:
    """The rows of a train step: static sizes, and average contents.

    rows: static rows per step, empty ones included. row_length: slots per row. groups, targets: static sizes per row.
    tokens, supervised: average numbers of real and of supervised tokens per step. questions: per step. steps: per
    epoch.
    """

    questions: int
    rows: int
    row_length: int
    groups: int
    targets: int
    tokens: float
    supervised: float
    steps: int


def paper_lengths(video_tokens: int, seed: int = 0) -> tuple[np.ndarray, list[Prefix], list[Question]]:
    """Makes videos and questions in VideoInstruct's proportions: 7.5 questions per video, ~90 text tokens per question.

    Returns (video of each question, prefix of each video, questions); token ids are zeros. Lengths are log-normal;
    their spread is a guess.
    """
    rng = np.random.default_rng(seed)
    videos = round(SAMPLE * VIDEOS / QUESTIONS)
    question_videos = rng.integers(0, videos, SAMPLE)
    lengths = np.clip(rng.lognormal(np.log(TEXT_TOKENS) - 0.5**2 / 2, 0.5, SAMPLE), 12, LONGEST_TEXT).astype(int)
    prefix_length = TEMPLATE_TOKENS + video_tokens
    shown = np.r_[np.full(TEMPLATE_TOKENS, -1), np.arange(video_tokens)].astype(np.int32)
    prefix = Prefix(np.zeros(prefix_length, np.int32), shown, np.zeros(prefix_length, bool))
    questions = []
    for length in lengths:
        supervised = np.arange(length) >= length - max(1, round(length * ANSWER_TOKENS / TEXT_TOKENS))
        questions.append(Question(np.zeros(length, np.int32), supervised))
    return question_videos, [prefix] * videos, questions


def measure(
    question_videos: np.ndarray,
    prefixes: Sequence[Prefix],
    questions: Sequence[Question],
    *,
    row_length: int,
    batch_questions: int,
    pack: bool,
    shards: int,
    total_questions: int,
) -> Workload:
    """Plans an epoch and describes its steps. shards: parts of a batch; the number of rows is a multiple of them."""
    lengths = np.array([len(q.ids) for q in questions])
    prefix_lengths = np.array([len(p.ids) for p in prefixes])
    longest = int((prefix_lengths[question_videos] + lengths).max())
    steps = plan_epoch(
        question_videos,
        prefix_lengths,
        lengths,
        row_length=max(row_length, longest) if pack else longest,
        batch_questions=batch_questions,
        pack=pack,
        seed=0,
        epoch=0,
    )
    bounds = row_bounds(steps, prefixes, questions)
    groups = [group for row in itertools.chain(*steps) for group in row]
    scale = batch_questions / len(questions)
    return Workload(
        questions=batch_questions,
        rows=-(-bounds.rows_per_step // shards) * shards,
        row_length=pad_row(bounds.slots_per_row),
        groups=bounds.groups_per_row,
        targets=bounds.targets_per_row,
        tokens=scale * float(sum(prefix_lengths[video] for video, _ in groups) + lengths.sum()),
        supervised=scale * float(sum(q.supervised.sum() for q in questions)),
        steps=-(-total_questions // batch_questions),
    )


def fill_rows(
    question_videos: np.ndarray,
    prefixes: Sequence[Prefix],
    questions: Sequence[Question],
    *,
    row_length: int,
    pack: bool,
    rows: int,
    total_questions: int,
) -> Workload:
    """Returns the workload with the largest number of questions per step that always fits `rows` rows."""

    def at(batch_questions: int) -> Workload:
        return measure(
            question_videos,
            prefixes,
            questions,
            row_length=row_length,
            batch_questions=batch_questions,
            pack=pack,
            shards=1,
            total_questions=total_questions,
        )

    few = 1
    many = min(len(questions) // 4, 16 * rows)  # more groups cannot fit
    while many - few > max(1, few // 50):
        middle = (few + many) // 2
        few, many = (middle, many) if at(middle).rows <= rows else (few, middle)
    return dataclasses.replace(at(few), rows=rows)


def empty_row(workload: Workload, video_tokens: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one empty row, in the shapes that a step takes."""
    return fill_row(
        (),
        [],
        [],
        row_length=workload.row_length,
        max_groups=workload.groups,
        max_targets=workload.targets,
        tokens_per_video=video_tokens,
    )
