"""Layers that the bases share. Weights have PyTorch's layout and leaf names, so checkpoints need no transposes."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
Array = TypeVar("Array", jax.Array, np.ndarray)
KEPT = ("query", "key", "value", "context", "residual", "gate", "up")  # activations that `remat` may store by name


def pin_batch(x: jax.Array) -> jax.Array:
    """Shards axis 0 of an activation over the batch axes of the current mesh; does nothing without a mesh.

    Without such constraints XLA shards activations along features and moves activations instead of weights.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 1)))


def num_batch_parts() -> int:
    """Returns the number of parts into which the current mesh splits axis 0 of an activation; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def keep(x: jax.Array, name: str) -> jax.Array:
    """Names an activation of a block, one of `KEPT`, so that `Stack` can store it for the backward pass."""
    return checkpoint_name(x, name)


def gather_weights(weights: Any) -> Any:
    """Gathers weights that are split over the batch axes on every device.

    Call it in each block, so that XLA moves weights one layer at a time; otherwise XLA moves activations through
    windows of each product. With a "tensor" axis of several devices it does nothing, and the partitioner decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1:
        return weights
    return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, PartitionSpec()), weights)


def product(subscripts: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Computes an einsum of two arrays of one dtype with the same precision on every device, gradients included.

    dtype: of the result (default: of x). fp32 is multiplied in fp32; a TPU would not by default. 16-bit inputs with a
    wider result are summed in its dtype, and their gradient is a product of 16-bit inputs, too.
    """
    precision = None
    if x.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    elif x.dtype == jnp.bfloat16 and dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=dtype or x.dtype)


def levels(integers: Array) -> Array:
    """Returns the fp32 numbers of int8 weights, before scales: 0 … ±254, denser near 0, where most weights lie.

    Rounding normally distributed weights to these levels gives three quarters of the error of equal steps.
    """
    x = integers.astype(np.float32)
    return x + x * x * x * (1 / 127**2)


class Linear(nnx.Module):
    """`x @ weight.T + bias` in the dtype of x; weight: (out, in), as torch stores it.

    A frozen weight may be int8 (see `levels`), with a scale (out,) and an input_scale (1, in) from
    `redvillm_jax.modules.quantize`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None
        self.scale = self.input_scale = None

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """x: (..., in) -> (..., out). dtype: of the result and the sum (default: of x)."""
        dtype = dtype or x.dtype
        if self.scale is None:
            y = product("...i,oi->...o", x, self.weight[...].astype(x.dtype), dtype)
        else:  # scaled in fp32, because products of the largest levels overflow float16
            weight = (levels(self.weight[...]) * self.input_scale[...]).astype(x.dtype)
            y = (product("...i,oi->...o", x, weight, jnp.float32) * self.scale[...]).astype(dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Looks up rows of weight (num_embeddings, features) by id."""

    def __init__(self, num_embeddings: int, features: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_embeddings, features)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.weight[...], ids, axis=0)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias, computed in fp32 and returned in the dtype of x."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in fp32, cast back, then scaled in the dtype of x (as LLaMA and Qwen do)."""

    def __init__(self, features: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...].astype(x.dtype)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel; weight: (width, 3, height, width of a patch).

    images: (B, H, W, 3) -> (B, N, width), whole patches in row-major order.
    """

    def __init__(self, width: int, patch_size: int | tuple[int, int], *, bias: bool = False, rngs: nnx.Rngs):
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width, 3, *sides)))
        self.bias = nnx.Param(jnp.zeros(width)) if bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        high, wide = self.weight.shape[-2:]
        images = images[:, : images.shape[1] // high * high, : images.shape[2] // wide * wide]
        patches = rearrange(images, "b (h p1) (w p2) c -> b (h w) (c p1 p2)", p1=high, p2=wide)
        weight = rearrange(self.weight[...], "d c p1 p2 -> (c p1 p2) d").astype(images.dtype)
        y = product("...i,io->...o", patches, weight)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Stack(nnx.Module):
    """Equal blocks; their weights have a leading layer axis, and a scan runs one traced block over it.

    `make_block(rngs)` builds one block; `block(x, *args, *of_layer, cache)` returns `(x, cache)` (see `update_cache`).
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, rngs: nnx.Rngs):
        self.block = nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block))(rngs)
        self.num_layers = num_layers

    def __call__(self, x: jax.Array, *args, of_layer: tuple = (), cache=None, remat: str = "none"):
        """Runs all blocks. Returns x and the updated cache.

        args: the same for all blocks. of_layer: arrays with a leading layer axis (or None); each block gets its own
        part. cache: with a leading layer axis. remat: the activations stored for the backward pass: "none" recomputes
        nothing, "full" stores each block's input alone, names out of `KEPT`, separated by commas, are stored besides
        that input.
        """
        graphdef, weights = nnx.split(self.block)
        numbers = None if cache is None else jnp.arange(self.num_layers)

        def body(carry, layer):
            (x, cache), (weights, own, number) = carry, layer
            arrays = None if cache is None else (*cache, number)
            x, cache = nnx.merge(graphdef, gather_weights(weights))(pin_batch(x), *args, *own, arrays)
            return (pin_batch(x), cache), None

        if remat != "none":
            names = () if remat == "full" else remat.split(",")
            # No barrier is needed: XLA does not merge computations of different iterations of a scan.
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
        # The cache is carried and updated in place; as an output of the scan it would be copied.
        return jax.lax.scan(body, (x, cache), (weights, of_layer, numbers))[0]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | Callable | None = None
) -> jax.Array:
    """Computes scaled dot-product attention with an fp32 softmax.

    query: (B, S, H, D); key, value: (B, S_kv, H or a divisor of it, D); mask: (B, S, S_kv) bool, True = visible, or a
    fused kernel of `redvillm_jax.modules.attention` with its own mask. Returns (B, S, H, D); a query that sees no key
    gets a finite, meaningless result.
    """
    key, value = keep(key, "key"), keep(value, "value")
    if callable(mask):
        return mask(query, key, value)
    query = keep(query, "query")

    def attend(*qkv: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest" if qkv[0].dtype == jnp.float32 else None):  # as `product` does
            return jax.nn.dot_product_attention(*qkv, mask=None if mask is None else mask[:, None])

    def in_fp32(*halves: jax.Array) -> jax.Array:
        return attend(*(half.astype(jnp.float32) for half in halves)).astype(jnp.float16)

    if query.dtype == jnp.float16:  # CPUs and TPUs have no float16 product that sums in fp32
        return jax.lax.platform_dependent(query, key, value, cpu=in_fp32, tpu=in_fp32, default=attend)
    return attend(query, key, value)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(B, S, H * D) -> (B, S, H, D)."""
    return rearrange(x, "b s (h d) -> b s h d", h=num_heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """(B, S, H, D) -> (B, S, H * D)."""
    return rearrange(x, "b s h d -> b s (h d)")


def update_cache(
    cache: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    value: jax.Array,
    cache_index: int | jax.Array,
    num_slots: int,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Writes key and value (B, S, H, D) of one layer to the cache, from slot `cache_index` on.

    cache: keys and values of all layers, (num_layers, B, H, D, S_max) each, and the layer's number; slots are the last
    axis because attention's products read them so. Returns the updated keys and values of all layers, and the layer's
    keys and values in its first slots, (B, num_slots, H, D) each.
    """
    *arrays, layer = cache
    updated = tuple(
        jax.lax.dynamic_update_slice(
            array, rearrange(new, "b s h d -> 1 b h d s").astype(array.dtype), (layer, 0, 0, 0, cache_index)
        )
        for array, new in zip(arrays, (key, value), strict=True)
    )
    keys, values = (
        rearrange(jax.lax.dynamic_index_in_dim(array[..., :num_slots], layer, keepdims=False), "b h d s -> b s h d")
        for array in updated
    )
    return updated, keys, values


def rotary_angles(
    position_ids: jax.Array, head_dim: int, base: float | jax.Array, scale: np.ndarray | None = None
) -> jax.Array:
    """Computes the angles of rotary position embeddings: (B, S) -> (B, S, head_dim / 2) fp32.

    base may be (B, 1, 1). scale: a factor for each frequency, (head_dim / 2,) fp32.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    positions = position_ids[..., None].astype(jnp.float32)
    frequency = base**-exponent
    return positions * (frequency if scale is None else frequency * scale)


@jax.custom_vjp
def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the half-split pairs (j, j + D/2) of x: (B, S, H, D) in fp32 and returns them in the dtype of x.

    angles: (B, S, D/2) fp32. A product with a permutation matrix swaps the halves; it is exact, and cheaper on a TPU
    than moving half a vector register. The gradient is the inverse rotation.
    """
    halves = np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=1)
    swapped = product("...d,de->...e", x, jnp.asarray(halves, x.dtype), jnp.float32)
    cos = jnp.cos(angles)[:, :, None]
    sin = jnp.sin(angles)[:, :, None]
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


rotate.defvjp(
    lambda x, angles: (rotate(x, angles), angles),
    lambda angles, gradient: (rotate(gradient, -angles), jnp.zeros_like(angles)),
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU, torch's default."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU with its tanh approximation, which transformers names `gelu_pytorch_tanh`."""
    return jax.nn.gelu(x, approximate=True)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """Normalizes images (..., 3) uint8: (pixels / 255 - mean) / std in `dtype`."""
    pixels = images.astype(jnp.float32) / 255.0
    return ((pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).astype(dtype)


def broadcast_rows(x: jax.Array, batch: int) -> jax.Array:
    """Repeats x: (N, D) over a leading batch axis."""
    return repeat(x, "n d -> b n d", b=batch)
