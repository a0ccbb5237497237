"""Compiles the train step of every family's real sizes for TPU slices: does it fit, and what bounds its speed?

python benchmarks/plan_families.py [--config=smolvlm:paper] [--size=256m] [--topology=v5e-16]

Rows have VideoInstruct's lengths, and streams come from the cache. A line takes a chip's best settings (`BEST` in
redvillm_jax/plan.py); where these do not fit, and on v5e-4, it takes the config's own, which split the weights over all
chips and recompute all activations. Compiling a line takes about a minute.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import Base, sized_base
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import complete, model_settings
from redvillm_jax.plan import BEST, gb
from redvillm_jax.planning.programs import compile_train, model_flops
from redvillm_jax.planning.workload import QUESTIONS, fill_rows, paper_lengths
from redvillm_jax.runtime.chips import parse_topology, tpu_devices
from redvillm_jax.runtime.cli import read_config
from redvillm_jax.runtime.sharding import make_mesh, num_batch_shards
from redvillm_jax.training.recipe import recipe_of

CONFIGS = ("llava", "qwen", "llava_next", "llava_onevision", "smolvlm:paper", "gemma3")
SLICES = ("v5e-4", "v5e-16", "v5p-16", "v6e-16")
ROW_LENGTH = 2048


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/plan_families.py", __doc__)
    parser.add_argument("--config", choices=CONFIGS, help="one config (all)")
    parser.add_argument("--size", metavar="NAME", help="one size of its family (all but tiny)")
    parser.add_argument("--topology", metavar="SLICE", help=f"one slice ({', '.join(SLICES)})")
    flags = parser.parse_args(argv)
    print("| config | size | slice | settings | GiB peak | fits | bound | real tokens | ms a step | tokens a video |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in [flags.config] if flags.config else CONFIGS:
        config = read_config(name, complete=complete)
        for size in [flags.size] if flags.size else sizes(name, config["family"]):
            base = sized_base(config["family"], size)
            for topology in [flags.topology] if flags.topology else SLICES:
                print_slice(name, size, config, base, topology)


def sizes(name: str, family: str) -> list[str]:
    """Returns the real sizes of a config; those of LLaVA-NeXT have a config of their own within their family."""
    real = [size for size in load_family(family).SIZES if size != "tiny"]
    return [size for size in real if family != "llava" or size.startswith("next") == (name == "llava_next")]


def print_slice(name: str, size: str, config: Mapping[str, Any], base: Base, topology: str) -> None:
    """Prints the best settings on a slice, and the config's own where these do not fit."""
    best = BEST[parse_topology(topology)[0].kind]
    own = f"split, {config['remat']} remat, 1 row", config, 1
    changed = {**config, **{key: best[key] for key in ("remat", "int8", "mesh")}}
    rows = best["rows_per_chip"]
    tuned = f"{'int8' if best['int8'] else 'bf16'}, {rows} row{'s' if rows > 1 else ''}", changed, rows
    for label, settings, rows in [own] if topology == "v5e-4" else [tuned, own]:
        line, fits = compiled(base, settings, rows, topology)
        print(f"| {name} | {size} | {topology} | {label} | {line} |", flush=True)
        if fits:
            return


def compiled(base: Base, config: Mapping[str, Any], rows: int, topology: str) -> tuple[str, bool]:
    """Returns the cells of a line, and whether the step fits."""
    chip, _ = parse_topology(topology)
    devices = tpu_devices(topology)
    mesh = make_mesh(config["mesh"], devices)
    settings = model_settings(config)
    tokens = VideoPlaces(base, settings).most
    work = fill_rows(
        *paper_lengths(tokens),
        row_length=config["row_length"] or ROW_LENGTH,
        pack=True,
        rows=rows * num_batch_shards(mesh),
        total_questions=QUESTIONS,
    )
    program = compile_train(recipe_of(config), settings, base, mesh, chip, work, None)
    fits = bool(program.peak) and program.peak <= chip.hbm
    if not program.known:
        return f"{gb(program.peak)} | {'yes' if fits else 'no'} | {program.problem or '–'} | | | {tokens}", fits
    flops, useful = model_flops(base, work)
    available = chip.peak_flops * len(devices) * program.seconds
    bounds = f"{flops / available:.3f} | {useful / available:.3f} | {1e3 * program.seconds:.0f}"
    return f"{gb(program.peak)} | {'yes' if fits else 'no'} | {bounds} | {tokens}", fits


if __name__ == "__main__":
    run(main)
