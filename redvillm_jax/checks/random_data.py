"""Makes random streams, questions and weights, the same in every process."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from data_pipeline.packing import Question, plan_epoch
from redvillm_jax.model.base_folder import Base, TensorFolder, sized_base
from redvillm_jax.model.weights import random_parts, tensors_of
from redvillm_jax.training.rows import RowPlan, digest, lay_out, make_prefix

ROW_LENGTH = 120
QUESTIONS_PER_VIDEO = 3
TOKENS = 256  # token ids are smaller


class RandomStreams:
    """Replaces a `data_pipeline.store.VideoStore`: any number of videos, each with `num_frames` frames.

    shapes: (M, D) by stream.
    """

    def __init__(self, num_frames: int, shapes: Mapping[str, tuple[int, int]]):
        self.num_frames, self.shapes = num_frames, shapes

    def padded(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns num_frames (n,) int32 and the streams (n, M, D) float32 by name; zeros for index -1."""
        out = {"num_frames": np.array([self.num_frames * (index >= 0) for index in indices], np.int32)}
        for name, shape in self.shapes.items():
            noise = [np.random.default_rng(max(i, 0)).standard_normal(shape, np.float32) * (i >= 0) for i in indices]
            out[name] = np.stack(noise)
        return out


def plan_random_rows(slots: Sequence[int], *, batch_questions: int, num_steps: int) -> RowPlan:
    """Plans packed rows of random questions about videos. slots: of a video's visual tokens, in token order."""
    rng = np.random.default_rng(0)
    count = batch_questions * num_steps
    question_videos = np.arange(count) // QUESTIONS_PER_VIDEO
    prefix = make_prefix([(1, False), (2, False)], [(0, slot) for slot in slots])
    questions = [
        Question(rng.integers(3, TOKENS, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in rng.integers(4, 12, count)
    ]
    prefixes = [prefix] * (int(question_videos[-1]) + 1)
    steps = plan_epoch(
        question_videos,
        [len(p.ids) for p in prefixes],
        [len(q.ids) for q in questions],
        row_length=max(ROW_LENGTH, len(prefix.ids) + 12),
        batch_questions=batch_questions,
        pack=True,
        seed=0,
        epoch=0,
    )
    fingerprint = digest((steps, [q.ids.tolist() for q in questions]))
    return lay_out(steps, prefixes, questions, [], len(slots), lambda _: fingerprint)


def random_base(family: str, folder: Path) -> Base:
    """Writes a tiny base with random weights to `folder`, one folder per process, and opens it."""
    base = sized_base(family, "tiny")
    tensors = tensors_of(base.module, base.config, random_parts(base.module, base.config))
    save_file(tensors, folder / "model.safetensors")
    published = dict(zip(tensors, tensors, strict=True))
    return dataclasses.replace(
        base, path=folder, fingerprint="random", tensors=TensorFolder(folder), published=published
    )
