"""Qwen-VL's resampler: learned queries attend to any number of features, with positions resized to their grid."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.layers import LayerNorm, Linear, attention, broadcast_rows, merge_heads, product, split_heads

EPS = 1e-6


def bicubic_weights(index: jax.Array, target: int | jax.Array, source: int) -> jax.Array:
    """Returns rows `index` of the matrix of torch's bicubic resampling from `source` to `target` points.

    index (...) gives (..., source) fp32. torch's kernel has a = -0.75 (jax.image's has -0.5), no
    antialiasing, and repeats the border. `target` may be traced and broadcasts against `index`.
    """
    a = -0.75
    x = (index + 0.5) * (source / target) - 0.5
    left = jnp.floor(x)
    weights = 0.0
    for tap in (-1, 0, 1, 2):
        s = jnp.abs(x - left - tap)
        near = ((a + 2) * s - (a + 3)) * s**2 + 1
        far = ((a * s - 5 * a) * s + 8 * a) * s - 4 * a
        column = jnp.clip(left + tap, 0, source - 1).astype(jnp.int32)
        weights += jnp.where(s <= 1, near, far)[..., None] * jax.nn.one_hot(column, source)
    return weights


def interpolate(weights: jax.Array, table: jax.Array) -> jax.Array:
    """Multiplies weights (..., S) fp32 and table (S, D): (..., D) fp32."""
    return product("...s,sd->...d", weights, table.astype(jnp.float32))


def grid_positions(table: jax.Array, index: jax.Array, rows: int | jax.Array, cols: int | jax.Array) -> jax.Array:
    """Resizes a square position table to rows x cols; returns cells `index` (...), raster order: (..., D) fp32."""
    side = math.isqrt(len(table))
    down = bicubic_weights(index // cols, rows, side)
    across = bicubic_weights(index % cols, cols, side)
    weights = down[..., :, None] * across[..., None, :]
    return interpolate(weights.reshape(*weights.shape[:-2], side * side), table)


def sin_cos_positions(num_positions: int, features: int) -> jax.Array:
    """Makes the fixed table for a square grid: [sin c, cos c, sin r, cos r] per cell, (N, features)."""
    side = math.isqrt(num_positions)
    frequency = 10000.0 ** -(jnp.arange(features // 4) / (features // 4))
    row, col = jnp.divmod(jnp.arange(num_positions), side)
    angles = [axis[:, None] * frequency for axis in (col, row)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


class MultiheadAttention(nnx.Module):
    """torch.nn.MultiheadAttention: in_proj_weight (3 * width, width) holds q | k | v as contiguous blocks."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        bound = (6 / (4 * width)) ** 0.5
        self.in_proj_weight = nnx.Param(
            jax.random.uniform(rngs.params(), (3 * width, width), minval=-bound, maxval=bound)
        )
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def project_in(self, x: jax.Array, block: int) -> jax.Array:
        """Projects x by block 0 (query), 1 (key) or 2 (value) of the packed weights."""
        width = x.shape[-1]
        rows = slice(block * width, (block + 1) * width)
        weight, bias = (param[rows].astype(x.dtype) for param in (self.in_proj_weight, self.in_proj_bias))
        return product("...i,oi->...o", x, weight) + bias

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (
            split_heads(self.project_in(x, block), self.num_heads) for block, x in enumerate((query, key, value))
        )
        return self.out_proj(merge_heads(attention(q, k, v, mask)))

    def values(self, x: jax.Array) -> jax.Array:
        """Returns, for each x, attention over x as the only key: (..., width)."""
        return self.out_proj(self.project_in(x, 2))


class Resampler(nnx.Module):
    """n_queries learned queries attend to any number of features; keys carry positions, values do not."""

    def __init__(self, n_queries: int, features: int, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.pos_embed = nnx.Param(sin_cos_positions(n_queries, width))
        self.query = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (n_queries, width)))
        self.kv_proj = Linear(features, width, bias=False, rngs=rngs)
        self.attn = MultiheadAttention(width, num_heads, rngs=rngs)
        self.ln_q = LayerNorm(width, eps=EPS)
        self.ln_kv = LayerNorm(width, eps=EPS)

    def position_table(self) -> jax.Array:
        """Returns the fixed positions of the queries' grid, (n_queries, K), without gradient."""
        return jax.lax.stop_gradient(self.pos_embed[...])

    def __call__(self, features: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        """features: (B, M, D), mask: (B, M) bool, positions of the keys: (M, K) or (B, M, K) -> (B, n_queries, K)."""
        batch, dtype = len(features), features.dtype
        kv = self.ln_kv(self.kv_proj(features))
        query = self.ln_q(self.query[...].astype(dtype)) + self.position_table().astype(dtype)
        mask = jnp.broadcast_to(mask[:, None], (batch, len(query), mask.shape[1]))
        return self.attn(broadcast_rows(query, batch), kv + positions.astype(dtype), kv, mask)

    def values(self, features: jax.Array) -> jax.Array:
        """Maps every feature as if it were the only key: (B, M, D) -> (B, M, K)."""
        return self.attn.values(self.ln_kv(self.kv_proj(features)))
