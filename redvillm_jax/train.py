"""Trains the projectors of a video LLM: python -m redvillm_jax.train --config=configs/llava.py --workdir=RUN."""

import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from data_pipeline.errors import UserError, run
from data_pipeline.packing import fill_row, plan_epoch, row_bounds
from data_pipeline.pipeline import batches
from data_pipeline.store import VideoStore, open_store
from redvillm_jax import checkpoint
from redvillm_jax.assemble import check_store, load_model, make_video, needed_parts, projector_options
from redvillm_jax.cli import parse
from redvillm_jax.metrics import open_metrics
from redvillm_jax.model import mean_loss
from redvillm_jax.optim import FROZEN, label_tree, make_optimizer, warmup_cosine
from redvillm_jax.rows import make_prefix, show_rows, tokenize
from redvillm_jax.sharding import make_mesh, num_batch_shards, replicated, to_global
from redvillm_jax.step import make_train_step, split_trainable
from redvillm_jax.weights import Base, abstract_part, open_base

SLOT_MULTIPLE = 8  # rows are padded to a multiple of this many slots


def main(argv: list[str]) -> None:
    flags = parse(argv, __doc__, {"workdir": "Run directory; the same command again continues it."})
    config, workdir = flags["config"], Path(flags["workdir"] or "")
    if config is None or not flags["workdir"]:
        raise UserError("--config and --workdir are needed, e.g. --config=configs/llava.py --workdir=runs/llava")
    train(config, workdir)


def train(config: dict[str, Any], workdir: Path, devices: Sequence[jax.Device] | None = None) -> None:
    """Trains to the end of the last epoch, from the newest checkpoint in `workdir` if there is one."""
    base, store = open_inputs(config)
    mesh = make_mesh(config["mesh"], devices)
    workdir.mkdir(parents=True, exist_ok=True)
    write_config(workdir, config)

    # Rows of all epochs, from token lengths alone.
    steps, row_fn, bounds, tokenizer = plan(config, base, store)
    rows_per_step = -(-bounds.rows_per_step // num_batch_shards(mesh)) * num_batch_shards(mesh)
    make_batches = functools.partial(
        batches,
        steps,
        row_fn,
        store,
        rows_per_step=rows_per_step,
        num_workers=config["num_workers"],
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )

    with jax.set_mesh(mesh):
        # The model, and which of its projectors' leaves train in which group.
        dtype = jnp.dtype(config["dtype"])
        model = load_model(base, config, mesh, dtype=dtype, parts=needed_parts(store))
        graphdef, trainable, frozen = split_trainable(model)
        labels = label_tree(trainable, group_rules(config, base))
        optimizer = make_optimizer(
            labels,
            learning_rate={k: config["learning_rate"] * v for k, v in config["learning_rate_scale"].items()},
            weight_decay=config["weight_decay"],
            total_steps=len(steps),
            warmup_ratio=config["warmup_ratio"],
            clip_norm=config["clip_norm"],
        )
        shardings = state_shardings(optimizer, trainable, mesh)
        state = {"trainable": trainable, "optimizer": jax.jit(optimizer.init, out_shardings=shardings[1])(trainable)}
        train_step = make_train_step(
            graphdef,
            functools.partial(mean_loss, dtype=dtype, remat=config["remat"]),
            optimizer,
            jax.tree.map(lambda label: label == FROZEN, labels),
            shardings,
            mesh,
        )

        # From the newest checkpoint, if there is one.
        checkpoints = checkpoint.open_checkpoints(workdir, keep=config["keep_checkpoints"])
        save = functools.partial(checkpoint.save, checkpoints, config=config, fingerprint=base.fingerprint)
        start, state = checkpoint.restore(checkpoints, state, fingerprint=base.fingerprint)
        describe(config, store, steps, rows_per_step, bounds, labels, trainable, mesh, start)
        metrics = open_metrics(workdir / "metrics.jsonl", start)
        learning_rate = warmup_cosine(config["learning_rate"], len(steps), config["warmup_ratio"])

        # The loop: read, step, log, save.
        interval = 0.5 if sys.stderr.isatty() else 30  # a log file gets a line now and then
        progress = tqdm(total=len(steps), initial=start, unit="step", dynamic_ncols=True, mininterval=interval)
        last_time, questions, tokens = time.perf_counter(), 0, 0
        for step, batch in enumerate(make_batches(start_step=start), start=start):
            if step == 0:
                (workdir / "first_batch.txt").write_text(show_rows(tokenizer, batch, count=4))
            questions += sum(len(group) for row in steps[step] for _, group in row)
            tokens += int((batch["group_ids"] > 0).sum()) * jax.process_count()
            batch = to_global(batch, mesh)
            state["trainable"], state["optimizer"], values = train_step(
                state["trainable"], state["optimizer"], frozen, batch
            )
            done = step + 1
            progress.update()
            if done % config["log_every"] == 0 or done == len(steps):
                values = {key: float(value) for key, value in values.items()}  # waits for the step
                check_finite(values, done, steps[step], store, checkpoints)
                seconds, last_time = time.perf_counter() - last_time, time.perf_counter()
                rates = {"examples_per_second": questions / seconds, "tokens_per_second": tokens / seconds}
                metrics.write(done, **values, learning_rate=float(learning_rate(step)), **rates)
                progress.set_postfix_str(f"loss {values['loss']:.4f}, {rates['examples_per_second']:.1f} examples/s")
                questions = tokens = 0
            if done % config["checkpoint_every"] == 0 or done == len(steps):
                save(done, state)
        progress.close()
        metrics.close()
        checkpoints.close()
    print(f"trained: {workdir}/{checkpoint.FOLDER}/{len(steps)}")


def open_inputs(config: Mapping[str, Any]) -> tuple[Base, VideoStore]:
    """Opens the base and the frame store of a config and checks that they belong together."""
    family = config["family"]
    if not config["base"]:
        files = {"llava": "a LLaVA and its CLIP", "qwen_vl": "Qwen/Qwen-VL-Chat"}.get(family, family)
        raise UserError(
            f"config.base is not set: download {files} (README, 'With the real weights'), run python -m "
            f"conversion.from_torch --family={family} --source=FOLDER --out=BASE, then pass --config.base=BASE"
        )
    base = open_base(config["base"])
    if base.family != family:
        raise UserError(
            f"config.base={config['base']} is a {base.family} base, this config is for {family}: "
            "use the other config file or another base"
        )
    if not config["data"]:
        raise UserError(
            "config.data is not set: run python -m data_pipeline.prepare --videos=DIR --instructions=FILE "
            f"--base={config['base']} --out=FRAMES, then pass --config.data=FRAMES"
        )
    store = open_store(config["data"])
    check_store(store, config["data"], base, config)
    return base, store


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json atomically; a run that exists may only be continued with what decides its weights."""
    path = workdir / "config.json"
    machine = {"mesh", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints", "base", "data"}
    if path.exists():
        known = json.loads(path.read_text())
        changed = sorted(k for k in known.keys() | config if known.get(k) != config.get(k) and k not in machine)
        if changed:
            key = changed[0]
            raise UserError(
                f"{workdir} is a run with {key}={known.get(key)!r}, this command says {config.get(key)!r} "
                f"({', '.join(changed)} differ): continue with the same config, or use another --workdir"
            )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, path)


def plan(config: Mapping[str, Any], base: Base, store: VideoStore) -> tuple:
    """Tokenises all questions and plans the rows of every epoch.

    Returns (steps, row_fn, bounds, tokenizer): steps of all epochs; row_fn(row) -> arrays; the static sizes.
    """
    tokenizer = base.module.Tokenizer(base.path)
    instructions = store.instructions
    if not instructions:
        raise UserError(f"config.data={config['data']} has no questions; prepare it with --instructions=FILE")
    before, questions = tokenize(base.module, tokenizer, base.config, instructions, labels=config["labels"])
    video, side = make_video(config), round(base.config.num_patches**0.5)
    projector = abstract_part(base.module, "projector", base.config, **projector_options(base.module, config))
    slots = functools.partial(video.token_slots, projector, (side, side), config["num_frames"])
    by_frames = {n: make_prefix(before, slots(n)) for n in {v["num_frames"] for v in store.videos}}
    prefixes = [by_frames[v["num_frames"]] for v in store.videos]
    index = {v["video"]: i for i, v in enumerate(store.videos)}
    videos = np.array([index[row["video"]] for row in instructions])
    prefix_lengths = np.array([len(p.ids) for p in prefixes])
    lengths = np.array([len(q.ids) for q in questions])
    longest = int((prefix_lengths[videos] + lengths).max())
    if longest > base.config.max_position_embeddings:
        raise UserError(
            f"the longest question takes {longest} tokens with its video, the base knows "
            f"{base.config.max_position_embeddings} positions: use fewer frames or spatial_pool=2, or drop it"
        )
    row_length = config["row_length"] or (max(longest, 2048) if config["pack"] else longest)
    steps = []
    for epoch in range(config["num_epochs"]):
        steps += plan_epoch(
            videos,
            prefix_lengths,
            lengths,
            row_length=row_length,
            batch_questions=config["batch_questions"],
            pack=config["pack"],
            seed=config["seed"],
            epoch=epoch,
        )
    bounds = row_bounds(steps, prefixes, questions)
    row_fn = functools.partial(
        fill_row,
        prefixes=prefixes,
        questions=questions,
        row_length=-(-bounds.slots_per_row // SLOT_MULTIPLE) * SLOT_MULTIPLE,
        max_groups=bounds.groups_per_row,
        max_targets=bounds.targets_per_row,
        tokens_per_video=len(slots(config["num_frames"])),
    )
    return steps, row_fn, bounds, tokenizer


def group_rules(config: Mapping[str, Any], base: Base) -> list[tuple[str, str]]:
    """Which trainable leaf belongs to which optimizer group; the first match counts."""
    fixed = base.module.frozen_projector(**projector_options(base.module, config))
    return [
        *((rf"(spatial|temporal)\.{pattern}", FROZEN) for pattern in fixed),
        (r"spatial\.", "spatial" if config["train_spatial"] else FROZEN),
        (r"temporal\.", "temporal"),
        (r"extra_mlp_", "extra_mlp"),
    ]


def state_shardings(optimizer: optax.GradientTransformation, trainable: Any, mesh: jax.sharding.Mesh) -> tuple:
    """Shardings of (trainable, optimizer state): moments lie like their weights, counters everywhere."""
    weights = jax.tree.map(lambda x: x.sharding, trainable)

    def masked(leaf: Any) -> bool:  # what another group's part of the state has instead
        return isinstance(leaf, optax.MaskedNode)

    return weights, optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        jax.eval_shape(optimizer.init, trainable),
        weights,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=masked,
    )


def check_finite(values: Mapping[str, float], step: int, rows: tuple, store: VideoStore, checkpoints) -> None:
    """Stops a run whose loss or gradient is not a number, naming the step, its videos and the last checkpoint."""
    if np.isfinite(list(values.values())).all():
        return
    videos = sorted({store.videos[video]["video"] for row in rows for video, _ in row})
    checkpoints.wait()
    last = checkpoints.latest.step if checkpoints.latest else "none"
    raise UserError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; videos of this step: "
        f"{', '.join(videos[:8])}; last good checkpoint: {last}. Lower the learning rate or look at these videos"
    )


def describe(config, store, steps, rows_per_step, bounds, labels, trainable, mesh, start) -> None:
    """Prints what is about to happen."""
    count = sum(x.size for x, label in zip(*map(jax.tree.leaves, (trainable, labels)), strict=True) if label != FROZEN)
    print(
        f"{len(store.videos)} videos, {len(store.instructions)} questions, {config['num_epochs']} epochs: "
        f"{len(steps)} steps of {config['batch_questions']} questions in {rows_per_step} rows of "
        f"{bounds.slots_per_row} tokens; {count:,} weights train on {mesh.size} "
        f"{mesh.devices.flat[0].platform} device(s)" + (f"; continuing after step {start}" if start else "")
    )


if __name__ == "__main__":
    run(main)
