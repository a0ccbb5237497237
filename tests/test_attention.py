"""Every attention kernel computes the same: XLA, and splash in interpret mode, alone and on meshes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.attention import Backend, backend_of, choose_kernel, row_attention
from redvillm_jax.modules.layers import BATCH_AXES, attention
from redvillm_jax.modules.splash import splash_blocks
from redvillm_jax.runtime.sharding import make_mesh

HEADS, DIM = 2, 128


def packed_ids(rows: int, length: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Rows of two videos with a few questions each and padding at the end: group_ids, question_ids (B, S)."""
    rng = np.random.default_rng(seed)
    groups, questions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        start, number = 0, 0
        for group in (1, 2):
            for part in range(4):
                size = int(rng.integers(length // 16, length // 8))
                groups[row, start : start + size] = group
                number += part > 0
                questions[row, start : start + size] = number if part else 0
                start += size
    return jnp.asarray(groups), jnp.asarray(questions)


def test_a_window_that_is_narrower_than_a_row_takes_xla():
    tpu = Backend("tpu")
    choices = [choose_kernel("auto", tpu, jnp.bfloat16, 1024, 128, window) for window in (None, 2048, 1024, 1023)]
    assert choices == ["splash", "splash", "splash", "xla"]
    with pytest.raises(UserError, match="splash cannot be used: layers see 512 of a row's 1024 keys; use xla"):
        choose_kernel("splash", tpu, jnp.bfloat16, 1024, 128, 512)


def result_and_gradients(ids, query, key, value, kernel):
    """Context and its gradients at the slots that hold tokens."""
    real = (ids[0] > 0)[:, :, None, None]

    def total(query, key, value):
        context = attention(query, key, value, row_attention(*ids, kernel))
        weights = jnp.cos(jnp.arange(context.size, dtype=jnp.float32)).reshape(context.shape)
        return (context * weights * real).sum(), context * real

    (_, context), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return context, *gradients


def inputs(rows: int, length: int, kv_heads: int = HEADS):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, (rows, length, h, DIM)) for k, h in zip(keys, (HEADS, kv_heads, kv_heads), strict=True)
    ]


@pytest.mark.parametrize(("rows", "length", "kv_heads"), [(1, 256, 2), (3, 384, 2), (2, 256, 1)])
def test_splash_equals_xla(rows, length, kv_heads):
    ids, qkv = packed_ids(rows, length), inputs(rows, length, kv_heads)
    want = result_and_gradients(ids, *qkv, "xla")
    with pltpu.force_tpu_interpret_mode():
        got = result_and_gradients(ids, *qkv, "splash")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_equals_xla_when_several_blocks_make_a_row(monkeypatch):
    """Blocks of 128 in rows of 512: most pairs of blocks are skipped, and rows must not reach into each other."""
    small = {name: 128 for name in splash_blocks(512).__dataclass_fields__ if name.startswith("block")}
    blocks = type(splash_blocks(512))(**small)
    monkeypatch.setattr("redvillm_jax.modules.splash.splash_blocks", lambda _: blocks)
    ids, qkv = packed_ids(2, 512), inputs(2, 512)
    want = result_and_gradients(ids, *qkv, "xla")
    with pltpu.force_tpu_interpret_mode():
        got = result_and_gradients(ids, *qkv, "splash")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_on_a_mesh_equals_one_device():
    ids, qkv = packed_ids(4, 128), inputs(4, 128)
    want = result_and_gradients(ids, *qkv, "xla")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        at = NamedSharding(mesh, P(BATCH_AXES))
        got = result_and_gradients(jax.device_put(ids, at), *jax.device_put(qkv, at), "splash")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_padding_sees_something():
    """A softmax over nothing would be NaN, and NaN times the zero weight of a masked key is NaN, too."""
    ids = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 256), jnp.int32)
    qkv = inputs(1, 256)
    with pltpu.force_tpu_interpret_mode():
        context = attention(*qkv, row_attention(*ids, "splash"))
    assert jnp.isfinite(context).all()


TPU, CPU = Backend("tpu"), Backend("cpu")
V100, A100, H100, B200 = (Backend("gpu", "PJRT C API\ncuda 13000", n) for n in ((7, 0), (8, 0), (9, 0), (10, 0)))
MI300 = Backend("gpu", "PJRT C API\nrocm 70000", (9, 4))  # gfx942: its number is of another kind


@pytest.mark.parametrize(
    ("backend", "dtype", "length", "head_dim", "kernel"),
    [
        (TPU, "bfloat16", 2048, 128, "splash"),
        (TPU, "float32", 2048, 128, "xla"),  # splash would multiply in bfloat16
        (TPU, "bfloat16", 2040, 128, "xla"),
        (TPU, "bfloat16", 128, 24, "xla"),
        (A100, "bfloat16", 2048, 128, "cudnn"),
        (A100, "bfloat16", 2048, 192, "xla"),
        (A100, "bfloat16", 2048, 100, "xla"),
        (A100, "bfloat16", 2047, 128, "xla"),
        (A100, "float32", 2048, 128, "xla"),
        (H100, "bfloat16", 2048, 192, "cudnn"),
        (B200, "bfloat16", 2048, 128, "cudnn"),
        (V100, "bfloat16", 2048, 128, "xla"),
        (MI300, "bfloat16", 2048, 128, "xla"),
        (Backend("gpu"), "bfloat16", 2048, 128, "xla"),
        (CPU, "bfloat16", 2048, 128, "xla"),
    ],
)
def test_the_kernel_is_chosen_by_device_and_shape(backend, dtype, length, head_dim, kernel):
    assert choose_kernel("auto", backend, dtype, length, head_dim) == kernel
    assert choose_kernel("xla", backend, dtype, length, head_dim) == "xla"
    assert choose_kernel(kernel, backend, dtype, length, head_dim) == kernel
    for other in {"splash", "cudnn"} - {kernel}:
        with pytest.raises(UserError, match=f"^config.attention={other} cannot be used: it "):
            choose_kernel(other, backend, dtype, length, head_dim)


@pytest.mark.parametrize(
    ("wanted", "backend", "said"),
    [
        ("splash", A100, "it needs a TPU, this is a gpu; use xla or auto"),
        ("cudnn", CPU, "it needs an NVIDIA GPU, this is cpu; use xla or auto"),
        ("cudnn", MI300, "it needs an NVIDIA GPU, this is PJRT C API rocm 70000; use xla or auto"),
        ("cudnn", V100, "it needs compute capability 8.0, this GPU has 7.0; use xla or auto"),
    ],
)
def test_a_kernel_that_cannot_be_used_says_why(wanted, backend, said):
    with pytest.raises(UserError, match=f"cannot be used: {said}$"):
        choose_kernel(wanted, backend, "bfloat16", 2048, 128)


def test_a_device_tells_what_a_kernel_asks_for():
    assert backend_of(jax.devices()[0]) == CPU
    gpu = SimpleNamespace(
        platform="gpu", compute_capability="8.0", client=SimpleNamespace(platform_version=A100.version)
    )
    assert backend_of(gpu) == A100
    rocm = SimpleNamespace(
        platform="gpu", compute_capability="gfx942", client=SimpleNamespace(platform_version="rocm 7")
    )
    assert choose_kernel("auto", backend_of(rocm), "bfloat16", 2048, 128) == "xla"
