"""Prices the real train step with `redvillm_jax.plan` while one setting after the other is improved.

python benchmarks/plan_variants.py [--family=llava] [--topology=v5e-16]

Rows of 2048 tokens with VideoInstruct's lengths, streams from the cache. Each line of the table changes one setting of
the line before it. A variant that does not fit prints the memory that it would need. Compiling a variant takes about a
minute.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.demo import family_config
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import sized_base
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.plan import BEST, gb
from redvillm_jax.planning.programs import compile_train, model_flops
from redvillm_jax.planning.workload import QUESTIONS, fill_rows, paper_lengths
from redvillm_jax.runtime.chips import parse_topology, tpu_devices
from redvillm_jax.runtime.sharding import make_mesh, num_batch_shards
from redvillm_jax.training.recipe import recipe_of

SHARDED, REPLICATED = {"data": 1, "fsdp": -1, "tensor": 1}, {"data": -1, "fsdp": 1, "tensor": 1}


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/plan_variants.py", __doc__)
    parser.add_argument("--family", default="llava", help="which image LLM (llava)")
    parser.add_argument("--topology", default="v5e-16", help="a slice, as in redvillm_jax.plan (v5e-16)")
    parser.add_argument("--last", type=int, default=99, help="only so many variants from the end (all)")
    flags = parser.parse_args(argv)
    chip, _ = parse_topology(flags.topology)
    devices = tpu_devices(flags.topology)
    config = plain_config(family_config(flags.family))
    base = sized_base(flags.family, next(iter(load_family(flags.family).SIZES)))
    tokens = VideoPlaces(base, model_settings(config)).most
    print(
        "| variant | rows a chip | bound | real tokens | ms | compute, kernels, collectives, copies | GB | compiled |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for label, settings, rows, patches in variants(chip.kind)[-flags.last :]:
        mesh = make_mesh(settings["mesh"], devices)
        work = fill_rows(
            *paper_lengths(tokens),
            row_length=2048,
            pack=True,
            rows=rows * num_batch_shards(mesh),
            total_questions=QUESTIONS,
        )
        undo = [mock.patch(*patch) for patch in patches]
        for patch in undo:
            patch.start()
        changed = {**config, **settings}
        program = compile_train(recipe_of(changed), model_settings(changed), base, mesh, chip, work, None)
        for patch in undo:
            patch.stop()
        if not program.known:
            print(
                f"| {label} | {rows} | {program.problem or 'does not fit'} | | | | {gb(program.peak)} | |", flush=True
            )
            continue
        flops, useful = model_flops(base, work)
        available = chip.peak_flops * len(devices) * program.seconds
        shares = [1e3 * program.shares.get(kind, 0) for kind in ("compute", "kernel", "collective", "copy")]
        print(
            f"| {label} | {rows} | {flops / available:.3f} | {useful / available:.3f} | {1e3 * program.seconds:.0f} | "
            f"{', '.join(f'{share:.0f}' for share in shares)} | {gb(program.peak)} | {program.compile_seconds:.0f} s |",
            flush=True,
        )


def variants(kind: str) -> list[tuple[str, dict, int, list]]:
    """(label, settings, rows a chip, patches) for a kind of chip."""
    unpinned = [(f"redvillm_jax.{name}.pin_batch", lambda x: x) for name in ("layers", "model")]
    scattered = [("redvillm_jax.modules.layers.gather_weights", lambda weights: weights)]
    narrow = [("redvillm_jax.training.recipe.compiler_options", lambda _: {})]
    last = {key: BEST[kind][key] for key in ("remat", "int8", "mesh")}
    rows, parts = BEST[kind]["rows_per_chip"], last["mesh"]["fsdp"]
    where = "on every chip" if parts == 1 else f"split over {parts} chips"
    full = {"remat": "full", "int8": False, "mesh": SHARDED}
    xla = full | {"attention": "xla"}
    kept = full | {"remat": last["remat"]}
    naive = unpinned + scattered + narrow
    found = [
        ("fsdp, all recomputed, XLA attention, activations not pinned", xla, rows, naive),
        ("activations pinned to the batch axes", xla, rows, scattered + narrow),
        ("each block gathers its weights", xla, rows, narrow),
        ("splash attention", full, rows, narrow),
        ("activations kept by name", kept, rows, narrow),
        (f"weights {where}{', in 8 bits' if last['int8'] else ''}", last, rows, narrow),
    ]
    if parse_topology(f"{kind}-8")[0].scoped_vmem:
        found.append(("more vector memory for tiles", last, rows, []))
    return found


if __name__ == "__main__":
    run(main)
