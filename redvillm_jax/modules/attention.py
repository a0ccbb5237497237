"""Attention within packed rows, by a fused kernel if the device has one."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.layers import keep
from redvillm_jax.modules.splash import LANES, splash_attention

KERNELS = ("auto", "xla", "splash", "cudnn")  # the values of config.attention
GPUS = ("gpu", "cuda", "rocm")


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
    window: int | None = None,
) -> str:
    """Chooses the kernel for the language model's attention over rows of `row_length` slots.

    wanted: "splash" (Pallas, on TPUs), "cudnn" (on NVIDIA GPUs), "xla" (everywhere), or "auto" for the first that can
    be used. Only xla can be used when a layer sees a `window` of fewer keys than a row has. Raises UserError when the
    wanted kernel cannot be used.
    """
    narrow = "" if window is None or row_length <= window else f"layers see {window} of a row's {row_length} keys"
    obstacles = {
        "splash": splash_obstacle(backend, dtype, row_length, head_dim) or narrow,
        "cudnn": cudnn_obstacle(backend, dtype, row_length, head_dim) or narrow,
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


def row_attention(group_ids: jax.Array, question_ids: jax.Array, kernel: str) -> jax.Array | Partial:
    """Returns the `mask` argument of `layers.attention` for rows of packed questions.

    group_ids, question_ids: (B, S) int32 (see `visible`). kernel: a value of `choose_kernel`. For a fused kernel the
    result is a function of query, key, value (B, S, H, D); make it once, outside the scan over layers.
    """
    mask = visible(group_ids, question_ids)
    if kernel == "xla":
        return mask
    if kernel == "cudnn":
        return Partial(cudnn_attention, mask)
    return Partial(splash_attention, jax.lax.optimization_barrier(mask))


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


def within_window(mask: jax.Array, window: int) -> jax.Array:
    """Limits a mask (B, S, S_kv) bool to the last `window` keys of each query, the query's own key included.

    A query sees a text without gaps, in order, although its slots may have gaps, in packed rows and in caches. The
    distance between two positions is therefore the number of visible keys after a key.
    """
    from_here = jnp.cumsum(mask[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1]
    return mask & (from_here <= window)


def cudnn_attention(mask: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes attention by cuDNN's flash attention. mask: (B, S, S) bool."""
    query = keep(query, "query")
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="cudnn")
