"""Checks of a machine or a pod: its devices, what they exchange, the folder that all processes share, their data."""

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import secrets

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from data_pipeline.pipeline import batches
from redvillm_jax.agreement import Failed, gather, place, same_everywhere, together
from redvillm_jax.random_data import RandomStreams, plan_random_rows
from redvillm_jax.sharding import AXES, make_mesh, to_global

PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
MARKS = 128  # values that bfloat16 holds exactly
ALL_FSDP = {"data": 1, "fsdp": -1, "tensor": 1}


def meshes() -> dict[str, jax.sharding.Mesh]:
    """Meshes of different shapes over all devices, by what they are called on a command line."""
    shapes = [{"data": -1, "fsdp": 1, "tensor": 1}, ALL_FSDP]
    if jax.device_count() % 2 == 0:
        shapes.append({"data": 1, "fsdp": -1, "tensor": 2})
    made = [make_mesh(shape) for shape in shapes]
    return {" ".join(f"{axis}={size}" for axis, size in mesh.shape.items()): mesh for mesh in made}


def check_devices() -> str:
    """All processes have the same packages, the same kind of devices, and equally many."""
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
    """Every mesh holds every device once, in the same order for all processes."""
    for name, mesh in meshes().items():
        order = [device.id for device in mesh.devices.flat]
        if sorted(order) != sorted(device.id for device in jax.devices()):
            raise Failed(f"mesh {name} holds devices {order}")
        same_everywhere(f"mesh {name} with devices", hashlib.sha256(repr(order).encode()).hexdigest()[:12])
    return "; ".join(meshes())


def check_collectives() -> str:
    """Every device gets the exact sum over all devices, and all their values in order."""
    mesh = make_mesh(ALL_FSDP)
    spread = NamedSharding(mesh, PartitionSpec(AXES))
    marks = np.arange(mesh.size) % MARKS
    # A column for each mark, so that the sums stay small enough to be exact.
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
    """Raises Failed unless each of this process's devices holds a row that is `want`."""
    for shard in result.addressable_shards:
        if not (np.asarray(shard.data[0], np.float64) == want).all():
            raise Failed(f"{name} is wrong on device {shard.device.id}")


def check_folder(workdir: epath.Path) -> str:
    """Every process can write, read, rename, list and delete below `workdir`, and sees what the others wrote."""
    folder = workdir / f"selfcheck-{gather(secrets.token_hex(4))[0]}"
    mine, count = jax.process_index(), jax.process_count()

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{mine}.tmp"
        temporary.write_text(f"{folder.name} {mine}")
        temporary.replace(folder / f"{mine}.txt")

    def read() -> None:
        listed = sorted(path.name for path in folder.iterdir())
        for process in range(count):
            if f"{process}.txt" not in listed:
                raise Failed(
                    f"{workdir} lacks what process {process} wrote: it must be one folder that all processes see"
                )
            if (folder / f"{process}.txt").read_text() != f"{folder.name} {process}":
                raise Failed(f"{folder}/{process}.txt reads back differently")
        if len(listed) != count:
            raise Failed(f"{folder} holds {', '.join(listed)}: renaming left something behind")

    def delete() -> None:
        (folder / f"{mine}.txt").unlink()
        if (folder / f"{mine}.txt").exists():
            raise Failed(f"{folder}/{mine}.txt is still there after deletion")

    try:
        for part in (write, read, delete):
            together(part)
    finally:
        with contextlib.suppress(Exception):  # what went wrong has been said
            folder.rmtree(missing_ok=True)
    return f"{workdir}: {count} process(es) wrote, read, renamed, listed and deleted"


def check_data_order() -> str:
    """All processes plan the same rows, and their slices of a step are the step."""
    plan = plan_random_rows(range(12), batch_questions=16 * jax.device_count(), num_steps=4)
    same_everywhere("a plan of rows with hash", plan.fingerprint(1)[:12])
    mesh, count = make_mesh(ALL_FSDP), jax.process_count()
    rows = -(-plan.bounds.rows_per_step // mesh.size) * mesh.size
    read = {"store": RandomStreams(2, {"spatial": (4, 8)}), "rows_per_step": rows}
    whole = next(batches(plan.steps, plan.row_fn, **read))
    mine = next(batches(plan.steps, plan.row_fn, **read, host_index=jax.process_index(), host_count=count))
    for name in whole:
        slices = gather(digest(mine[name]))
        wanted = [digest(part) for part in np.split(whole[name], count)]
        if wrong := [i for i, (a, b) in enumerate(zip(slices, wanted, strict=True)) if a != b]:
            raise Failed(f"process {wrong[0]} reads other {name} than its slice of the step")
    ids = np.asarray(multihost_utils.process_allgather(to_global(mine, mesh)["token_ids"], tiled=True))
    if sorted(map(bytes, ids)) != sorted(map(bytes, whole["token_ids"])):
        raise Failed("the rows on the devices are not the rows of the step")
    return f"{len(plan.steps)} steps of {rows} rows, hash {plan.fingerprint(1)[:12]}: the slices of all make the whole"


def digest(array: np.ndarray) -> str:
    """Identifies an array's contents."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
