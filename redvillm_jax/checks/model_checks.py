"""Compares the devices' results with one CPU device of the same process; checks saving and restoring."""

import contextlib
import functools
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_pipeline.pipeline import batches
from redvillm_jax.bases.contract import known_families
from redvillm_jax.checks.machine_checks import ALL_FSDP, meshes
from redvillm_jax.checks.random_data import RandomStreams, plan_random_rows, random_base
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import load_model, shapes_of_streams
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import complete, model_settings
from redvillm_jax.modules.attention import backend_of, choose_kernel, row_attention
from redvillm_jax.modules.layers import attention
from redvillm_jax.runtime.cli import read_config
from redvillm_jax.runtime.consensus import Failed, gather, place, together
from redvillm_jax.runtime.sharding import batch_sharding, local_rows, make_mesh, num_batch_shards, to_global
from redvillm_jax.training import checkpoint
from redvillm_jax.training.recipe import Training, make_encode_step, make_training, recipe_of
from redvillm_jax.training.rows import RowPlan

CONFIG = Path(__file__).parents[2] / "configs" / "demo.py"
# The largest `difference`, by the dtype of the devices; the reference computes in float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
LOSS_TOLERANCE = 1e-4  # relative
MOVED_TOLERANCE = 0.05  # |a - b| of the trained weights, relative to the distance that they moved
STEPS = 3
DISTINCT_ROWS, SLOTS, HEADS, HEAD_DIM, WINDOW = 4, 256, 2, 128, 48
NUM_FRAMES = 4


def cpu() -> jax.Device:
    """Returns this process's first CPU device. Raises Failed when JAX may not use the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise Failed("no CPU device to compare with: unset JAX_PLATFORMS, or add cpu to it") from None


def compute_dtype() -> str:
    """Returns the dtype to check: bfloat16, or float32 on the CPU."""
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def difference(got: jax.Array, want: np.ndarray) -> float:
    """Returns the largest |a - b| of a token, relative to its |b| or the root mean square of all |b| if larger.

    got, want: (B, tokens, …). Compares the part on this process's devices, token by token, because a mean over all
    tokens would hide one wrong token.
    """

    def norms(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x.astype(np.float64).reshape(*x.shape[:2], -1), axis=-1)

    scale = np.maximum(norms(want), np.sqrt(np.square(norms(want)).mean()))
    parts = [
        norms(np.asarray(shard.data) - want[shard.index]) / scale[shard.index[:2]] for shard in got.addressable_shards
    ]
    return float(np.max([part.max() for part in parts]))  # numpy's max, unlike Python's, returns NaN if there is one


def check_near(what: str, differences: Mapping[str, float], limit: float) -> str:
    """Returns the largest difference as text. Raises Failed for a difference above the limit, or NaN."""
    for name, value in differences.items():
        if not value <= limit:
            raise Failed(f"{what}: {name} is off by {value:.1e}, allowed {limit:.0e}")
    return f"{max(differences.values()):.1e}"


def check_attention() -> str:
    """Checks values and gradients of the devices' attention kernel on packed rows, one row on each device.

    The kernel serves a full layer and a window layer, which see the videos in both directions.
    """
    mesh, dtype = make_mesh(ALL_FSDP), jnp.dtype(compute_dtype())
    kernel = choose_kernel("auto", backend_of(jax.devices()[0]), dtype, SLOTS, HEAD_DIM)
    rng = np.random.default_rng(0)
    ids, questions = np.zeros((2, DISTINCT_ROWS, SLOTS), np.int32)
    ids[:, :100], ids[:, 100:240] = 1, 2  # two videos, and padding
    for row in range(DISTINCT_ROWS):
        for number, start in enumerate(range(40 + row, 240, 25), start=1):
            questions[row, start : start + 25] = number
    questions[:, 100:140] = 0
    rows_of = ids, questions, (questions == 0) & (ids > 0)
    qkv = [rng.standard_normal((DISTINCT_ROWS, SLOTS, HEADS, HEAD_DIM)).astype(dtype) for _ in range(3)]

    def value_and_gradients(ids, questions, pictures, query, key, value, kernel):
        real = (ids > 0)[:, :, None, None]
        positions = jnp.broadcast_to(jnp.arange(SLOTS), ids.shape)
        masks = row_attention(ids, questions, positions, kernel, window=WINDOW, pictures=pictures)

        def total(query, key, value):
            layers = [attention(query, key, value, masks.of_layer(windowed)) for windowed in (False, True)]
            context = jnp.concatenate(layers, axis=-1) * real
            weights = jnp.cos(jnp.arange(context[0].size)).reshape(context.shape[1:])
            return (context * weights).sum(dtype=jnp.float32), context

        (_, context), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return context, *gradients

    compute = jax.jit(value_and_gradients, static_argnames="kernel")
    with jax.default_device(cpu()):
        want = [np.asarray(x) for x in compute(*rows_of, *(x.astype(np.float32) for x in qkv), kernel="xla")]
    rows = np.arange(mesh.size) % DISTINCT_ROWS
    with jax.set_mesh(mesh):
        got = compute(*(place(x[rows], batch_sharding(mesh)) for x in (*rows_of, *qkv)), kernel=kernel)
    names = ("the context", "the query's gradient", "the key's gradient", "the value's gradient")
    differences = {name: difference(a, b[rows]) for name, a, b in zip(names, got, want, strict=True)}
    limit = TOLERANCE[dtype.name]
    largest = check_near(f"kernel {kernel} in {dtype}", differences, limit)
    return f"kernel {kernel} in {dtype} within {largest} of xla in float32 on the CPU (allowed {limit:.0e})"


@contextlib.contextmanager
def tiny_base(family: str) -> Iterator[tuple[Base, dict[str, Any]]]:
    """Makes a tiny base with random weights in a temporary folder, and the demo's config for it."""
    config = read_config(f"{CONFIG}:{family}", complete=complete)
    with tempfile.TemporaryDirectory() as folder:
        with jax.default_device(cpu()):  # the CPU, so that no random tensor is compiled for the devices
            base = random_base(family, Path(folder))
        yield base, config | {"num_frames": NUM_FRAMES}


def check_encoder() -> str:
    """Checks the encode step, with one video on each device."""
    mesh, dtype = make_mesh(ALL_FSDP), compute_dtype()
    limit, largest = TOLERANCE[dtype], {}
    for family in known_families():
        with tiny_base(family) as (base, config):
            side = base.config.image_size
            frames = np.random.default_rng(0).integers(0, 256, (DISTINCT_ROWS, NUM_FRAMES, side, side, 3), np.uint8)
            rows = np.arange(mesh.size) % DISTINCT_ROWS
            want = encode(base, config, make_mesh(ALL_FSDP, [cpu()]), "float32", frames)
            got = encode(base, config, mesh, dtype, frames[rows])
            differences = {name: difference(got[name], np.asarray(want[name])[rows]) for name in want}
            # `together`, here and below: a process that failed alone would be missing in the next exchange.
            largest[family] = together(functools.partial(check_near, f"{family} in {dtype}", differences, limit))
    said = ", ".join(f"{family} {value}" for family, value in largest.items())
    return f"tiny encoders in {dtype} against float32 on the CPU: {said} (allowed {limit:.0e})"


def encode(base: Base, config, mesh: Mesh, dtype: str, frames: np.ndarray) -> dict[str, jax.Array]:
    """Encodes videos (B, T, H, W, 3) uint8 to pooled streams by name."""
    with jax.set_mesh(mesh):
        step, weights = make_encode_step(
            load_model(base, model_settings(config), mesh, dtype=dtype, parts=("encoder",)), dtype
        )
        num_frames = np.full(len(frames), NUM_FRAMES, np.int32)
        return step(weights, *(place(x, batch_sharding(mesh)) for x in (frames, num_frames)))


def begin(base: Base, config: Mapping[str, Any], mesh: Mesh) -> tuple[Training, RowPlan]:
    """Makes the training of a tiny base from streams, and its rows."""
    settings = model_settings(config)
    plan = plan_random_rows(
        VideoPlaces(base, settings).slots(NUM_FRAMES), batch_questions=6 * jax.device_count(), num_steps=STEPS
    )
    with jax.set_mesh(mesh):
        model = load_model(base, settings, mesh, dtype=jnp.float32, parts=("projector", "llm"))
        sizes = {"num_steps": STEPS, "row_length": plan.slots_per_row}
        return make_training(recipe_of(config), base, settings, model, mesh, **sizes), plan


def random_videos(base: Base, config: Mapping[str, Any]) -> RandomStreams:
    """Makes random streams in the shapes of a base's videos."""
    return RandomStreams(NUM_FRAMES, shapes_of_streams(base, model_settings(config)))


def train(training: Training, plan: RowPlan, videos: RandomStreams, mesh: Mesh) -> tuple[list[float], Any]:
    """Trains STEPS steps; returns their losses and the trained weights."""
    shards = num_batch_shards(make_mesh(ALL_FSDP))
    rows = -(-plan.bounds.rows_per_step // shards) * shards
    read = {"store": videos, "rows_per_step": rows, "rows": local_rows(mesh, rows)}
    trainable, moments, losses = training.state["trainable"], training.state["optimizer"], []
    with jax.set_mesh(mesh):
        for batch in batches(plan.steps[:STEPS], plan.row_fn, **read):
            trainable, moments, values = training.step(trainable, moments, training.frozen, to_global(batch, mesh))
            losses.append(float(values["loss"]))
    return losses, trainable


def check_training() -> str:
    """Compares a few train steps on all devices with one CPU device, both in float32."""
    mesh, alone, said = make_mesh(ALL_FSDP), make_mesh(ALL_FSDP, [cpu()]), []
    for family in known_families():
        with tiny_base(family) as (base, config):
            videos = random_videos(base, config)
            training, plan = begin(base, config, alone)
            start = jax.tree.map(
                np.array, training.state["trainable"]
            )  # copies, because the step donates its arguments
            want_losses, want = train(training, plan, videos, alone)
            losses, got = train(*begin(base, config, mesh), videos, mesh)
        compare = functools.partial(compare_training, (want_losses, want), (losses, got), start)
        said.append(f"{family} {together(functools.partial(compare, family))}")
    limits = f"allowed {LOSS_TOLERANCE:.0e}, and {MOVED_TOLERANCE:.0e} of the distance that the weights moved"
    return f"{STEPS} steps in float32 against one CPU device: {'; '.join(said)} ({limits})"


def compare_training(wanted: tuple, found: tuple, start: Any, family: str) -> str:
    """Raises Failed unless losses and weights are near the wanted ones; weights relative to the distance they moved."""
    off = float(np.max([abs(a - b) / b for a, b in zip(found[0], wanted[0], strict=True)]))
    loss = check_near(f"{family} in float32", {"the loss": off}, LOSS_TOLERANCE)
    apart = moved = 0.0
    for got, want, origin in zip(*map(jax.tree.leaves, (found[1], wanted[1], start)), strict=True):
        for shard in got.addressable_shards:
            part = np.asarray(want)[shard.index]
            apart += float(np.square(np.asarray(shard.data) - part).sum())
            moved += float(np.square(part - origin[shard.index]).sum())
    weights = check_near(f"{family} in float32", {"the trained weights": (apart / moved) ** 0.5}, MOVED_TOLERANCE)
    return f"loss {loss}, weights {weights}"


def check_checkpoints(workdir: epath.Path) -> str:
    """Checks that a state saved below `workdir` is restored bit for bit, on its own mesh and on others."""
    run = workdir / f"selfcheck-{gather(secrets.token_hex(4))[0]}"
    made, family = meshes(), known_families()[0]
    rng = np.random.default_rng(0)
    with tiny_base(family) as (base, config):
        states = {name: begin(base, config, mesh)[0].state for name, mesh in made.items()}
    saved_on, state = next(iter(states.items()))
    values = jax.tree.map(lambda x: (100 * rng.standard_normal(x.shape)).astype(x.dtype), state)
    state = jax.tree.map(lambda value, x: place(value, x.sharding), values, state)
    try:
        for name, got in save_and_restore(str(run), state, states).items():
            for value, leaf in zip(jax.tree.leaves(values), jax.tree.leaves(got), strict=True):
                if not all(np.array_equal(shard.data, value[shard.index]) for shard in leaf.addressable_shards):
                    raise Failed(f"saved on {saved_on}, restored on {name}: not the same bits")
    finally:
        together(lambda: None)
        with contextlib.suppress(Exception):  # the failure itself is reported already
            run.rmtree(missing_ok=True)
    size = sum(value.nbytes for value in jax.tree.leaves(values))
    return f"{size / 2**20:.1f} MiB saved on {saved_on}; the same bits on {' and on '.join(made)}"


def save_and_restore(run: str, state: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Saves a training state in `run`; restores it with the shardings of each state in `wanted`, by name."""
    identity = {"base": "random", "data": "random"}
    checkpoints = checkpoint.open_checkpoints(run, keep=1)
    checkpoint.save(checkpoints, 1, state, config={}, identity=identity)
    checkpoints.close()
    return {name: checkpoint.restore(run, at, identity=lambda _: identity)[1] for name, at in wanted.items()}
