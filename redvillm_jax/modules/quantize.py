"""Quantizes frozen matrices to 8 bits: a 7B language model takes 7 GB instead of 14."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from redvillm_jax.modules.layers import Linear, levels

# Part of the fingerprint of a model in 8 bits, because other rounding gives other answers.
SCHEME = "cubic levels, scales of inputs"
LEVELS = levels(np.arange(-127, 128))
LARGEST = 2**8  # the largest scale of an input; its product with the last level fits float16
STEPS = 2**15 - 1  # of the 16-bit index into the table of nearest levels
NEAREST = np.zeros(2**16, np.int8)
NEAREST[np.arange(-STEPS, STEPS + 1)] = (
    np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, np.arange(-STEPS, STEPS + 1) * LEVELS[-1] / STEPS) - 127
)


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes weight (out, in): int8 of the same shape, scale (out,) and input_scale (1, in), both float32.

    weight ≈ levels(int8) * input_scale * scale[:, None], rounded to the nearest level; the largest value of an output
    becomes 127. An input's scale is the size of its weights: inputs with small weights, whose activations are often
    large, are rounded as finely as the others.
    """
    weight = np.asarray(weight, np.float32)
    tiny = np.finfo(np.float32).tiny
    of_outputs = np.maximum(np.sqrt(np.square(weight).mean(-1, keepdims=True)), tiny)
    of_inputs = np.sqrt(np.square(weight / of_outputs).mean(-2, keepdims=True))
    input_scale = of_inputs.clip(1 / LARGEST, LARGEST)
    weight = weight / input_scale
    scale = np.maximum(np.abs(weight).max(-1) / LEVELS[-1], tiny)
    steps = np.rint(weight / scale[:, None] * (STEPS / LEVELS[-1])).astype(np.int16)
    return np.take(NEAREST, steps.view(np.uint16)), scale, input_scale


def quantized_shapes(module: nnx.Module, wide: nnx.Module | None) -> dict[tuple, tuple[tuple, tuple]]:
    """Gives every `Linear` of an abstract module an int8 weight and scales, except to `wide`.

    Returns the paths of `scale` and `input_scale` by the path of their weight.
    """
    scales = {}
    for path, linear in nnx.iter_modules(module):
        if isinstance(linear, Linear) and linear is not wide:
            *layers, out_features, in_features = linear.weight.shape
            for name, shape, dtype in (
                ("weight", (*layers, out_features, in_features), jnp.int8),
                ("scale", (*layers, out_features), jnp.float32),
                ("input_scale", (*layers, 1, in_features), jnp.float32),
            ):
                setattr(linear, name, nnx.data(nnx.Param(jax.ShapeDtypeStruct(shape, dtype))))
            scales[(*path, "weight")] = (*path, "scale"), (*path, "input_scale")
    return scales
