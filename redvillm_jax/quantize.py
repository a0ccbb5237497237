"""Frozen matrices in 8 bits, one scale per output, so that a 7B language model takes 9 GB instead of 14."""

from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from redvillm_jax.layers import Linear, levels

SCHEME = "cubic levels"  # in the fingerprint of a model in 8 bits: other rounding gives other answers
LEVELS = levels(np.arange(-127, 128), np.float32)
STEPS = 2**15 - 1  # of a 16-bit number that finds the nearest level in a table
NEAREST = np.zeros(2**16, np.int8)
NEAREST[np.arange(-STEPS, STEPS + 1)] = (
    np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, np.arange(-STEPS, STEPS + 1) * LEVELS[-1] / STEPS) - 127
)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight: (..., out, in) -> int8 of the same shape and scale: (..., out) float32, weight ≈ levels(int8) * scale.

    Symmetric and rounded to the nearest level; the largest value of an output becomes 127.
    """
    weight = np.asarray(weight, np.float32)
    scale = np.maximum(np.abs(weight).max(-1) / LEVELS[-1], np.finfo(np.float32).tiny)
    steps = np.rint(weight / scale[..., None] * (STEPS / LEVELS[-1])).astype(np.int16)
    return np.take(NEAREST, steps.view(np.uint16)), scale


def quantized_shapes(module: nnx.Module, wide: Container[tuple]) -> dict[tuple, tuple]:
    """Gives every `Linear` of an abstract module an int8 weight and a scale, except where `wide` has the path of its weight.

    Returns the path of each scale by the path of its weight.
    """
    scales = {}
    for path, linear in nnx.iter_modules(module):
        if isinstance(linear, Linear) and (*path, "weight") not in wide:
            shape = linear.weight.shape
            linear.weight = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.int8))
            linear.scale = nnx.data(nnx.Param(jax.ShapeDtypeStruct(shape[:-1], jnp.float32)))
            scales[(*path, "weight")] = (*path, "scale")
    return scales
