"""Checks the devices of a machine or a pod, the communication between them, and the data that they read."""

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipeline.pipeline import batches
from redvillm_jax.checks.random_data import RandomStreams, plan_random_rows
from redvillm_jax.runtime.consensus import Failed, place, same_everywhere, together
from redvillm_jax.runtime.jax_private import allgather
from redvillm_jax.runtime.sharding import AXES, local_rows, make_mesh, num_batch_shards, to_global

PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
MARKS = 128  # values that bfloat16 holds exactly
ALL_FSDP = {"data": 1, "fsdp": -1, "tensor": 1}


def meshes() -> dict[str, jax.sharding.Mesh]:
    """Makes meshes of different shapes over all devices, by name as on a command line ("data=1 fsdp=8 tensor=1")."""
    shapes = [{"data": -1, "fsdp": 1, "tensor": 1}, ALL_FSDP]
    if jax.device_count() % 2 == 0:
        shapes.append({"data": 1, "fsdp": -1, "tensor": 2})
    made = [make_mesh(shape) for shape in shapes]
    return {" ".join(f"{axis}={size}" for axis, size in mesh.shape.items()): mesh for mesh in made}


def check_devices() -> str:
    """Checks that all processes have the same packages, and the same kind and number of devices."""
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    kinds = ", ".join(sorted({f"{d.platform} {d.device_kind}" for d in jax.local_devices()}))
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    same_everywhere("packages", versions)
    same_everywhere("devices", f"{jax.local_device_count()} × {kinds}")
    where = f"{jax.process_count()} process(es), {jax.local_device_count()} each"
    return f"{jax.device_count()} device(s): {kinds}; {where}; {versions}"


def check_meshes() -> str:
    """Checks that every mesh holds every device once, in the same order in all processes."""
    for name, mesh in meshes().items():
        order = [device.id for device in mesh.devices.flat]
        if sorted(order) != sorted(device.id for device in jax.devices()):
            raise Failed(f"mesh {name} holds devices {order}")
        same_everywhere(f"mesh {name} with devices", hashlib.sha256(repr(order).encode()).hexdigest()[:12])
    return "; ".join(meshes())


def check_collectives() -> str:
    """Checks that psum gives every device the exact sum, and all-gather all values in order."""
    mesh = make_mesh(ALL_FSDP)
    spread = NamedSharding(mesh, PartitionSpec(AXES))
    marks = np.arange(mesh.size) % MARKS
    # One column per mark keeps the sums so small that they are exact.
    columns = np.eye(MARKS)[marks]

    def exchange(column: jax.Array, mark: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.psum(column, AXES), jax.lax.all_gather(mark, AXES, tiled=True)[None]

    program = jax.shard_map(exchange, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES))
    for dtype in (np.dtype("float32"), np.dtype(jax.numpy.bfloat16)):
        results = jax.jit(program)(place(columns.astype(dtype), spread), place(marks.astype(dtype), spread))
        for name, result, want in zip(("psum", "all-gather"), results, (columns.sum(0), marks), strict=True):
            together(functools.partial(check_exact, f"{name} in {dtype}", result, want))
    return f"psum and all-gather over {mesh.size} device(s), float32 and bfloat16: exact on each"


def check_exact(name: str, result: jax.Array, want: np.ndarray) -> None:
    """Raises Failed unless every device of this process holds the row `want`."""
    for shard in result.addressable_shards:
        if not (np.asarray(shard.data[0], np.float64) == want).all():
            raise Failed(f"{name} is wrong on device {shard.device.id}")


def check_data_order() -> str:
    """Checks that all processes plan the same rows, and that the rows they read form the step on every mesh."""
    plan = plan_random_rows(range(12), batch_questions=16 * jax.device_count(), num_steps=4)
    same_everywhere("a plan of rows with hash", plan.fingerprint(1)[:12])
    read = functools.partial(batches, plan.steps, plan.row_fn, RandomStreams(2, {"spatial": (4, 8)}))
    made = meshes()
    for name, mesh in made.items():
        parts = num_batch_shards(mesh)
        rows = -(-plan.bounds.rows_per_step // parts) * parts
        whole, mine = next(read(rows_per_step=rows)), local_rows(mesh, rows)
        got = next(read(rows_per_step=rows, rows=mine))
        ids = allgather(to_global(got, mesh)["token_ids"], tiled=True)
        together(functools.partial(check_rows, f"mesh {name}", whole, mine, got, ids))
    planned = f"{len(plan.steps)} steps, hash {plan.fingerprint(1)[:12]}"
    return f"{planned}: the rows that all processes read form the step on {' and on '.join(made)}"


def check_rows(
    where: str, whole: Mapping[str, np.ndarray], mine: list[int], got: Mapping[str, np.ndarray], ids: np.ndarray
) -> None:
    """Raises Failed unless this process has read its rows `mine` of a step and the devices hold all token ids."""
    for name, value in whole.items():
        if not np.array_equal(got[name], value[mine]):
            raise Failed(f"{where}: reads other {name} than its rows of the step")
    if not np.array_equal(ids, whole["token_ids"]):
        raise Failed(f"{where}: the rows on the devices are not the rows of the step")
