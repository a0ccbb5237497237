"""Every attention kernel computes the same: XLA, and splash in interpret mode, alone and on meshes."""

import itertools
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


def packed_positions(ids: tuple[jax.Array, jax.Array]) -> jax.Array:
    """position_ids (B, S): a question goes on where the prefix of its group ends."""
    positions = np.zeros_like(ids[0])
    for row, (groups, questions) in enumerate(zip(*map(np.asarray, ids), strict=True)):
        for group in set(groups):
            prefix = (groups == group) & (questions == 0)
            for question in set(questions[groups == group]):
                own = (groups == group) & (questions == question)
                positions[row, own] = np.arange(own.sum()) + (prefix.sum() if question else 0)
    return jnp.asarray(positions)


OPTIONS = {"plain": {}, "window": {"window": 40}, "pictures": {"window": 40, "pictures": True}}


def result_and_gradients(ids, query, key, value, kernel, window=None, pictures=False):
    """Context and its gradients at the slots that hold tokens: of a full layer, then of a window layer if any."""
    real, positions = (ids[0] > 0)[:, :, None, None], packed_positions(ids)
    pictures = (ids[1] == 0) & (ids[0] > 0) & (positions > 2) if pictures else None

    def total(query, key, value):
        masks = row_attention(*ids, positions, kernel, window=window, pictures=pictures)

        def layer(context, windowed):
            return attention(query, key, context, masks.of_layer(windowed))[:, :, : key.shape[2]], None

        context, _ = jax.lax.scan(layer, value, jnp.array([False, True]))
        weights = jnp.cos(jnp.arange(context.size, dtype=jnp.float32)).reshape(context.shape)
        return (context * weights * real).sum(), context * real

    (_, context), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return context, *gradients


def inputs(rows: int, length: int, kv_heads: int = HEADS):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(k, (rows, length, h, DIM)) for k, h in zip(keys, (HEADS, kv_heads, kv_heads), strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "length", "kv_heads", "kind"),
    [(1, 256, 2, "plain"), (3, 384, 2, "window"), (2, 256, 1, "plain"), (2, 256, 2, "pictures")],
)
def test_splash_equals_xla(rows, length, kv_heads, kind):
    ids, qkv = packed_ids(rows, length), inputs(rows, length, kv_heads)
    want = result_and_gradients(ids, *qkv, "xla", **OPTIONS[kind])
    with pltpu.force_tpu_interpret_mode():
        got = result_and_gradients(ids, *qkv, "splash", **OPTIONS[kind])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_masks_options_matter():
    ids, qkv = packed_ids(2, 256), inputs(2, 256)
    contexts = [result_and_gradients(ids, *qkv, "xla", **options)[0] for options in OPTIONS.values()]
    for a, b in itertools.combinations(contexts, 2):
        assert jnp.abs(a - b).max() > 0.1


def test_a_window_counts_positions_and_a_picture_sees_itself():
    """Two groups in a row; the first has two pictures, then text, then two questions."""
    groups = jnp.array([[1] * 9 + [2] * 4 + [0]])
    questions = jnp.array([[0, 0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 3, 3, 0]])
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 5, 6, 0, 1, 2, 3, 0]])
    pictures = jnp.array([[1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]], bool)
    masks = row_attention(groups, questions, positions, window=2, pictures=pictures)
    full = """
        111...........
        111...........
        111...........
        1111..........
        11111.........
        111111........
        1111111.......
        11111..1......
        11111..11.....
        .........11...
        .........11...
        .........111..
        .........1111.
        .............1"""
    window = """
        111...........
        111...........
        .11...........
        ..11..........
        ...11.........
        ....11........
        .....11.......
        ....1..1......
        .......11.....
        .........11...
        .........11...
        ..........11..
        ...........11.
        .............1"""
    for mask, want in ((masks.full, full), (masks.window, window)):
        assert ["".join(".1"[int(x)] for x in row) for row in mask[0]] == want.split()
    assert row_attention(groups, questions, positions, window=14).window is None
    causal = row_attention(groups, questions, positions, window=2)
    assert not (causal.full & ~jnp.tri(14, dtype=bool)).any()


def test_adjacent_pictures_of_two_groups_stay_apart():
    groups, pictures = jnp.array([[1, 1, 2, 2]]), jnp.ones((1, 4), bool)
    mask = row_attention(groups, 0 * groups, jnp.array([[0, 1, 0, 1]]), pictures=pictures).full
    np.testing.assert_array_equal(mask[0], groups.T == groups)


def test_splash_equals_xla_when_several_blocks_make_a_row(monkeypatch):
    """Blocks of 128 in rows of 512: most pairs of blocks are skipped, and rows must not reach into each other."""
    small = {name: 128 for name in splash_blocks(512).__dataclass_fields__ if name.startswith("block")}
    blocks = type(splash_blocks(512))(**small)
    monkeypatch.setattr("redvillm_jax.modules.splash.splash_blocks", lambda _: blocks)
    ids, qkv = packed_ids(2, 512), inputs(2, 512)
    want = result_and_gradients(ids, *qkv, "xla", **OPTIONS["pictures"])
    with pltpu.force_tpu_interpret_mode():
        got = result_and_gradients(ids, *qkv, "splash", **OPTIONS["pictures"])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("rows", "kv_heads", "parts"), [(2, 2, 2), (1, 1, 2), (1, 1, 4)])
def test_splash_on_a_mesh_equals_one_device(rows, kv_heads, parts):
    """A tensor axis that divides the heads of queries and keys, of queries alone, of none."""
    ids, qkv = packed_ids(rows, 128), inputs(rows, 128, kv_heads)
    want = result_and_gradients(ids, *qkv, "xla", **OPTIONS["window"])
    mesh = make_mesh({"data": 1, "fsdp": rows, "tensor": parts}, jax.devices()[: rows * parts])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        at = NamedSharding(mesh, P(BATCH_AXES))
        got = result_and_gradients(jax.device_put(ids, at), *jax.device_put(qkv, at), "splash", **OPTIONS["window"])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_padding_sees_something():
    """A softmax over nothing would be NaN, and NaN times the zero weight of a masked key is NaN, too."""
    ids = jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 256), jnp.int32)
    qkv = inputs(1, 256)
    with pltpu.force_tpu_interpret_mode():
        context = attention(*qkv, row_attention(*ids, jnp.arange(256)[None], "splash").full)
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
