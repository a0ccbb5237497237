"""Decoding with a key-value cache, in static shapes.

The cache of an answer has three ranges of slots: [prompt up to the end of the video | question | answer]. `prefill`
computes the first range once for each video, `lay_out` and `place` copy it to the video's questions, `start` reads the
questions and chooses the first tokens, and `decode` chooses the following tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from redvillm_jax.inference.sampler import Sampling, choose
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.modules.attention import window_masks
from redvillm_jax.modules.layers import BATCH_AXES, pin_batch

Cache = tuple[jax.Array, jax.Array]  # keys and values, (num_layers, R, heads, head_dim, slots) each


class Decoding(NamedTuple):
    """The state of R answers while they are written, with at most N tokens.

    prompt: (R, slots) bool, the slots that prompts fill; positions: (R, slots) int32, of each slot; length: (R,) int32,
    of the prompts; seen: (R, vocab_size) bool; keys: (R,) PRNG keys; ids: (R, N) int32; current: (R,) int32, the last
    ids, which are not in the cache yet; finite: (R,) bool, whether all logits were finite; step: (), how many ids are
    chosen.
    """

    cache: Cache
    prompt: jax.Array
    positions: jax.Array
    length: jax.Array
    seen: jax.Array
    keys: jax.Array
    ids: jax.Array
    current: jax.Array
    finite: jax.Array
    step: jax.Array


def prefill(model: VideoLLM, tokens: jax.Array, prefixes: Mapping[str, jax.Array]) -> Cache:
    """Keys and values of each prompt up to the end of its video.

    tokens: visual tokens (B, V, K); prefixes: token_ids, video_slots: (B, P) int32, padded on the right, -1 in
    video_slots for text; length: (B,) int32; context_length: (B,) int32, of the whole prompts (see the bases' `LLM`);
    optionally sources, weights: (B, P, 4) int32 and fp32, of visual tokens that are sums of others
    (`picture_places.Places`).
    """
    if "sources" in prefixes:
        tokens = weighted(tokens, prefixes["sources"], prefixes["weights"])
    embeds = model.embed(prefixes["token_ids"], prefixes["video_slots"], tokens)
    rows, width = embeds.shape[:2]
    slots = jnp.broadcast_to(jnp.arange(width), (rows, width))
    real = (slots < prefixes["length"][:, None]).astype(jnp.int32)
    cache = model.llm.init_cache(rows, width, embeds.dtype)
    masks = model.masks(real, jnp.zeros_like(real), slots, prefixes["video_slots"])
    return model.llm(embeds, slots, masks, cache=cache, context_length=prefixes["context_length"])[1]


def weighted(tokens: jax.Array, sources: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns weighted sums (B, P, K) of tokens (B, V, K), in fp32 and rounded. sources, weights: (B, P, n)."""
    total = jnp.zeros((*sources.shape[:2], tokens.shape[-1]), jnp.float32)
    for i in range(sources.shape[-1]):
        total += weights[..., i, None] * jnp.take_along_axis(tokens, sources[..., i, None], axis=1)
    return total.astype(tokens.dtype)


def lay_out(prefixes: Cache, videos: jax.Array, num_slots: int) -> Cache:
    """Rows of `num_slots` that begin with prefixes, B of them; videos: (R,) int32, -1 for rows that `place` fills."""
    room = ((0, 0),) * 4 + ((0, num_slots - prefixes[0].shape[-1]),)
    return jax.tree.map(lambda x: split_rows(jnp.pad(split_rows(x[:, videos]), room)), prefixes)


def place(cache: Cache, prefixes: Cache, videos: jax.Array) -> Cache:
    """Lays more prefixes into the first slots of the rows; videos: (R,) int32, -1 leaves a row as it is."""

    def lay(rows: jax.Array, prefixes: jax.Array) -> jax.Array:
        chosen = jnp.where((videos >= 0)[:, None, None, None], prefixes[:, videos], rows[..., : prefixes.shape[-1]])
        return split_rows(jax.lax.dynamic_update_slice_in_dim(rows, split_rows(chosen), 0, axis=4))

    return jax.tree.map(lay, cache, prefixes)


def split_rows(cache: jax.Array) -> jax.Array:
    """Splits rows, axis 1, over the batch axes of the mesh: left to itself XLA puts all of them on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return cache
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(cache, PartitionSpec(free, BATCH_AXES, free, free, free))


def start(
    model: VideoLLM,
    cache: Cache,
    questions: Mapping[str, jax.Array],
    sampling: Sampling,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    max_new_tokens: int,
) -> Decoding:
    """Reads the questions behind their prefixes, and chooses the first token of each answer.

    questions: token_ids: (R, Q) int32, padded on the right; length: (R,) int32, 0 for a row that is not used, which has
    then stopped; prefix_length: (R,) int32; text_ids: (R, any) int32, all text of the prompts, padded with vocab_size.
    keys: (R,), one per row, so that a row's answer does not depend on the others; stop_ids: (any,) int32. The cache has
    room for prefixes, Q and `max_new_tokens`.
    """
    token_ids, length = questions["token_ids"], questions["length"]
    (rows, width), slots = token_ids.shape, jnp.arange(cache[0].shape[-1])
    first = len(slots) - max_new_tokens - width  # the questions' first slot
    asked = (slots >= first) & (slots < first + jnp.maximum(length, 1)[:, None])  # no softmax is empty
    prompt = (slots < questions["prefix_length"][:, None]) | asked
    before = slots <= first + jnp.arange(width)[:, None]
    total = questions["prefix_length"] + length

    embeds = pin_batch(model.llm.embed(token_ids, cache[0].dtype))
    question = questions["prefix_length"][:, None] + slots - first
    answer = total[:, None] + slots - first - width
    positions = jnp.where(slots < first, slots, jnp.where(slots < first + width, question, answer))
    read = slice(first + width)  # the answer's slots are empty yet
    position_ids = positions[:, first : first + width]
    masks = window_masks((prompt[:, None] & before)[:, :, read], position_ids, positions[:, read], model.config.window)
    hidden, cache = model.llm(embeds, position_ids, masks, cache=cache, cache_index=first, context_length=total)
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)
    logits = model.llm.logits(last)[:, 0]
    every_row = jnp.arange(rows)
    seen = jnp.zeros(logits.shape, bool).at[every_row[:, None], questions["text_ids"]].set(True, mode="drop")
    chosen = choose(logits, seen, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
    finite = jnp.isfinite(logits).all(-1)
    current = jnp.where((length > 0) & finite, chosen, stop_ids[0])
    ids = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(current)
    return Decoding(
        cache, prompt, positions, total, seen.at[every_row, current].set(True), keys, ids, current, finite, jnp.int32(1)
    )


def decode(model: VideoLLM, state: Decoding, sampling: Sampling, stop_ids: jax.Array, until: jax.Array) -> Decoding:
    """Goes on until `until` ids are chosen or every row has met a stop token.

    After its first stop token, a row's ids repeat that token up to the last step. A row whose logits are not finite
    stops.
    """
    num_slots, max_new_tokens = state.prompt.shape[1], state.ids.shape[1]
    slots, first = jnp.arange(num_slots), num_slots - max_new_tokens
    every_row = jnp.arange(len(state.ids))

    def unfinished(state: Decoding) -> jax.Array:
        return (state.step < until) & ~jnp.isin(state.current, stop_ids).all()

    def one_token(state: Decoding) -> Decoding:
        index = first + state.step - 1  # the slot of `current`, behind all prompts
        mask = state.prompt | ((slots >= first) & (slots <= index))
        position_ids = (state.length + state.step - 1)[:, None]
        hidden, cache = model.llm(
            pin_batch(model.llm.embed(state.current[:, None], state.cache[0].dtype)),
            position_ids,
            window_masks(mask[:, None], position_ids, state.positions, model.config.window),
            cache=state.cache,
            cache_index=index,
            context_length=state.length,
        )
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        logits = model.llm.logits(hidden)[:, 0]
        chosen = choose(logits, state.seen, sampling, keys)
        stopped = jnp.isin(state.current, stop_ids)
        finite = stopped | jnp.isfinite(logits).all(-1)
        current = jnp.where(stopped, state.current, jnp.where(finite, chosen, stop_ids[0]))
        return state._replace(
            cache=cache,
            seen=state.seen.at[every_row, current].set(True),
            ids=state.ids.at[:, state.step].set(current),
            current=current,
            finite=state.finite & finite,
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, one_token, state)
