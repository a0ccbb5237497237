"""Trains the projectors of a video LLM: python -m redvillm_jax.train --config=configs/llava.py --workdir=RUN."""

import contextlib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from data_pipeline.artefacts import METRICS, RUN, read_lines, read_object
from data_pipeline.errors import UserError
from data_pipeline.files import absolute, as_path, make_folder, write_text
from data_pipeline.pipeline import batches
from data_pipeline.store import VideoStore, open_store
from redvillm_jax import checkpoint, distributed
from redvillm_jax.assemble import load_model, make_video, token_slots
from redvillm_jax.blame import check_steps, in_words
from redvillm_jax.cli import parse
from redvillm_jax.flops import matrix_sizes
from redvillm_jax.inputs import check_store, needed_parts, open_config_base
from redvillm_jax.lines import LineFile, LineObject, open_lines
from redvillm_jax.optim import FROZEN, warmup_cosine
from redvillm_jax.recipe import make_training
from redvillm_jax.rows import plan_rows, show_rows
from redvillm_jax.sharding import make_mesh, num_batch_shards, to_global
from redvillm_jax.speed import Speed
from redvillm_jax.stopping import EXIT_CODE, deferred_sigterm
from redvillm_jax.weights import Base


def main(argv: list[str]) -> int:
    flags = parse(argv, __doc__, {"workdir": (None, "Run directory; the same command again continues it.")})
    if flags["config"] is None or not flags["workdir"]:
        raise UserError("--config and --workdir are needed, e.g. --config=configs/llava.py --workdir=runs/llava")
    return train(flags["config"], as_path(flags["workdir"]))


def train(config: Mapping[str, Any], workdir: Path, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains to the end of the last epoch, from the newest checkpoint in `workdir` if there is one.

    Returns the exit code: 0 at the end, `stopping.EXIT_CODE` when SIGTERM came before it and all is saved.
    """
    base, store = open_inputs(config)
    mesh = make_mesh(config["mesh"], devices)
    check_hosts(mesh)
    open_workdir(workdir, config)

    # Rows of all epochs, from token lengths alone.
    tokenizer = base.module.Tokenizer(base.path)
    plan = plan_rows(config, base, store, tokenizer, token_slots(base, config))
    steps, rows_per_step = plan.steps, round_up(plan.bounds.rows_per_step, num_batch_shards(mesh))
    identity = {"base": base.fingerprint, "data": plan.fingerprint}

    with jax.set_mesh(mesh):
        model = load_model(base, config, mesh, dtype=jnp.dtype(config["dtype"]), parts=needed_parts(store))
        training = make_training(config, base, model, mesh, num_steps=len(steps), row_length=plan.slots_per_row)

        # From the newest checkpoint, if there is one.
        start, state = checkpoint.restore(workdir, training.state, identity=identity)
        checkpoints = checkpoint.open_checkpoints(workdir, keep=config["keep_checkpoints"])
        first = distributed.is_first()
        if first:
            write_config(workdir, config)
            describe(config, store, plan, rows_per_step, training.labels, state["trainable"], mesh, start)
        train_step, frozen = training.step, training.frozen
        speed = Speed(matrix_sizes(model.llm), mesh)
        del model, training  # they would keep the untrained projectors alive
        metrics = open_metrics(workdir / "metrics.jsonl", start) if first else None
        learning_rate = warmup_cosine(config["learning_rate"], len(steps), config["warmup_ratio"])
        make_batches = batches(
            steps,
            plan.row_fn,
            store,
            start_step=start,
            rows_per_step=rows_per_step,
            num_workers=config["num_workers"],
            host_index=jax.process_index(),
            host_count=jax.process_count(),
        )

        # The loop: read, step, look, log, save.
        interval = 0.5 if sys.stderr.isatty() else 30  # a log file gets a line now and then
        options = {"unit": "step", "dynamic_ncols": True, "mininterval": interval, "disable": not first}
        last_good = functools.partial(checkpoint.newest, checkpoints)
        name_row = functools.partial(in_words, videos=store.videos, instructions=plan.instructions)
        done, unseen, stopped = start, [], False
        with (
            deferred_sigterm() as asked_to_stop,
            contextlib.closing(make_batches),
            contextlib.closing(metrics) if first else contextlib.nullcontext(),
            tqdm(total=len(steps), initial=start, **options) as progress,
        ):
            for batch in make_batches:
                if done == 0 and first:
                    write_text(workdir / "first_batch.txt", show_rows(tokenizer, batch, count=4))
                speed.add(steps[done], batch)
                state["trainable"], state["optimizer"], values = train_step(
                    state["trainable"], state["optimizer"], frozen, to_global(batch, mesh)
                )
                unseen.append(values)
                done += 1
                progress.update()
                stopped = asked_to_stop(done)
                log = done % config["log_every"] == 0 or done == len(steps)
                keep = done % config["checkpoint_every"] == 0 or done == len(steps) or stopped
                if log or keep:
                    seen, unseen = jax.device_get(unseen), []  # waits for the steps
                    check_steps(seen, steps, done - len(seen), base.config.vocab_size, name_row, last_good)
                if log and first:
                    values = {name: float(seen[-1][name]) for name in ("loss", "grad_norm")}
                    rates = speed.rates()
                    rate = float(learning_rate(done - 1))
                    metrics.write({"step": done, **values, "learning_rate": rate, **rates})
                    progress.set_postfix_str(
                        f"loss {values['loss']:.4f}, {rates['examples_per_second']:.1f} examples/s"
                    )
                if keep:
                    if first:
                        metrics.flush()
                    checkpoint.save(checkpoints, done, state, config=config, identity=identity)
                if stopped:
                    break
            checkpoints.close()
    if first:
        how = f"trained to step {done} of {len(steps)}, stopped by SIGTERM; run it again to go on"
        print(f"{'trained' if done == len(steps) else how}: {workdir}/{checkpoint.FOLDER}/{done}")
    return 0 if done == len(steps) else EXIT_CODE


def open_inputs(config: Mapping[str, Any]) -> tuple[Base, VideoStore]:
    """Opens the base and the store of a config and checks that they belong together."""
    base = open_config_base(config)
    make_video(config)
    if not config["data"]:
        raise UserError(
            "config.data is not set: run python -m data_pipeline.prepare --videos=DIR --instructions=FILE "
            f"--base={config['base']} --out=FRAMES, then pass --config.data=FRAMES"
        )
    store = open_store(config["data"])
    check_store(store, base, config)
    return base, store


def check_hosts(mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless every process has rows of its own to read."""
    shards, hosts = num_batch_shards(mesh), jax.process_count()
    if shards % hosts:
        raise UserError(
            f"config.mesh splits a batch into {shards} parts, {hosts} processes cannot share them: "
            "data × fsdp must be a multiple of the number of processes"
        )


def open_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the run directory; one with checkpoints may only be continued with what decides its weights."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder, new or that of the run to continue")
    make_folder(workdir)
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.saved_steps(workdir):
        return
    machine = {"mesh", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints", "base", "data"}
    known = read_object(path, RUN)
    changed = sorted(k for k in known.keys() | config if known.get(k) != config.get(k) and k not in machine)
    if changed:
        key = changed[0]
        raise UserError(
            f"{workdir} is a run with {key}={known.get(key)!r}, this command says {config.get(key)!r} "
            f"({', '.join(changed)} differ): continue with the same config, or use another --workdir"
        )


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json; its folders are absolute, so that a run can be used from anywhere."""
    folders = {key: str(absolute(config[key])) for key in ("base", "data")}
    write_text(workdir / "config.json", json.dumps({**config, **folders}, indent=2) + "\n")


def open_metrics(path: Path, last_step: int) -> LineFile | LineObject:
    """Opens metrics.jsonl for appending; lines of steps after `last_step`, which will be run again, are dropped."""
    lines = read_lines(path, METRICS, growing=True)
    return open_lines(path, [line for line in lines if line["step"] <= last_step])


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def describe(config, store, plan, rows_per_step, labels, trainable, mesh, start) -> None:
    """Prints what is about to happen."""
    count = sum(x.size for x, label in zip(*map(jax.tree.leaves, (trainable, labels)), strict=True) if label != FROZEN)
    print(
        f"{len(store.videos)} videos, {len(plan.instructions)} questions, {config['num_epochs']} epochs: "
        f"{len(plan.steps)} steps of {config['batch_questions']} questions in {rows_per_step} rows of "
        f"{plan.slots_per_row} tokens; {count:,} weights train on {mesh.size} "
        f"{mesh.devices.flat[0].platform} device(s)" + (f"; continuing after step {start}" if start else "")
    )
    if empty := rows_per_step - plan.bounds.rows_per_step:
        print(
            f"note: {empty} of {rows_per_step} rows are always empty, the mesh splits a batch into more parts than it "
            "has rows: use tensor parallelism or fewer chips, or more questions a step, no longer the paper's recipe"
        )


if __name__ == "__main__":
    distributed.command(main, saves_when_stopped=True)
