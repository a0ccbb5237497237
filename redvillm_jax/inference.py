"""Answers to the questions of a store: every video is encoded once, questions are decoded in batches."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from data_pipeline.store import VideoStore
from redvillm_jax.generate import greedy
from redvillm_jax.model import VideoLLM
from redvillm_jax.sharding import num_batch_shards, to_global
from redvillm_jax.weights import Base


def answer(
    model: VideoLLM,
    base: Base,
    store: VideoStore,
    slots: Callable[[int], list[int]],
    mesh: jax.sharding.Mesh,
    *,
    dtype: jnp.dtype,
    batch_size: int,
    video_batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to the store's instructions, in their order.

    slots(num_frames): the token slots of a video. `video_batch_size` videos are encoded and `batch_size` questions
    decoded at once.
    """
    tokenizer = base.module.Tokenizer(base.path)
    graphdef, weights = nnx.split(model)
    shards = num_batch_shards(mesh)
    batch_size, video_batch_size = (-(-size // shards) * shards for size in (batch_size, video_batch_size))

    @jax.jit
    def encode(weights, videos):
        return nnx.merge(graphdef, weights).video_tokens(videos, dtype)

    @jax.jit
    def decode(weights, tokens, videos, prompts):
        model = nnx.merge(graphdef, weights)
        return greedy(model, tokens[videos], prompts, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)

    prompts = make_prompts(base, tokenizer, store, slots)
    width = max(len(ids) for ids, _ in prompts)
    index = {video["video"]: i for i, video in enumerate(store.videos)}
    questions_of = defaultdict(list)
    for question, row in enumerate(store.instructions):
        questions_of[index[row["video"]]].append(question)

    answers = [""] * len(prompts)
    videos = sorted(questions_of)
    progress = tqdm(total=len(prompts), unit="question", disable=None, dynamic_ncols=True)
    for start in range(0, len(videos), video_batch_size):
        chunk = videos[start : start + video_batch_size]
        filled = [*chunk, *[-1] * (video_batch_size - len(chunk))]
        tokens = encode(weights, to_global(store.padded(filled), mesh))
        asked = [(row, question) for row, video in enumerate(chunk) for question in questions_of[video]]
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            rows = np.zeros(batch_size, np.int32)
            rows[: len(part)] = [row for row, _ in part]
            padded = pad_prompts([prompts[question] for _, question in part], batch_size, width)
            ids = decode(weights, tokens, rows, to_global(padded, mesh))
            for (_, question), row in zip(part, np.asarray(ids).tolist(), strict=False):
                end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
                answers[question] = tokenizer.decode(row[:end]).strip()
            progress.update(len(part))
    progress.close()
    return answers


def make_prompts(
    base: Base, tokenizer: Any, store: VideoStore, slots: Callable[[int], list[int]]
) -> list[tuple[list[int], list[int]]]:
    """Per instruction (token ids, video slots) up to where the answer begins; -1 in video slots is text."""
    num_frames = {video["video"]: video["num_frames"] for video in store.videos}
    prompts = []
    for row in store.instructions:
        parts = base.module.prompt(tokenizer, base.config, row["question"], None)
        before, after = ([token for token, _ in part] for part in parts)
        visual = slots(num_frames[row["video"]])
        ids = [*before, *[0] * len(visual), *after]
        prompts.append((ids, [-1] * len(before) + visual + [-1] * len(after)))
    return prompts


def pad_prompts(prompts: Sequence[tuple[list[int], list[int]]], rows: int, width: int) -> dict[str, np.ndarray]:
    """Prompts as arrays for `generate.greedy`; rows that are missing become one-token prompts."""
    ids, slots = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
    length = np.ones(rows, np.int32)
    for i, (tokens, video_slots) in enumerate(prompts):
        ids[i, : len(tokens)], slots[i, : len(tokens)], length[i] = tokens, video_slots, len(tokens)
    return {"token_ids": ids, "video_slots": slots, "length": length}
