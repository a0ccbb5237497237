"""Greedy decoding with a key-value cache, in static shapes."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from redvillm_jax.attention import visible
from redvillm_jax.layers import pin_batch
from redvillm_jax.model import VideoLLM


def greedy(
    model: VideoLLM,
    tokens: jax.Array,
    prompts: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> jax.Array:
    """Continues a batch of prompts by the most likely token until every row has met a stop token.

    tokens: visual tokens (B, V, K); prompts: token_ids, video_slots (B, P) int32, padded on the right, -1 in
    video_slots for text; length (B,) int32. Returns (B, max_new_tokens) int32; after a row's first stop token
    its ids repeat that token.
    """
    length = prompts["length"]
    rows, width = prompts["token_ids"].shape
    slots = jnp.arange(width + max_new_tokens)
    is_prompt = slots < length[:, None]
    stops = jnp.asarray(stop_ids)

    embeds = model.embed(prompts["token_ids"], prompts["video_slots"], tokens)
    position_ids = jnp.broadcast_to(slots[:width], (rows, width))
    prompt = is_prompt[:, :width].astype(jnp.int32)
    mask = jnp.pad(visible(prompt, jnp.zeros_like(prompt)), ((0, 0), (0, 0), (0, max_new_tokens)))
    cache = model.llm.init_cache(rows, width + max_new_tokens, embeds.dtype)
    hidden, cache = model.llm(embeds, position_ids, mask, cache=cache, context_length=length)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    first = model.llm.logits(last)[:, 0].argmax(-1).astype(jnp.int32)

    def unfinished(carry) -> jax.Array:
        step, _, current, _ = carry
        return (step < max_new_tokens) & ~jnp.isin(current, stops).all()

    def decode(carry):
        step, ids, current, cache = carry
        index = width + step - 1  # the slot of `current`, behind all prompts
        mask = is_prompt | ((slots >= width) & (slots <= index))
        hidden, cache = model.llm(
            pin_batch(model.llm.embed(current[:, None], embeds.dtype)),
            (length + step - 1)[:, None],
            mask[:, None],
            cache=cache,
            cache_index=index,
            context_length=length,
        )
        chosen = model.llm.logits(hidden)[:, 0].argmax(-1).astype(jnp.int32)
        current = jnp.where(jnp.isin(current, stops), current, chosen)
        return step + 1, ids.at[:, step].set(current), current, cache

    ids = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(first)
    step, ids, current, _ = jax.lax.while_loop(unfinished, decode, (jnp.int32(1), ids, first, cache))
    return jnp.where(jnp.arange(max_new_tokens) < step, ids, current[:, None])
