"""The decoder of the first Qwen models: packed queries, keys and values with biases, dynamic NTK and logn attention."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Stack,
    attention,
    keep,
    merge_heads,
    rotary_angles,
    rotate,
    split_heads,
    update_cache,
)


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Sizes and switches of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    layer_norm_epsilon: float
    rotary_emb_base: float
    seq_length: int  # the trained length; dynamic NTK and logn act beyond it
    use_dynamic_ntk: bool
    use_logn_attn: bool


class QwenAttention(nnx.Module):
    """Causal self-attention with rotary positions and an optional scale of the queries (logn)."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=False, rngs=rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x, angles, query_scale, attention_mask, cache_index, cache):
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        q, k = rotate(q, angles), rotate(k, angles)
        if query_scale is not None:
            q = q * query_scale[:, :, None, None].astype(q.dtype)
        if cache is not None:
            cache, k, v = update_cache(cache, k, v, cache_index, attention_mask.shape[-1])
        return self.c_proj(merge_heads(attention(q, k, v, attention_mask))), cache


class QwenMLP(nnx.Module):
    """The gated MLP: c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.w1 = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.w2 = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = keep(self.w2(x), "gate"), keep(self.w1(x), "up")
        return self.c_proj(up * jax.nn.silu(gate))


class QwenBlock(nnx.Module):
    """One pre-norm decoder block: (B, S, K) -> (B, S, K) and the updated cache."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QwenAttention(config, rngs=rngs)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QwenMLP(config, rngs=rngs)

    def __call__(self, x, angles, query_scale, attention_mask, cache_index, cache):
        y, cache = self.attn(self.ln_1(x), angles, query_scale, attention_mask, cache_index, cache)
        x = keep(x + y, "residual")
        return x + self.mlp(self.ln_2(x)), cache


class QwenModel(nnx.Module):
    """The level `transformer` of Qwen's weight names."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.wte = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.h = Stack(lambda rngs: QwenBlock(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


def ntk_base(config: QwenConfig, context_length: jax.Array) -> jax.Array:
    """Computes the rotary base (B, 1, 1) fp32 for prompts of context_length (B,) tokens.

    Published rule: alpha = max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1), base * alpha ** (d / (d - 2)). Here
    the exponent is an integer, the count of doublings of seq_length below the length.
    """
    doublings = (context_length[:, None] > config.seq_length * 2 ** jnp.arange(16)).sum(-1)
    alpha = 2.0 ** (doublings + 1) - 1
    return (config.rotary_emb_base * alpha ** (config.head_dim / (config.head_dim - 2)))[:, None, None]


class QwenDecoder(nnx.Module):
    """A decoder with its output head; an LLM in the contract of a base."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.transformer = QwenModel(config, rngs=rngs)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        self.config = config

    @property
    def head(self) -> Linear:
        """The module whose weight makes the logits."""
        return self.lm_head

    def embed(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """token_ids: (B, S) int32 -> (B, S, K) in `dtype`."""
        return self.transformer.wte(token_ids).astype(dtype)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Makes empty keys and values: (num_layers, batch, num_attention_heads, head_dim, length) each."""
        c = self.config
        shape = (c.num_hidden_layers, batch, c.num_attention_heads, c.head_dim, length)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def context_class(self, context_length: int) -> int:
        """Returns the class of a prompt. Prompts of one class have one rotary base, so can share a prefix's cache."""
        c = self.config
        return sum(context_length > c.seq_length * 2**i for i in range(16)) if c.use_dynamic_ntk else 0

    def __call__(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        masks: Masks,
        *,
        cache: tuple[jax.Array, jax.Array] | None = None,
        cache_index: int | jax.Array = 0,
        context_length: jax.Array | None = None,
        remat: str = "none",
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Runs the decoder's body and its final norm. Returns hidden states (B, S, K) and the updated cache.

        embeds: (B, S, K); position_ids: (B, S); masks: (B, S, S_kv), where S_kv is S or, with a cache, the number of
        its slots to read. New keys and values go to slots cache_index … cache_index + S - 1. All layers see all keys.
        context_length: (B,) int32, the length of the whole prompt, in prefill and in decoding; None in training. It
        turns on dynamic NTK (by that length) and logn (scales queries at positions from seq_length on), as in the
        published model.
        """
        c = self.config
        base, query_scale = c.rotary_emb_base, None
        if context_length is not None and c.use_dynamic_ntk:
            base = ntk_base(c, context_length)
        if context_length is not None and c.use_logn_attn:
            query_scale = jnp.maximum(jnp.log(position_ids + 1.0) / math.log(c.seq_length), 1.0)
        angles = rotary_angles(position_ids, c.head_dim, base)
        x, cache = self.transformer.h(embeds, angles, query_scale, masks.full, cache_index, cache=cache, remat=remat)
        return self.transformer.ln_f(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (..., K) -> (..., vocab_size) fp32."""
        return self.lm_head(hidden, jnp.float32)
