"""Frozen matrices in 8 bits: how exact they are, where they lie, and that a model with them trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES
from flax import nnx

from redvillm_jax.model.base_folder import load_part, open_base
from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.layers import Linear, levels
from redvillm_jax.modules.quantize import quantize, quantized_shapes
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding


def load(folder, mesh, **options):
    base = open_base(folder)
    return load_part(base, "llm", dtype=jnp.float32, sharding=weight_sharding(mesh, base.module.SHARDING), **options)


def linears(module: nnx.Module) -> dict[tuple, Linear]:
    return {path: layer for path, layer in nnx.iter_modules(module) if isinstance(layer, Linear)}


def gaps(values: np.ndarray) -> np.ndarray:
    """The distance from a level to the next one further out."""
    return np.abs(levels(np.abs(values.astype(np.int32)) + 1) - levels(np.abs(values)))


def widened(values: np.ndarray, scale: np.ndarray, input_scale: np.ndarray) -> np.ndarray:
    return levels(values) * input_scale * scale[..., None]


def test_rounding_is_to_the_nearest_of_255_levels_per_output():
    weight = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    weight[2] = weight[:, 7] = 0
    values, scale, input_scale = quantize(weight)
    assert values.dtype == np.int8 and (scale.dtype, scale.shape) == (np.float32, (5,))
    assert (input_scale.dtype, input_scale.shape) == (np.float32, (1, 64))
    assert (np.abs(values).max(-1)[weight.any(-1)] == 127).all()
    all_levels = np.asarray(levels(np.arange(-127, 128)))
    scales = scale[:, None] * input_scale
    want = np.abs(weight[..., None] - all_levels * scales[..., None]).min(-1)
    off = np.abs(widened(values, scale, input_scale) - weight)
    assert (off <= want + 0.01 * scales).all()


def test_normal_weights_lose_less_than_by_equal_steps():
    weight = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    step = np.abs(weight).max(-1, keepdims=True) / 127
    lost, equal = (np.linalg.norm(x - weight) for x in (widened(*quantize(weight)), np.rint(weight / step) * step))
    assert lost < 0.78 * equal
    assert lost / np.linalg.norm(weight) < 0.007


def test_open_model_with_small_weights_lose_no_larger_share_than_the_others():
    """Scales of outputs alone would lose three quarters of the smallest."""
    rng = np.random.default_rng(0)
    sizes = 2.0 ** rng.integers(-6, 3, 256)
    weight = (rng.normal(size=(512, 256)) * sizes * rng.uniform(0.1, 10, (512, 1))).astype(np.float32)
    lost = np.linalg.norm(widened(*quantize(weight)) - weight, axis=0) / np.linalg.norm(weight, axis=0)
    assert lost.max() < 0.008


def test_an_output_with_large_weights_decides_no_scale_of_an_input():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 64)).astype(np.float32)
    sizes = np.exp2(rng.integers(-9, 9, 8)).astype(np.float32)
    values, scale, input_scale = quantize(weight)
    for got, want in zip(quantize(weight * sizes[:, None]), (values, scale * sizes, input_scale), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_but_the_head_is_quantized_and_close(family, bases):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    exact, small = load(bases[family], mesh), load(bases[family], mesh, int8=True)
    wide = {".".join(path): layer for path, layer in linears(small).items() if layer.scale is None}
    assert wide.keys() == ({"lm_head"} if isinstance(exact.head, Linear) else set())
    for path, layer in linears(small).items():
        want = linears(exact)[path].weight[...]
        if layer.scale is None:
            np.testing.assert_array_equal(layer.weight[...], want)
            continue
        assert layer.weight.dtype == jnp.int8, path
        values, scales = layer.weight[...], layer.scale[...][..., None] * layer.input_scale[...]
        got = levels(values) * scales
        assert (jnp.abs(got - want) <= scales * 0.51 * gaps(values)).all(), path
    assert small.embed(jnp.zeros((1, 1), jnp.int32), jnp.float32).dtype == jnp.float32

    embeds = exact.embed(jnp.arange(40).reshape(2, 20), jnp.float32)
    masks = Masks(jnp.tril(jnp.ones((2, 20, 20), bool)))
    logits = [m.logits(m(embeds, jnp.arange(20)[None].repeat(2, 0), masks)[0]) for m in (small, exact)]
    most = 0.02 if family == "gemma3" else 0.015  # its norms make each branch as large as all that came before
    assert 0 < jnp.linalg.norm(logits[0] - logits[1]) / jnp.linalg.norm(logits[1]) < most


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sums_of_integers_do_not_overflow(dtype, bases):
    """float16 ends at 65504, and 127 * 4 * 1024 is more."""
    weight = np.ones((3, 1024), np.float32)
    linear = nnx.eval_shape(lambda: Linear(1024, 3, rngs=nnx.Rngs(0)))
    quantized_shapes(linear, wide=None)
    linear.weight, linear.scale, linear.input_scale = map(nnx.Param, quantize(weight))
    linear.bias = None
    x = jnp.full((2, 1024), 4, dtype)
    np.testing.assert_array_equal(linear(x), np.full((2, 3), 4096, dtype))
    gradient = jax.grad(lambda x: linear(x).sum().astype(jnp.float32))(x)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(jnp.float32), 3, rtol=1e-2)


def test_float16_with_8_bits_follows_float32(bases):
    """The whole language model, whose first row's embeddings are as large as real models' outliers."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    llm = load(bases["llava"], mesh, int8=True)
    embeds = llm.embed(jnp.arange(40).reshape(2, 20), jnp.float32) * jnp.array([1000.0, 1.0])[:, None, None]
    masks = Masks(jnp.tril(jnp.ones((2, 20, 20), bool)))

    def logits(dtype):
        return llm.logits(llm(embeds.astype(dtype), jnp.arange(20)[None].repeat(2, 0), masks)[0])

    want, got = logits(jnp.float32), logits(jnp.float16)
    assert jnp.isfinite(got).all() and jnp.linalg.norm(got - want) / jnp.linalg.norm(want) < 0.01


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_scales_belong_to_whole_rows_and_columns_on_every_mesh(sizes, bases):
    one = load(bases["llava"], make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), int8=True)
    many = load(bases["llava"], make_mesh(sizes), int8=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(many))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(many)))
