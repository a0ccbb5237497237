"""The rows of a step when no data is at hand, with the lengths of the paper's instruction set."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from data_pipeline.packing import Prefix, Question, fill_row, plan_epoch, row_bounds
from redvillm_jax.training.rows import pad_row

QUESTIONS, VIDEOS = 100_000, 13_303  # VideoInstruct-100K; docs/train_video_ids.txt of mbzuai-oryx/Video-ChatGPT
SAMPLE = 20_000  # questions that are planned to know the rows of a step
TEXT_TOKENS, ANSWER_TOKENS = 90, 65  # of a question with its answer, on average; the answer's part is supervised
TEMPLATE_TOKENS = 45  # before the video: LLaVA's system prompt; Qwen's is shorter
LONGEST_TEXT = 600


@dataclasses.dataclass(frozen=True)
class Workload:
    """The rows of a train step, on average and at most.

    rows: static rows per step, with those that stay empty; row_length: slots. groups, targets: static sizes of a row.
    tokens, supervised: real ones per step; questions: per step. steps: of one epoch.
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
    """Videos, prefixes and questions with VideoInstruct's proportions: 7.5 questions a video, ~90 tokens of text each.

    Returns (question_videos, prefix by video, questions); ids are zeros. Lengths are log-normal, their spread a guess.
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
    """Plans an epoch and describes its steps; rows are rounded up to the `shards` that a batch is split into."""
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
    """The workload with as many questions per step as always fit `rows` rows."""

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
    many = min(len(questions) // 4, 16 * rows)  # as many groups as could ever fit
    while many - few > max(1, few // 50):
        middle = (few + many) // 2
        few, many = (middle, many) if at(middle).rows <= rows else (few, middle)
    return dataclasses.replace(at(few), rows=rows)


def empty_row(workload: Workload, video_tokens: int) -> dict[str, np.ndarray]:
    """The arrays of one row, in the shapes that a step takes."""
    return fill_row(
        (),
        [],
        [],
        row_length=workload.row_length,
        max_groups=workload.groups,
        max_targets=workload.targets,
        tokens_per_video=video_tokens,
    )
