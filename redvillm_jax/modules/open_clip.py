"""OpenCLIP's vision transformer as Qwen-VL has it: no class token, learned positions resized to any grid."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.layers import (
    LayerNorm,
    Linear,
    PatchEmbedding,
    Stack,
    attention,
    gelu,
    merge_heads,
    split_heads,
)
from redvillm_jax.modules.resampler import grid_positions

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class OpenClipConfig:
    """Sizes of a vision transformer."""

    patch_size: int
    num_positions: int  # learned positions, of a square grid
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


class VisionAttention(nnx.Module):
    """Full self-attention with one packed projection: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.in_proj = Linear(width, 3 * width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        # the rows of in_proj are interleaved: q, k, v of head 0, then q, k, v of head 1, …
        q, k, v = jnp.split(split_heads(self.in_proj(x), self.num_heads), 3, axis=-1)
        return self.out_proj(merge_heads(attention(q, k, v)))


class VisionMLP(nnx.Module):
    """Two layers around an exact GELU: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, intermediate_size: int, *, rngs: nnx.Rngs):
        self.c_fc = Linear(width, intermediate_size, rngs=rngs)
        self.c_proj = Linear(intermediate_size, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(gelu(self.c_fc(x)))


class VisionBlock(nnx.Module):
    """One pre-norm transformer block: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: OpenClipConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.ln_1 = LayerNorm(width, eps=EPS)
        self.attn = VisionAttention(width, config.num_attention_heads, rngs=rngs)
        self.ln_2 = LayerNorm(width, eps=EPS)
        self.mlp = VisionMLP(width, config.intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)), None


class VisionBlocks(nnx.Module):
    """The level `transformer` of the vision tower's weight names."""

    def __init__(self, config: OpenClipConfig, *, rngs: nnx.Rngs):
        make_block = lambda rngs: VisionBlock(config, rngs=rngs)  # noqa: E731
        self.resblocks = Stack(make_block, config.num_hidden_layers, rngs=rngs)


class OpenClipEncoder(nnx.Module):
    """The vision transformer: no class token, no final norm, positions resized to the picture's grid.

    pixels: (B, H, W, 3) normalised -> (B, N, D) in the dtype of `pixels`.
    """

    def __init__(self, config: OpenClipConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.conv1 = PatchEmbedding(width, config.patch_size, rngs=rngs)
        shape = config.num_positions, width
        self.positional_embedding = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), shape))
        self.ln_pre = LayerNorm(width, eps=EPS)
        self.transformer = VisionBlocks(config, rngs=rngs)
        self.patch_size = config.patch_size

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Embeds patches with their positions, before the first norm: (B, N, D)."""
        rows, cols = (side // self.patch_size for side in pixels.shape[1:3])
        positions = grid_positions(self.positional_embedding[...], jnp.arange(rows * cols), rows, cols)
        return self.conv1(pixels) + positions.astype(pixels.dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.transformer.resblocks(self.ln_pre(self.embed(pixels)))[0]
