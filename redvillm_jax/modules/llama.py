"""The LLaMA decoder with the options of its descendants; its weights have transformers' names.

Mistral adds a window; Qwen2 adds biases, and a window in some layers; LLaMA 3 adds grouped keys and scaled rotary
frequencies.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    product,
    rotary_angles,
    rotate,
    split_heads,
    update_cache,
)

KINDS = ("full", "window")  # the keys that a layer's attention sees: all before a query, or the last ones


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The scaling of rotary frequencies for longer texts, with the fields of transformers' rope_parameters.

    kind: "linear" divides all frequencies by `factor`; "llama3" divides only low ones, whose wavelength is long
    compared with the trained length, with a smooth transition to the others.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
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
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_word_embeddings: bool = False  # the embedding table makes the logits, too
    layer_kinds: tuple[str, ...] = ()  # out of `KINDS`, one for each layer; (): all full
    sliding_window: int = 0  # number of keys that a "window" layer sees, the query's own included

    @property
    def window(self) -> int | None:
        """The number of keys that the narrowest layer sees; None: all."""
        return self.sliding_window if "window" in self.layer_kinds else None


def frequency_scale(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """Returns the factor of each rotary frequency: (head_dim / 2,) fp32."""
    if scaling.kind == "linear":
        return np.full(head_dim // 2, 1 / scaling.factor, np.float32)
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings / wavelength  # within the trained length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) / scaling.factor + kept).astype(np.float32)


class LlamaAttention(nnx.Module):
    """Causal self-attention with rotary positions; there may be fewer key-value heads than heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, size, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(size, config.hidden_size, bias=False, rngs=rngs)
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads

    def __call__(self, x, angles, attention_mask, cache_index, cache):
        q = rotate(split_heads(self.q_proj(x), self.num_heads), angles)
        k = rotate(split_heads(self.k_proj(x), self.num_kv_heads), angles)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        if cache is not None:
            cache, k, v = update_cache(cache, k, v, cache_index, attention_mask.shape[-1])
        return self.o_proj(merge_heads(attention(q, k, v, attention_mask))), cache


class LlamaMLP(nnx.Module):
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: Any, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = keep(self.gate_proj(x), "gate"), keep(self.up_proj(x), "up")
        return self.down_proj(self.activation(gate) * up)


class LlamaLayer(nnx.Module):
    """One pre-norm decoder layer: (B, S, K) -> (B, S, K) and the updated cache.

    windowed: () bool, whether this is a window layer.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config, rngs=rngs)

    def __call__(self, x, angles, masks, cache_index, windowed, cache):
        y, cache = self.self_attn(self.input_layernorm(x), angles, masks.of_layer(windowed), cache_index, cache)
        x = keep(x + y, "residual")
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LlamaModel(nnx.Module):
    """The level `model` of LLaMA's weight names."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = Stack(lambda rngs: LlamaLayer(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LlamaDecoder(nnx.Module):
    """A decoder with its output head; an LLM in the contract of a base."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.model = LlamaModel(config, rngs=rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        self.config = config

    @property
    def head(self) -> Linear | Embedding:
        """The module whose weight makes the logits."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def embed(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """token_ids: (B, S) int32 -> (B, S, K) in `dtype`."""
        return self.model.embed_tokens(token_ids).astype(dtype)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Makes empty keys and values: (num_layers, batch, num_key_value_heads, head_dim, length) each."""
        c = self.config
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, c.head_dim, length)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def context_class(self, context_length: int) -> int:
        """Returns the class of a prompt. Prompts of one class can share the cache of a prefix; here all can."""
        return 0

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
        its slots to read. New keys and values go to slots cache_index … cache_index + S - 1. context_length is not
        used: LLaMA's rotary base does not depend on it.
        """
        c = self.config
        scale = None if c.rope_scaling is None else frequency_scale(c.rope_scaling, c.head_dim, c.rope_theta)
        angles = rotary_angles(position_ids, c.head_dim, c.rope_theta, scale)
        windowed = jnp.array([kind == "window" for kind in c.layer_kinds or ("full",) * c.num_hidden_layers])
        x, cache = self.model.layers(embeds, angles, masks, cache_index, of_layer=(windowed,), cache=cache, remat=remat)
        return self.model.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (..., K) -> (..., vocab_size) fp32."""
        if self.lm_head is not None:
            return self.lm_head(hidden, jnp.float32)
        weight = self.model.embed_tokens.weight[...].astype(hidden.dtype)
        return product("...i,oi->...o", hidden, weight, jnp.float32)
