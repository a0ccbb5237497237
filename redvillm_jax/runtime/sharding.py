"""Makes the device mesh, and shards arrays over it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.layers import BATCH_AXES
from redvillm_jax.runtime.jax_private import order_devices

AXES = ("data", "fsdp", "tensor")
DATA_PARALLEL = {"data": -1, "fsdp": 1, "tensor": 1}  # all weights on every device


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a ("data", "fsdp", "tensor") mesh over the devices; one size may be -1 for the rest of the devices.

    Raises UserError when the sizes do not multiply to the number of devices, and for TPUs of several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) == 1:
        rest = -int(np.prod(shape))
        shape[shape.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"mesh ({wanted}) does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}, "
            "and one of them may be -1 for the rest"
        )
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise UserError(f"the devices belong to {len(slices)} TPU slices, expected one: start a run on each alone")
    return Mesh(order_devices(shape, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def weight_sharding(
    mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]]
) -> Callable[[str, tuple[int, ...], bool], NamedSharding]:
    """Returns place(name, shape, stacked), the sharding of a weight by the first rule whose regex is found in its name.

    stacked: the leaf has a leading layer axis, which is never split. A dimension that an axis does not divide is not
    split by it. place raises ValueError for a name without a rule.
    """

    def place(name: str, shape: tuple[int, ...], stacked: bool) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise ValueError(f"no sharding rule matches the weight {name!r}")
        spec = (None,) * stacked + tuple(spec)
        fits = [axis if size % extent(mesh, axis) == 0 else None for axis, size in zip(spec, shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return place


def extent(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts into which an entry of a PartitionSpec splits a dimension."""
    axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return int(np.prod([mesh.shape[name] for name in axes]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return extent(mesh, BATCH_AXES)


def local_rows(mesh: Mesh, num_rows: int, devices: Iterable[jax.Device] | None = None) -> list[int]:
    """Returns the rows of a batch that lie on some devices, by default on this process's, in ascending order.

    The rows need not be adjacent, and processes may have different numbers of rows. If the tensor axis crosses hosts,
    several processes have the same rows.
    """
    held = batch_sharding(mesh).devices_indices_map((num_rows,))
    devices = mesh.local_devices if devices is None else devices
    return sorted({row for device in devices for row in range(num_rows)[held[device][0]]})


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes the arrays of a batch, sharded over the devices of all processes, from this process's `local_rows`."""
    sharding, parts = batch_sharding(mesh), num_batch_shards(mesh)
    local_parts = local_rows(mesh, parts)  # with one row in each part

    def spread(rows: np.ndarray) -> jax.Array:
        size, rest = divmod(len(rows), len(local_parts))
        if rest:
            raise ValueError(f"{len(rows)} rows do not divide into this process's {len(local_parts)} parts of a batch")

        def rows_of(index: tuple[slice, ...]) -> np.ndarray:
            first = local_parts.index(index[0].indices(size * parts)[0] // size) * size
            return rows[first : first + size]

        return jax.make_array_from_callback((size * parts, *rows.shape[1:]), sharding, rows_of)

    return {name: spread(rows) for name, rows in batch.items()}
