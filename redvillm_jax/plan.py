"""Tells before renting whether a training fits a TPU slice, how long it takes, and what limits its speed.

python -m redvillm_jax.plan --config=configs/llava.py --topology=v5e-16 [--rows-per-chip=1] [--dump=DIR]
python -m redvillm_jax.plan --config=configs/llava.py --all --dump=DIR

Compiles the real train step, and the step that encodes videos, for the slice with libtpu (pip install -e '.[tpu]'). The
machine needs no TPU. The model is a base's real size without weights (--size), or the base in --config.base. The rows
have VideoInstruct's lengths, or the lengths in --config.data. Times are lower bounds: input, logging and a shared
network can only make a run slower. Use --all to compare all slices, each kind of chip with its best known settings.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.common.cli import Parser, path, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.tables import table_row
from data_pipeline.store import open_store
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import Base, open_base, sized_base
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import check_base, check_config, check_store, complete, model_settings
from redvillm_jax.modules.layers import KEPT
from redvillm_jax.planning.programs import Program, compile_encode, compile_train, model_flops
from redvillm_jax.planning.workload import QUESTIONS, VIDEOS, Workload, fill_rows, measure, paper_lengths
from redvillm_jax.runtime.chips import NAMES, Chip, parse_topology, quiet_without_tpu, tpu_devices
from redvillm_jax.runtime.cli import parse
from redvillm_jax.runtime.sharding import make_mesh, num_batch_shards
from redvillm_jax.training.recipe import recipe_of
from redvillm_jax.training.rows import plan_rows, row_settings

PAPER_BATCH = 32
LONG = ",".join(KEPT)
SHORT = LONG.removesuffix(",up")
BEST = {  # options that fit and have the highest bound (docs/performance.md); v5e and v6e were not compared
    "v4": {"remat": LONG, "int8": True, "mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "rows_per_chip": 3},
    "v5e": {"remat": SHORT, "int8": True, "mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "rows_per_chip": 1},
    "v5p": {"remat": LONG, "int8": False, "mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "rows_per_chip": 2},
    "v6e": {"remat": LONG, "int8": False, "mesh": {"data": -1, "fsdp": 1, "tensor": 1}, "rows_per_chip": 2},
}


def main(argv: list[str]) -> None:
    parser = Parser("python -m redvillm_jax.plan", __doc__, needed=("config",), arguments="(--topology=SLICE | --all)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--topology", metavar="SLICE", help=f"the slice: {NAMES[0]} … {NAMES[-1]}")
    which.add_argument("--all", action="store_true", help="compare all slices")
    parser.add_argument(
        "--size", metavar="NAME", help="named size of the family, such as v1-7b (its first), instead of --config.base"
    )
    parser.add_argument(
        "--rows_per_chip",
        type=whole(),
        default=1,
        metavar="N",
        help="rows of a step on each chip, in the second line (%(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=whole(),
        default=8,
        metavar="N",
        help="videos that a host encodes at once, as in encode (%(default)s)",
    )
    parser.add_argument(
        "--dump", type=path, metavar="DIR", help="folder for the HLO, the memory analysis and the arithmetic"
    )
    flags = parse(parser, argv, complete)
    config = flags.config
    check_config(config)
    quiet_without_tpu()
    base, lengths, total = open_workload(config, flags.size)
    videos = int(lengths[0].max()) + 1 if config["data"] else VIDEOS
    if flags.all:
        compare(config, base, lengths, total, videos, flags.batch_size, flags.dump)
        return
    rows_per_chip, batch_size = flags.rows_per_chip, flags.batch_size
    plan_one(config, base, flags.topology, lengths, total, videos, rows_per_chip, batch_size, flags.dump)


def open_workload(config: Mapping[str, Any], size: str | None) -> tuple[Base, tuple, int]:
    """The base, the questions' lengths and how many questions an epoch has."""
    family, settings = config["family"], model_settings(config)
    if config["base"] and not size:
        base = check_base(open_base(config["base"]), settings)
    else:
        base = check_base(sized_base(family, size or next(iter(load_family(family).SIZES))), settings)
    places = VideoPlaces(base, settings)
    if not config["data"]:
        return shapes_only(base), paper_lengths(places.most), QUESTIONS
    if base.path is None:
        raise UserError("--config.data needs --config.base, whose tokenizer counts its questions")
    store = open_store(config["data"])
    check_store(store, base, settings)
    plan = plan_rows(row_settings(config), base, store, base.module.Tokenizer(base.path), places)
    index = {video["video"]: i for i, video in enumerate(store.videos)}
    videos = np.array([index[instruction["video"]] for instruction in plan.instructions])
    return shapes_only(base), (videos, plan.prefixes, plan.questions), len(plan.questions)


def shapes_only(base: Base) -> Base:
    """The base without its folder, so that its models have shapes instead of arrays."""
    return dataclasses.replace(base, path=None, tensors=None, published={})


def plan_one(config, base, topology, lengths, total, videos, rows_per_chip, batch_size, dump) -> None:
    """Prints the plan of one slice."""
    chip, grid = parse_topology(topology)
    devices = tpu_devices(topology)
    mesh = make_mesh(config["mesh"], devices)
    shards, chips = num_batch_shards(mesh), len(devices)
    name = config["family"]
    print(f"{name} on {topology}: {chips} {chip.kind} chips ({'×'.join(map(str, grid))}), mesh {dict(mesh.shape)}")
    rows = {"row_length": config["row_length"] or 2048, "pack": config["pack"], "total_questions": total}
    paper = measure(*lengths, batch_questions=config["batch_questions"], shards=shards, **rows)
    filled = fill_rows(*lengths, rows=rows_per_chip * shards, **rows)
    encode, videos_per_second = plan_encode(config, base, chip, devices, batch_size, folder(dump, topology, "encode"))
    encode_hours = videos / videos_per_second / 3600
    print_memory("encode", encode, chip, config, rows_per_chip)
    if encode.known:
        hosts = len({device.process_index for device in devices})
        print(
            f"  {videos:,} videos once, {batch_size} at once on a host: {encode_hours:.2f} h, in which each host reads "
            f"{videos_per_second * config['num_frames'] / hosts:,.0f} frames a second"
        )
    cached: dict[tuple[int, ...], Program] = {}
    for title, work in (
        (f"{paper.questions} questions a step{', the paper’s' if paper.questions == PAPER_BATCH else ''}", paper),
        (f"--rows-per-chip={rows_per_chip}: {filled.questions} questions a step, no longer the paper's recipe", filled),
    ):
        print(f"{title}: {work.rows} rows of {work.row_length} slots, {work.rows / shards:g} per chip")
        shape = work.rows, work.row_length, work.groups, work.targets
        if shape not in cached:
            where = folder(dump, topology, f"train-{work.questions}-questions")
            cached[shape] = compile_train(recipe_of(config), model_settings(config), base, mesh, chip, work, where)
        program = cached[shape]
        print_memory("train", program, chip, config, rows_per_chip)
        if program.known:
            print_bound(program, work, base, chip, chips, config, encode_hours)
    if paper.rows * paper.row_length > 1.5 * paper.tokens:
        print(
            f"note: {1 - paper.tokens / (paper.rows * paper.row_length):.0%} of the slots are empty at "
            f"{paper.questions} questions a step: use fewer chips or --config.mesh.tensor, or more questions a step"
        )


def plan_encode(config, base, chip, devices, batch_size: int, dump) -> tuple[Program, float]:
    """The encode step of one host, and the videos a second of all hosts, NaN when the time is unknown."""
    hosts = len({device.process_index for device in devices})
    local = [device for device in devices if device.process_index == devices[0].process_index]
    at_once = -(-batch_size // len(local)) * len(local)
    program = compile_encode(model_settings(config), base, local, chip, at_once, dump)
    return program, hosts * at_once / program.seconds if program.known else math.nan


def folder(dump: Path | None, topology: str, name: str) -> Path | None:
    """The folder of a program's dump."""
    return None if dump is None else dump / topology / name


def print_memory(name: str, program: Program, chip: Chip, config, rows_per_chip: int) -> None:
    """Prints bytes per chip, and remedies when they are too many."""
    if not program.peak:
        print(f"  {name} {program.problem}; try shorter rows (--config.row_length), or fewer rows or videos per chip")
        return
    parts = f"weights {gb(program.weights)}, trained {gb(program.state)}, temporaries {gb(program.temporaries)}"
    fits = program.peak <= chip.hbm
    state = "fits" if fits else "DOES NOT FIT"
    timed = f", compiled in {program.compile_seconds:.0f} s" if program.compile_seconds else ""
    print(f"  {name}, GiB per chip: {parts}; peak {gb(program.peak)} of {gb(chip.hbm)}: {state}{timed}")
    if program.problem:
        print(f"  {program.problem}")
    if not fits:
        print(f"  try: {'; '.join(remedies(program, chip, config, rows_per_chip))}")


def gb(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f}"


def remedies(program: Program, chip: Chip, config: Mapping[str, Any], rows_per_chip: int) -> list[str]:
    """Settings that make a program smaller, in the order of their cost in time."""
    found = []
    if program.weights > 0.5 * chip.hbm and not config["int8"]:
        found.append("--config.int8=True (for its loss see docs/performance.md)")
    if rows_per_chip > 1:
        found.append(f"--rows-per-chip={rows_per_chip // 2}")
    if config["remat"] != "full":
        found.append("--config.remat=full")
    if config["mesh"]["fsdp"] == 1:
        found.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    if config["mesh"]["tensor"] == 1:
        found.append("--config.mesh.tensor=2")
    return found or ["more chips"]


def print_bound(program: Program, work: Workload, base: Base, chip, chips, config, encode_hours: float) -> None:
    """Prints the time of a step, its MFU and the hours of a training."""
    flops, useful = model_flops(base, work)
    shares = ", ".join(f"{kind} {share / program.seconds:.1%}" for kind, share in program.shares.items())
    available = chip.peak_flops * chips * program.seconds
    epochs = config["num_epochs"]
    title = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    hours = epochs * work.steps * program.seconds / 3600
    print(f"  a step: {flops:.3g} flops in at least {program.seconds * 1e3:.0f} ms ({shares})")
    print(
        f"  MFU at most {flops / available:.3f} counting row tokens, {useful / available:.3f} counting real ones; "
        f"at most {work.questions / program.seconds:.1f} questions/s"
    )
    print(
        f"  {title}: at least {hours:.2f} h, with the encoding {hours + encode_hours:.2f} h = "
        f"{chips * (hours + encode_hours):.1f} chip-hours"
    )


def compare(config, base: Base, lengths, total: int, videos: int, batch_size: int, dump: Path | None) -> None:
    """The table of all slices, and its picture."""
    header = ("slice", "settings", "GiB peak", "MFU bound", "questions/step", "questions/s", "hours", "chip-hours")
    columns = ("<9", " <29", ">8", "  >9", "  >14", "  >11", "  >5", "  >10")
    print(table_row(header, columns))
    lines = []
    for topology in NAMES:
        chip, _ = parse_topology(topology)
        best = BEST[chip.kind]
        settings = {**config, **{key: best[key] for key in ("remat", "int8", "mesh")}}
        devices = tpu_devices(topology)
        mesh = make_mesh(settings["mesh"], devices)
        work = fill_rows(
            *lengths,
            row_length=config["row_length"] or 2048,
            pack=config["pack"],
            rows=best["rows_per_chip"] * num_batch_shards(mesh),
            total_questions=total,
        )
        where = folder(dump, topology, "train")
        train = compile_train(recipe_of(settings), model_settings(settings), base, mesh, chip, work, where)
        encode, videos_per_second = plan_encode(
            settings, base, chip, devices, batch_size, folder(dump, topology, "encode")
        )
        said = f"{'int8' if best['int8'] else 'bf16'}, {best['rows_per_chip']} rows per chip"
        if not (train.known and encode.known and train.peak <= chip.hbm):
            problem = train.problem or encode.problem or "does not fit"
            print(table_row((topology, said, gb(train.peak), problem), (*columns[:3], "  <0")), flush=True)
            continue
        bound = model_flops(base, work)[0] / (chip.peak_flops * len(devices) * train.seconds)
        hours = (config["num_epochs"] * work.steps * train.seconds + videos / videos_per_second) / 3600
        lines.append((topology, bound, hours, hours * len(devices)))
        rates = f"{bound:.3f}", work.questions, f"{work.questions / train.seconds:.1f}"
        costs = f"{hours:.2f}", f"{hours * len(devices):.1f}"
        print(table_row((topology, said, gb(train.peak), *rates, *costs), columns), flush=True)
    if dump is not None and lines:
        draw(lines, config, dump / "plan.png")
        print(f"picture: {dump / 'plan.png'}")


def draw(lines: list[tuple[str, float, float, float]], config: Mapping[str, Any], path: Path) -> None:
    """Hours and chip-hours by slice, one line per kind of chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind in dict.fromkeys(name.split("-")[0] for name, *_ in lines):
        chosen = [line for line in lines if line[0].startswith(kind + "-")]
        chips = [round(cost / hours) for _, _, hours, cost in chosen]
        axes[0].plot(chips, [hours for _, _, hours, _ in chosen], "o-", label=kind)
        axes[1].plot(chips, [cost for *_, cost in chosen], "o-", label=kind)
    title = f"{config['family']}: {config['num_epochs']} epochs, encoding included"
    for axis, label in zip(axes, ("hours, at least", "chip-hours, at least"), strict=True):
        axis.set(xscale="log", xlabel="chips", ylabel=label, title=title)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
