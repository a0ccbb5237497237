"""Chooses the next token: the most likely one, or one drawn at random."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """The settings of sampling. A compiled program takes them as arguments, so changing them compiles nothing.

    temperature: 0 = the most likely token. top_k: only the k most likely tokens, 0 = all. top_p: only the most likely
    tokens whose probabilities together reach p. repetition_penalty: for tokens that occurred before, also in the
    prompt's text, divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858, section 4.1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def choose(logits: jax.Array, seen: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """The next tokens (R,) int32 from logits (R, vocab_size) fp32.

    seen: (R, vocab_size) bool, tokens that occurred before; keys: (R,) PRNG keys. The penalty, the temperature, top_k
    and top_p act in this order, as in transformers.
    """
    penalty = sampling.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def draw() -> jax.Array:
        order = jnp.argsort(logits, axis=-1, descending=True)
        kept = keep_likely(jnp.take_along_axis(logits, order, axis=-1), sampling)
        places = jax.vmap(jax.random.categorical)(keys, kept)
        return jnp.take_along_axis(order, places[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda: logits.argmax(-1).astype(jnp.int32))


def keep_likely(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits (R, vocab_size), in descending order, over the temperature; -inf for tokens outside top_k or top_p."""
    ranks = jnp.arange(logits.shape[-1])
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)
    logits = jnp.where((ranks < sampling.top_k) | (sampling.top_k == 0), logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # 0 for the first, which is always kept
    return jnp.where((before < sampling.top_p) | (ranks == 0), logits, -jnp.inf)
