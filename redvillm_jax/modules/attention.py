"""Attention within packed rows, by a fused kernel if the device has one."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.layers import keep
from redvillm_jax.modules.splash import LANES, splash_attention, splash_masks

KERNELS = ("auto", "xla", "splash", "cudnn")  # the values of config.attention
GPUS = ("gpu", "cuda", "rocm")


class Masks(NamedTuple):
    """What the layers of a decoder see, by their kind: the `mask` argument of `layers.attention`.

    full: of layers that see all keys before a query. window: of layers that see the last positions alone; None: the
    window holds all keys, or there are no such layers. Each is (B, S, S_kv) bool, True = visible, or a fused kernel
    with its own mask, a function of query, key, value (B, S, H, D).
    """

    full: jax.Array | Partial
    window: jax.Array | Partial | None = None

    def of_layer(self, windowed: bool | jax.Array) -> jax.Array | Partial:
        """Returns the mask of one layer. windowed: () bool, whether it is a window layer; it may be traced."""
        if self.window is None:
            return self.full
        if isinstance(windowed, bool):
            return self.window if windowed else self.full
        return jax.tree.map(lambda near, far: jnp.where(windowed, near, far), self.window, self.full)


@dataclasses.dataclass(frozen=True)
class Backend:
    """The properties of a device that decide its kernel.

    platform: jax's name of it. version: of the platform below jax; it tells CUDA from ROCm. capability: of an NVIDIA
    GPU, (8, 0) for an A100.
    """

    platform: str
    version: str = ""
    capability: tuple[int, ...] = ()


def backend_of(device: Any) -> Backend:
    """Returns the backend of a device, real or compile-only."""
    if device.platform not in GPUS:
        return Backend(device.platform)
    capability = re.findall(r"\d+", str(getattr(device, "compute_capability", "")))
    return Backend(device.platform, device.client.platform_version, tuple(map(int, capability)))


def choose_kernel(
    wanted: str,
    backend: Backend,
    dtype: jax.typing.DTypeLike,
    row_length: int,
    head_dim: int,
) -> str:
    """Chooses the kernel for the language model's attention over rows of `row_length` slots.

    wanted: "splash" (Pallas, on TPUs), "cudnn" (on NVIDIA GPUs), "xla" (everywhere), or "auto" for the first that can
    be used. Raises UserError when the wanted kernel cannot be used.
    """
    obstacles = {
        "splash": splash_obstacle(backend, dtype, row_length, head_dim),
        "cudnn": cudnn_obstacle(backend, dtype, row_length, head_dim),
        "xla": "",
    }
    if wanted == "auto":
        return next(kernel for kernel, obstacle in obstacles.items() if not obstacle)
    if obstacles[wanted]:
        raise UserError(f"config.attention={wanted} cannot be used: {obstacles[wanted]}; use xla or auto")
    return wanted


def splash_obstacle(backend: Backend, dtype: jax.typing.DTypeLike, row_length: int, head_dim: int) -> str:
    """Returns the reason why splash attention cannot be used, or ""."""
    if backend.platform != "tpu":
        return f"it needs a TPU, this is a {backend.platform}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it multiplies in bfloat16, config.dtype is {jnp.dtype(dtype)}"
    if row_length % LANES or head_dim % LANES:
        return f"it needs rows and heads in multiples of {LANES}, these are {row_length} and {head_dim}"
    return ""


def cudnn_obstacle(backend: Backend, dtype: jax.typing.DTypeLike, row_length: int, head_dim: int) -> str:
    """Returns the reason why cuDNN's flash attention cannot be used, or ""; the conditions are jax's own."""
    if backend.platform not in GPUS or "cuda" not in backend.version:
        name = backend.platform if backend.platform not in GPUS else backend.version or backend.platform
        return f"it needs an NVIDIA GPU, this is {' '.join(name.split())}"
    if backend.capability < (8, 0):
        return f"it needs compute capability 8.0, this GPU has {'.'.join(map(str, backend.capability)) or 'none'}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it needs bfloat16, config.dtype is {jnp.dtype(dtype)}"
    most = 256 if backend.capability >= (9, 0) else 128
    if head_dim % 8 or head_dim > most or row_length % 2:
        return (
            f"it needs rows of an even length and heads of a multiple of 8, at most {most}, these are "
            f"{row_length} and {head_dim}"
        )
    return ""


def row_attention(
    group_ids: jax.Array,
    question_ids: jax.Array,
    position_ids: jax.Array,
    kernel: str = "xla",
    *,
    window: int | None = None,
    pictures: jax.Array | None = None,
) -> Masks:
    """Returns the masks of rows of packed questions.

    group_ids, question_ids: (B, S) int32 (see `visible`); position_ids: (B, S) int32. kernel: a value of
    `choose_kernel`. window: of the window layers, if there are any. pictures: (B, S) bool, the visual tokens of a model
    whose pictures see themselves in both directions. Make the masks once, outside the scan over layers.
    """
    mask = visible(group_ids, question_ids)
    if pictures is not None:
        mask |= same_picture(pictures, group_ids)
    masks = window_masks(mask, position_ids, position_ids, window)
    return jax.tree.map(KERNEL_MASKS[kernel], masks)


def window_masks(mask: jax.Array, query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> Masks:
    """Returns `mask` (B, S, S_kv) bool for full layers, and its part within the window for window layers.

    query_positions: (B, S) int32; key_positions: (B, S_kv) int32. A window layer sees `window` positions up to the
    query's own, and no earlier ones; slots may have gaps, in packed rows and in caches, positions have none.
    """
    if window is None or mask.shape[-1] <= window:
        return Masks(mask, None)
    return Masks(mask, mask & (query_positions[:, :, None] - key_positions[:, None] < window))


def visible(group_ids: jax.Array, question_ids: jax.Array) -> jax.Array:
    """Returns the attention mask of rows with several groups, each a shared video prefix with its questions.

    group_ids: (B, S) int32, 0 = padding; question_ids: (B, S) int32, 0 = prefix. Returns (B, S, S) bool: a token
    sees itself and the earlier tokens of its own group that belong to the prefix or to its own question; padding
    sees padding, so that no softmax is empty.
    """
    slots = jnp.arange(group_ids.shape[1])
    causal = slots[:, None] >= slots[None, :]
    same_group = group_ids[:, :, None] == group_ids[:, None, :]
    reachable = (question_ids[:, None, :] == 0) | (question_ids[:, :, None] == question_ids[:, None, :])
    return causal & same_group & reachable


def same_picture(pictures: jax.Array, group_ids: jax.Array) -> jax.Array:
    """Returns (B, S, S) bool: whether two slots belong to one run of adjacent visual tokens of one group.

    Such a run is one picture, as transformers' Gemma 3 reads it from its token types. pictures: (B, S) bool, True for
    visual tokens; group_ids: (B, S) int32.
    """
    before = jnp.pad(pictures[:, :-1], ((0, 0), (1, 0))) & (group_ids == jnp.roll(group_ids, 1, axis=1))
    run = jnp.cumsum(pictures & ~before, axis=1)
    return (run[:, :, None] == run[:, None, :]) & pictures[:, :, None] & pictures[:, None, :]


def cudnn_attention(mask: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes attention by cuDNN's flash attention. mask: (B, S, S) bool."""
    query = keep(query, "query")
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="cudnn")


KERNEL_MASKS = {  # kernel -> a mask (B, S, S) bool in the form that `layers.attention` takes
    "xla": lambda mask: mask,
    "cudnn": lambda mask: Partial(cudnn_attention, mask),
    "splash": lambda mask: Partial(splash_attention, jax.lax.optimization_barrier(splash_masks(mask))),
}
