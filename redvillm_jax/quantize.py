"""Frozen matrices in 8 bits: one scale per output, so that a 7B language model takes 7 GB instead of 14."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from redvillm_jax.layers import Linear


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight: (..., out, in) -> int8 of the same shape and scale: (..., out) float32, weight ≈ int8 * scale.

    Symmetric and rounded to nearest; the largest value of an output becomes 127.
    """
    weight = np.asarray(weight, np.float32)
    scale = np.maximum(np.abs(weight).max(-1), np.finfo(np.float32).tiny) / 127
    return np.rint(weight / scale[..., None]).astype(np.int8), scale.astype(np.float32)


def quantized_shapes(module: nnx.Module) -> dict[tuple, tuple]:
    """Gives every `Linear` of an abstract module an int8 weight and a scale.

    Returns the path of each scale by the path of its weight.
    """
    scales = {}
    for path, linear in nnx.iter_modules(module):
        if isinstance(linear, Linear):
            shape = linear.weight.shape
            linear.weight = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.int8))
            linear.scale = nnx.data(nnx.Param(jax.ShapeDtypeStruct(shape[:-1], jnp.float32)))
            scales[(*path, "weight")] = (*path, "scale")
    return scales
