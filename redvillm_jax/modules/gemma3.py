"""The Gemma 3 decoder; its weights have the names of transformers' Gemma3ForCausalLM.

Most layers see a window and rotate by a base of their own; the others see everything.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.layers import (
    Embedding,
    Linear,
    Stack,
    attention,
    gelu_tanh,
    keep,
    merge_heads,
    rotary_angles,
    rotate,
    split_heads,
    update_cache,
)
from redvillm_jax.modules.llama import LlamaDecoder, LlamaMLP, RopeScaling, frequency_scale


@dataclasses.dataclass(frozen=True)
class Rope:
    """Base and scaling of rotary positions."""

    theta: float
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class Gemma3TextConfig:
    """Sizes and options of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    query_pre_attn_scalar: float  # scores are divided by its square root
    layer_kinds: tuple[str, ...]  # "full" or "window", one for each layer
    sliding_window: int  # number of positions that a "window" layer sees, the query's own included
    full_rope: Rope
    window_rope: Rope

    @property
    def window(self) -> int | None:
        """The number of positions that a window layer sees; None: there is no such layer."""
        return self.sliding_window if "window" in self.layer_kinds else None


class Gemma3RMSNorm(nnx.Module):
    """Root-mean-square normalisation, scaled by 1 + weight, in fp32; returned in the dtype of x."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class Gemma3Attention(nnx.Module):
    """Causal self-attention with normalised queries and keys, rotary positions and grouped keys."""

    def __init__(self, config: Gemma3TextConfig, *, rngs: nnx.Rngs):
        c, linear = config, functools.partial(Linear, bias=False, rngs=rngs)
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = Gemma3RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.k_norm = Gemma3RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.num_heads, self.num_kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.query_scale = math.sqrt(c.head_dim / c.query_pre_attn_scalar)  # `attention` divides by sqrt(head_dim)

    def __call__(self, x, angles, attention_mask, cache_index, cache):
        q = rotate(self.q_norm(split_heads(self.q_proj(x), self.num_heads)), angles)
        k = rotate(self.k_norm(split_heads(self.k_proj(x), self.num_kv_heads)), angles)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if self.query_scale != 1:
            q = q * self.query_scale
        if cache is not None:
            cache, k, v = update_cache(cache, k, v, cache_index, attention_mask.shape[-1])
        return self.o_proj(merge_heads(attention(q, k, v, attention_mask))), cache


class Gemma3Layer(nnx.Module):
    """One decoder layer with norms before and after both parts: (B, S, K) -> (B, S, K) and the updated cache.

    angles: of full layers and of window layers. windowed: () bool, whether this is a window layer.
    """

    def __init__(self, config: Gemma3TextConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(Gemma3RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = Gemma3Attention(config, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = LlamaMLP(config, gelu_tanh, rngs=rngs)
        self.post_feedforward_layernorm = norm()

    def __call__(self, x, angles, masks, cache_index, windowed, cache):
        full, window = angles
        own = jnp.where(windowed, window, full), masks.of_layer(windowed)
        y, cache = self.self_attn(self.input_layernorm(x), *own, cache_index, cache)
        x = keep(x + self.post_attention_layernorm(y), "residual")
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache


class Gemma3Model(nnx.Module):
    """The level `model` of Gemma's weight names."""

    def __init__(self, config: Gemma3TextConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = Stack(lambda rngs: Gemma3Layer(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.norm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Gemma3Decoder(LlamaDecoder):
    """A decoder whose embedding table makes the logits, too; an LLM in the contract of a base."""

    def __init__(self, config: Gemma3TextConfig, *, rngs: nnx.Rngs):
        self.model = Gemma3Model(config, rngs=rngs)
        self.lm_head = None
        self.config = config

    def embed(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """token_ids: (B, S) int32 -> (B, S, K) in `dtype`, scaled by sqrt(K), which `dtype` rounds as published."""
        return super().embed(token_ids, dtype) * jnp.asarray(math.sqrt(self.config.hidden_size), dtype)

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
        """Runs the decoder's body and its final norm; arguments and results are those of `LlamaDecoder`."""
        c = self.config
        angles = [angles_of(rope, position_ids, c.head_dim) for rope in (c.full_rope, c.window_rope)]
        windowed = jnp.array([kind == "window" for kind in c.layer_kinds])
        shared = angles, masks, cache_index
        x, cache = self.model.layers(embeds, *shared, of_layer=(windowed,), cache=cache, remat=remat)
        return self.model.norm(x), cache


def angles_of(rope: Rope, position_ids: jax.Array, head_dim: int) -> jax.Array:
    """Returns the rotary angles (B, S, head_dim / 2) fp32 of one kind of layer. position_ids: (B, S)."""
    scale = None if rope.scaling is None else frequency_scale(rope.scaling, head_dim, rope.theta)
    return rotary_angles(position_ids, head_dim, rope.theta, scale)
