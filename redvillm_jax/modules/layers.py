"""Layers that the bases share; weights keep PyTorch's layout and leaf names, so checkpoints need no transposes."""

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
    """Shards axis 0 of an activation over the batch axes of the current mesh; without a mesh, returns it as is.

    Without these pins XLA shards activations along features and moves them instead of weights.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 1)))


def num_batch_parts() -> int:
    """Into how many parts the current mesh splits axis 0 of an activation; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def keep(x: jax.Array, name: str) -> jax.Array:
    """Names an activation of a block, one of `KEPT`, so that `Stack` can store it for the backward pass."""
    return checkpoint_name(x, name)


def gather_weights(weights: Any) -> Any:
    """Brings weights that are split over the batch axes to every device.

    Said where they are used, in each block, it moves them one layer at a time; left to itself XLA moves activations
    through windows of each product. With a "tensor" axis the weights stay split and the partitioner decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1:
        return weights
    return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, PartitionSpec()), weights)


def product(subscripts: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """An einsum of two arrays of one dtype that is computed alike on every device, and so are its gradients.

    fp32 is multiplied in fp32, which a TPU does only where it is told to. dtype: of the result (default: of x).
    Halves whose result is wider are summed in it; the gradient comes back through a product of halves.
    """
    precision = None
    if x.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    elif x.dtype == jnp.bfloat16 and dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=dtype or x.dtype)


def levels(integers: Array) -> Array:
    """The fp32 numbers that int8 weights stand for, up to scales: 0 … ±254, denser near 0, where most weights lie.

    Rounded to the nearest of them, normally distributed weights lose three quarters of what equal steps lose.
    """
    x = integers.astype(np.float32)
    return x + x * x * x * (1 / 127**2)


class Linear(nnx.Module):
    """`x @ weight.T + bias` in the dtype of x; weight: (out, in), as torch stores it.

    A frozen weight may be int8, of which `levels` makes numbers, with a scale: (out,) and an input_scale: (1, in)
    (see `redvillm_jax.modules.quantize`).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None
        self.scale = self.input_scale = None

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """x: (..., in) -> (..., out); `dtype`: of the result, summed in it (default: of x)."""
        dtype = dtype or x.dtype
        if self.scale is None:
            y = product("...i,oi->...o", x, self.weight[...].astype(x.dtype), dtype)
        else:  # scaled in fp32: the largest levels' products would overflow float16
            weight = (levels(self.weight[...]) * self.input_scale[...]).astype(x.dtype)
            y = (product("...i,oi->...o", x, weight, jnp.float32) * self.scale[...]).astype(dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Rows of weight: (num_embeddings, features) looked up by id."""

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
    """A convolution whose stride is its kernel, without bias; weight: (width, 3, height, width of a patch).

    images: (B, H, W, 3) -> (B, N, width), patches in row-major order.
    """

    def __init__(self, width: int, patch_size: int | tuple[int, int], *, rngs: nnx.Rngs):
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width, 3, *sides)))

    def __call__(self, images: jax.Array) -> jax.Array:
        high, wide = self.weight.shape[-2:]
        patches = rearrange(images, "b (h p1) (w p2) c -> b (h w) (c p1 p2)", p1=high, p2=wide)
        weight = rearrange(self.weight[...], "d c p1 p2 -> (c p1 p2) d").astype(images.dtype)
        return product("...i,io->...o", patches, weight)


class Stack(nnx.Module):
    """Equal blocks whose weights carry a leading layer axis; one block is traced and scanned over.

    `make_block(rngs)` builds one block; `block(x, *args, *of_layer, cache)` returns `(x, cache)` (see `update_cache`).
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, *, rngs: nnx.Rngs):
        self.block = nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block))(rngs)
        self.num_layers = num_layers

    def __call__(self, x: jax.Array, *args, of_layer: tuple = (), cache=None, remat: str = "none"):
        """Runs all blocks; `args` are shared by them, `cache` has a leading layer axis and comes back updated.

        of_layer: arrays with a leading layer axis (or None), of which each block gets its own part.
        remat: what the backward pass finds stored; "none": all it needs, "full": each block's input alone, else
        that and the activations of `KEPT` that are named, separated by commas. The rest is computed again.
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
            # A scan's iterations are apart already: no barrier has to keep XLA from merging what is recomputed.
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
        # The cache is carried, not scanned over: written where it lies, where a scan's output would be a copy of it.
        return jax.lax.scan(body, (x, cache), (weights, of_layer, numbers))[0]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | Callable | None = None
) -> jax.Array:
    """Scaled dot-product attention with an fp32 softmax.

    query: (B, S, H, D); key, value: (B, S_kv, H or a divisor of it, D); mask: (B, S, S_kv) bool, True = visible, or a
    fused kernel of `redvillm_jax.modules.attention` that knows what is visible. Returns (B, S, H, D). A row that sees
    nothing gets a finite, meaningless result.
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

    if query.dtype == jnp.float16:  # CPUs and TPUs have no product of halves that sums in fp32
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
    """Writes key and value: (B, S, H, D) of one layer at slot `cache_index`.

    cache: keys and values of all layers, (num_layers, B, H, D, S_max) each, and the layer's number; slots come last
    because attention's products read them so. Returns the two updated, and what the layer has in its first slots:
    (B, num_slots, H, D) each.
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
    """Angles of rotary position embeddings: (B, S) -> (B, S, head_dim / 2) fp32.

    base may be (B, 1, 1). scale: what the frequencies are multiplied with, (head_dim / 2,) fp32.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    positions = position_ids[..., None].astype(jnp.float32)
    frequency = base**-exponent
    return positions * (frequency if scale is None else frequency * scale)


@jax.custom_vjp
def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the half-split pairs (j, j + D/2) of x: (B, S, H, D) in fp32 and returns them in the dtype of x.

    angles: (B, S, D/2) fp32. The halves change places in a product with a permutation, which is exact: half a vector
    register cannot be moved cheaply on a TPU. The gradient is the rotation back.
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


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype) -> jax.Array:
    """images: (..., 3) uint8 -> (pixels / 255 - mean) / std in `dtype`."""
    pixels = images.astype(jnp.float32) / 255.0
    return ((pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).astype(dtype)


def broadcast_rows(x: jax.Array, batch: int) -> jax.Array:
    """Repeats x: (N, D) over a leading batch axis."""
    return repeat(x, "n d -> b n d", b=batch)
