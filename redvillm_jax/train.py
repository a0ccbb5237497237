"""Trains the projectors of a video LLM.

python -m redvillm_jax.train --config=configs/llava.py --workdir=RUN --config.base=BASE --config.data=STREAMS

BASE is a folder of conversion.from_torch; the data are frames of data_pipeline.prepare or streams of
redvillm_jax.encode. RUN gets config.json, metrics.jsonl, first_batch.txt (rows as the model reads them) and
checkpoints/. The same command continues a run that was stopped. SIGTERM saves a checkpoint first.
"""

import collections
import contextlib
import functools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from data_pipeline.common.artefacts import METRICS, RUN, read_lines, read_object
from data_pipeline.common.cli import Parser, path
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import absolute, make_folder, write_text
from data_pipeline.pipeline import batches
from data_pipeline.store import VideoStore, open_store
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.run_config import as_trained, check_continues
from redvillm_jax.model.settings import check_store, complete, model_settings, needed_parts, open_config_base
from redvillm_jax.runtime import distributed
from redvillm_jax.runtime.cli import parse
from redvillm_jax.runtime.jsonl import LineFile, LineObject, open_lines
from redvillm_jax.runtime.sharding import local_rows, make_mesh, num_batch_shards, to_global
from redvillm_jax.runtime.shared_folder import require_shared
from redvillm_jax.runtime.stopping import EXIT_CODE, deferred_sigterm
from redvillm_jax.training import checkpoint
from redvillm_jax.training.diagnose import check_steps, in_words
from redvillm_jax.training.flops import matrix_sizes
from redvillm_jax.training.optim import FROZEN, warmup_cosine
from redvillm_jax.training.recipe import make_training, recipe_of
from redvillm_jax.training.rows import plan_rows, row_settings, show_rows, supervised_tokens
from redvillm_jax.training.throughput import Speed

WRITTEN = ("config.json", "metrics.jsonl", "first_batch.txt")  # into a run directory, beside its checkpoints


def main(argv: list[str]) -> int:
    parser = Parser("python -m redvillm_jax.train", __doc__, needed=("config", "workdir"))
    parser.add_argument("--workdir", type=path, metavar="RUN", help="run directory, new or to be continued")
    flags = parse(parser, argv, complete)
    return train(flags.config, flags.workdir)


def train(config: Mapping[str, Any], workdir: Path, devices: Sequence[jax.Device] | None = None) -> int:
    """Trains to the end of the last epoch, from the newest checkpoint in `workdir` if there is one.

    Returns the exit code: 0 at the end, `stopping.EXIT_CODE` when SIGTERM came before it and all is saved.
    """
    base, store = open_inputs(config)
    settings = model_settings(config)
    mesh = make_mesh(config["mesh"], devices)
    epochs_before = open_workdir(workdir, config)
    require_shared("--workdir", workdir)

    # Rows of all epochs, from token lengths alone.
    tokenizer = base.module.Tokenizer(base.path)
    plan = plan_rows(row_settings(config), base, store, tokenizer, VideoPlaces(base, settings))
    steps, rows_per_step = plan.steps, round_up(plan.bounds.rows_per_step, num_batch_shards(mesh))

    def identity_of(config: Mapping[str, Any]) -> dict[str, str]:
        return {"base": base.fingerprint, "data": plan.fingerprint(config["num_epochs"])}

    identity = identity_of(config)
    with distributed.locked(workdir), jax.set_mesh(mesh):
        model = load_model(base, settings, mesh, dtype=jnp.dtype(config["dtype"]), parts=needed_parts(store))
        sizes = {"num_steps": len(steps), "row_length": plan.slots_per_row}
        training = make_training(recipe_of(config), base, settings, model, mesh, **sizes)

        # From the newest checkpoint, if there is one.
        start, state = checkpoint.restore(workdir, training.state, identity=identity_of)
        if start > len(steps):
            raise UserError(
                f"{workdir} has done {start} steps, config.num_epochs={config['num_epochs']} has {len(steps)}: "
                "num_epochs may grow, and shrink to what is not yet done; any checkpoint answers as it is"
            )
        checkpoints = checkpoint.open_checkpoints(workdir, keep=config["keep_checkpoints"])
        first = distributed.is_first()
        if first:
            write_config(workdir, config)
            describe(config, store, plan, rows_per_step, training.labels, state["trainable"], mesh, start)
            if start and config["num_epochs"] != epochs_before:
                print(other_epochs(config, epochs_before, len(steps), start))
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
            rows=local_rows(mesh, rows_per_step),
            num_workers=config["num_workers"],
        )

        # The loop: read, step, look, log, save.
        interval = 0.5 if sys.stderr.isatty() else 30  # a log file gets a line now and then
        options = {"unit": "step", "dynamic_ncols": True, "mininterval": interval, "disable": not first}
        last_good = functools.partial(checkpoint.newest, checkpoints)
        name_row = functools.partial(in_words, videos=store.videos, instructions=plan.instructions)
        done, unseen, stopped = start, [], False
        tokens = supervised_tokens(plan)
        recent = collections.deque(maxlen=config["log_every"])  # (loss, tokens) of the last steps
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
                    recent.extend(zip((float(x["loss"]) for x in seen), tokens[done - len(seen) : done], strict=True))
                if log and first:
                    values = {"loss": token_mean(recent), "grad_norm": float(seen[-1]["grad_norm"])}
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
    if not config["data"]:
        raise UserError(
            "config.data is not set: run python -m data_pipeline.prepare --videos=DIR --instructions=FILE "
            f"--base={config['base']} --out=FRAMES, then pass --config.data=FRAMES"
        )
    store = open_store(config["data"])
    check_store(store, base, model_settings(config))
    return base, store


def open_workdir(workdir: Path, config: Mapping[str, Any]) -> int:
    """Makes the run directory, and returns the number of epochs that the run was planned for before this command.

    Raises UserError for a run with checkpoints when a setting that decides its weights has changed.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a new folder, or the folder of the run to continue")
    make_folder(workdir)
    refuse_foreign(workdir)
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.saved_steps(workdir):
        return config["num_epochs"]
    known = as_trained(read_object(path, RUN), path)
    check_continues(workdir, known, config)
    return known.get("num_epochs", config["num_epochs"])


def refuse_foreign(workdir: Path) -> None:
    """Raises UserError for a folder, such as a base, that has files with a run's names but is no run."""
    there = [name for name in WRITTEN if (workdir / name).exists()]
    if checkpoint.saved_steps(workdir) or not there:
        return
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.keys().isdisjoint(("family", "base", "data")):
        raise UserError(
            f"--workdir={workdir}: holds {there[0]}, and its config.json is not a run's: it would be replaced; choose "
            "another folder"
        )


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json with absolute folders, so that a run can be used from anywhere."""
    folders = {key: str(absolute(config[key])) for key in ("base", "data")}
    write_text(workdir / "config.json", json.dumps({**config, **folders}, indent=2) + "\n")


def open_metrics(path: Path, last_step: int) -> LineFile | LineObject:
    """Opens metrics.jsonl for appending, without the lines of steps after `last_step`, which will run again."""
    lines = read_lines(path, METRICS, growing=True)
    return open_lines(path, [line for line in lines if line["step"] <= last_step])


def token_mean(steps: Collection[tuple[float, int]]) -> float:
    """The mean loss of some steps, each (its loss, its supervised tokens), over all their supervised tokens.

    It is the loss of one step with all their questions. The last step of an epoch may have a single question.
    """
    return sum(loss * tokens for loss, tokens in steps) / sum(tokens for _, tokens in steps)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def describe(config, store, plan, rows_per_step, labels, trainable, mesh, start) -> None:
    """Prints the plan of the training."""
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


def other_epochs(config: Mapping[str, Any], before: int, num_steps: int, start: int) -> str:
    """A line on the effect of another number of epochs on a run that continues after step `start`."""
    rate = float(warmup_cosine(config["learning_rate"], num_steps, config["warmup_ratio"])(start))
    return (
        f"note: num_epochs is {config['num_epochs']}, was {before}: from step {start + 1} on the learning rate follows "
        f"the schedule of all {num_steps} steps and starts at {rate:.3g}; the steps done keep the rates they had"
    )


if __name__ == "__main__":
    distributed.command(main, saves_when_stopped=True)
