"""Compiles the train step and the encode step for a slice, and reads their memory and charges."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.common.files import write_text
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import load_model, shapes_of_streams
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import ModelSettings
from redvillm_jax.planning.hlo_cost import Charge, Unpriced, charges
from redvillm_jax.planning.workload import Workload, empty_row
from redvillm_jax.runtime.chips import Chip
from redvillm_jax.runtime.sharding import DATA_PARALLEL, batch_sharding, make_mesh, num_batch_shards
from redvillm_jax.runtime.xla_messages import needed_bytes, small_memory
from redvillm_jax.training.flops import kernel_flops, matrix_sizes, step_flops
from redvillm_jax.training.recipe import Recipe, make_encode_step, make_training


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: bytes per chip, and seconds by kind of charge.

    problem: "", or the reason why it does not compile (its memory is then unknown, here 0) or has no bound.
    """

    weights: float
    state: float
    temporaries: float
    peak: float
    seconds: float
    shares: Mapping[str, float]
    compile_seconds: float
    problem: str = ""

    @property
    def known(self) -> bool:
        return self.seconds > 0


def compile_train(
    recipe: Recipe, settings: ModelSettings, base: Base, mesh, chip: Chip, work: Workload, dump: Path | None
) -> Program:
    """Compiles the train step that `redvillm_jax.train` runs on stored streams."""
    model = load_model(base, settings, mesh, dtype=jnp.dtype(settings.dtype), parts=("projector", "llm"))
    sizes = {"num_steps": work.steps, "row_length": work.row_length}
    training = make_training(recipe, base, settings, model, mesh, **sizes)
    trainable, moments = training.state["trainable"], training.state["optimizer"]
    batch = abstract_batch(settings, base, mesh, work)
    heads = base.config.num_attention_heads
    kernels = kernel_flops(
        work.rows // num_batch_shards(mesh),
        work.row_length,
        heads // math.gcd(heads, mesh.shape["tensor"]),
        base.config.head_dim,
        base.config.window,
    )
    lower = training.step.lower
    return compile_program(
        lambda: lower(trainable, moments, training.frozen, batch),
        mesh,
        chip,
        kernels,
        weights=training.frozen,
        state=training.state,
        dump=dump,
    )


def compile_encode(
    settings: ModelSettings, base: Base, devices, chip: Chip, batch_size: int, dump: Path | None
) -> Program:
    """Compiles the step by which `redvillm_jax.encode` encodes `batch_size` videos on the devices of one host."""
    mesh = make_mesh(DATA_PARALLEL, devices)
    with jax.set_mesh(mesh):
        dtype = jnp.dtype(settings.dtype)
        model = load_model(base, settings, mesh, dtype=dtype, parts=("encoder",))
        step, weights = make_encode_step(model, dtype)
    side, t, at = base.config.image_size, settings.video.num_frames, batch_sharding(mesh)
    frames = jax.ShapeDtypeStruct((batch_size, t, side, side, 3), jnp.uint8, sharding=at)
    num_frames = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=at)
    return compile_program(
        lambda: step.lower(weights, frames, num_frames), mesh, chip, {}, weights=weights, state=(), dump=dump
    )


def abstract_batch(settings: ModelSettings, base: Base, mesh, work: Workload) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of rows with the streams of their videos."""
    row = empty_row(work, VideoPlaces(base, settings).most)
    shapes = {name: (x.shape, x.dtype) for name, x in row.items() if name != "videos"}
    shapes["num_frames"] = (work.groups,), jnp.int32
    for stream, shape in shapes_of_streams(base, settings).items():
        shapes[stream] = (work.groups, *shape), jnp.bfloat16
    at = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((work.rows, *s), d, sharding=at) for name, (s, d) in shapes.items()}


def compile_program(lower, mesh, chip: Chip, kernels, *, weights, state, dump: Path | None) -> Program:
    """Compiles a step for the slice and charges its instructions; a step too large has only the compiler's figures."""
    sizes = {"weights": bytes_per_chip(weights), "state": bytes_per_chip(state)}
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        unknown = {"temporaries": 0, "seconds": 0, "shares": {}, "compile_seconds": 0}
        if problem := small_memory(str(error)):
            return Program(**sizes, **unknown, peak=0, problem=f"does not compile: {problem}")
        if (needed := needed_bytes(str(error))) is None:
            raise
        return Program(**sizes, **unknown, peak=needed)
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    hlo, problem, found = compiled.as_text(), "", []
    try:
        found = charges(hlo, chip, kernels)
    except Unpriced as error:
        problem = f"no bound: {error} has no price"
    shares = {kind: sum(c.seconds for c in found if c.kind == kind) for kind in sorted({c.kind for c in found})}
    program = Program(
        **sizes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        seconds=sum(shares.values()),
        shares=shares,
        compile_seconds=seconds,
        problem=problem,
    )
    if dump is not None:
        write_dump(dump, hlo, str(memory), found, program, chip)
    return program


def bytes_per_chip(tree: Any) -> float:
    """Returns the bytes that one chip holds of a tree of arrays."""
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "sharding")]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def model_flops(base: Base, work: Workload) -> tuple[float, float]:
    """Returns the 4·N·D flops of a step, once for all slots of its rows and once for its real tokens alone."""
    matrices = matrix_sizes(nnx.eval_shape(lambda: base.module.LLM(base.config, rngs=nnx.Rngs(0))))
    return (
        step_flops(matrices, work.rows * work.row_length, work.rows * work.targets),
        step_flops(matrices, work.tokens, work.supervised),
    )


def write_dump(dump: Path, hlo: str, memory: str, found: list[Charge], program: Program, chip: Chip) -> None:
    """Writes the optimized HLO, the compiler's memory analysis, the charges, and their sums to a folder."""
    dump.mkdir(parents=True, exist_ok=True)
    write_text(dump / "optimized.hlo", hlo)
    write_text(dump / "memory.txt", memory + "\n")
    rows = [f"{c.kind},{c.name},{c.times},{c.seconds:.9f},{c.busy:.9f},{json.dumps(c.source)}" for c in found]
    write_text(dump / "charges.csv", "\n".join(["kind,instruction,times,seconds,busy_seconds,source", *rows]) + "\n")
    summary = dataclasses.asdict(program) | {"chip": dataclasses.asdict(chip)}
    write_text(dump / "summary.json", json.dumps(summary, indent=2) + "\n")
