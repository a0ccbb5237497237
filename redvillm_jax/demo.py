"""Turns a tiny image LLM into a video LLM on this machine, with the project's own commands.

python -m redvillm_jax.demo [--base=llava|qwen_vl] [--workdir=demo]

Every command is printed before it runs, so that it can be copied. It makes videos of moving shapes, prepares them,
converts a tiny image LLM that the project carries, encodes the videos with it, trains its projectors three ways,
answers questions about videos that were held out, and exports the result. Killed, it continues where it was.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipeline.artefacts import METRICS, SUMMARY, read_lines, read_object
from data_pipeline.errors import Parser, UserError, run
from redvillm_jax.evaluation.scoring import OWN

ROOT = Path(__file__).parents[1]
BASES = Path(__file__).parent / "demo_bases"
ROWS = {  # name of the row: (folder, switches)
    "spatial tokens only": ("spatial_only", ["--config.streams=spatial"]),
    "one shared projector": ("shared_projector", ["--config.temporal_module=false"]),
    "RED-VILLM": ("red_villm", []),
}
UNTRAINED = "before training"
SIZES = ("--train=2000", "--dev=300", "--test=500")  # videos
KINDS = {
    "temporal": ("direction", "first_colour", "last_colour", "first_shape", "last_shape"),
    "spatial": ("colour", "shape", "horizontal", "vertical", "count"),
}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m redvillm_jax.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", choices=sorted(p.name for p in BASES.iterdir()), default="llava", help="(llava)")
    parser.add_argument("--workdir", type=Path, default=Path("demo"), help="folder for everything it makes (demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the training questions (0)")
    flags = parser.parse_args(argv)
    start, work = time.time(), flags.workdir / flags.base
    runs = work / f"seed-{flags.seed}"
    config = f"--config={os.path.relpath(ROOT / 'configs' / 'demo.py')}:{flags.base}"
    base = work / "base"

    command("data_pipeline.moving_shapes", f"--out={flags.workdir / 'videos'}", *SIZES)
    command("conversion.from_torch", f"--family={flags.base}", f"--source={BASES / flags.base}", f"--out={base}")
    for split in ("train", "test"):
        videos, frames = flags.workdir / "videos" / split, f"{work / 'frames' / split}"
        data = (f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}")
        command("data_pipeline.prepare", *data, f"--base={base}", "--num_frames=16", "--format=raw", f"--out={frames}")
        streams = f"--out={work / 'streams' / split}"
        command("redvillm_jax.encode", config, f"--config.base={base}", f"--data={frames}", streams)

    test = (f"--data={work / 'streams' / 'test'}", "--max_new_tokens=32", "--batch_size=64")
    folders = {UNTRAINED: runs / "before_training"}
    command("redvillm_jax.evaluate", f"--model={base}", config, *test, f"--out={folders[UNTRAINED]}")
    for row, (name, switches) in ROWS.items():
        inputs = (f"--config.base={base}", f"--config.data={work / 'streams' / 'train'}")
        command(
            "redvillm_jax.train", config, f"--workdir={runs / name}", *inputs, f"--config.seed={flags.seed}", *switches
        )
        folders[row] = runs / name / "test"
        command("redvillm_jax.evaluate", f"--model={runs / name}", *test, f"--out={folders[row]}")
    export = runs / "export"
    command("conversion.to_torch", f"--model={runs / 'red_villm'}", f"--out={export}", "--full")

    summaries = {row: read_object(folder / "summary.json", SUMMARY) for row, folder in folders.items()}
    picture = runs / "result.png"
    losses = {row: runs / name / "metrics.jsonl" for row, (name, _) in ROWS.items()}
    draw(picture, flags.base, summaries, losses)
    questions = summaries[UNTRAINED]["benchmarks"][OWN]["questions"]
    print(f"\nExact match on {questions} questions about held-out videos, in per cent\n")
    print(table(summaries))
    print(f"\npicture:  {picture}\nexported: {export}\n{time.time() - start:.0f} seconds")


def command(module: str, *arguments: str) -> None:
    """Prints and runs `python -m module arguments` from the repository; a failure ends the demo."""
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode
    if code:
        raise UserError(f"{module} ended with code {code}; mend what it says above and run the demo again")


def accuracies(summary: Mapping) -> dict[str, float]:
    """Exact match by kind, and the means over the temporal and spatial kinds' questions and over all, in per cent."""
    found = summary["benchmarks"][OWN]["metrics"]["exact_match"]
    values = {kind: found[f"kind:{kind}"]["mean"] for kinds in KINDS.values() for kind in kinds}
    for group, kinds in KINDS.items():
        counts = [found[f"kind:{kind}"]["questions"] for kind in kinds]
        values[group] = np.average([values[kind] for kind in kinds], weights=counts)
    values["all"] = found["all"]["mean"]
    return {name: 100 * float(value) for name, value in values.items()}


def table(summaries: Mapping[str, Mapping]) -> str:
    """One line per kind of question, one column per row of the comparison."""
    columns = {row: accuracies(summary) for row, summary in summaries.items()}
    names = [name for group, kinds in KINDS.items() for name in (*kinds, group)] + ["all"]
    lines = [f"{'':>14}" + "".join(f"{row:>22}" for row in columns)]
    for name in names:
        label = name.upper() if name in (*KINDS, "all") else name.replace("_", " ")
        lines.append(f"{label:>14}" + "".join(f"{values[name]:22.1f}" for values in columns.values()))
    return "\n".join(lines)


def draw(path: Path, base: str, summaries: Mapping[str, Mapping], losses: Mapping[str, Path]) -> None:
    """Bars of the accuracy by kind of question, and the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(14, 4.5), width_ratios=(2.2, 1), layout="constrained")
    names = [*KINDS["temporal"], "temporal", *KINDS["spatial"], "spatial", "all"]
    colours = dict(zip(summaries, ("#bbbbbb", "#6baed6", "#fdae6b", "#d62728"), strict=True))
    for i, (row, summary) in enumerate(summaries.items()):
        values = [accuracies(summary)[name] for name in names]
        bars.bar(np.arange(len(names)) + 0.2 * (i - 1.5), values, 0.2, label=row, color=colours[row])
    labels = [n.upper() if n in (*KINDS, "all") else n.replace("_", "\n") for n in names]
    bars.set_xticks(range(len(names)), labels, fontsize=8)
    bars.set(ylabel="exact match, %", ylim=(0, 112), title=f"{base}: questions about held-out videos")
    bars.legend(ncols=4, loc="upper center", fontsize=8, frameon=False)
    for row, file in losses.items():
        lines = read_lines(file, METRICS)
        steps, values = (np.array([line[key] for line in lines]) for key in ("step", "loss"))
        curves.plot(steps, values, color=colours[row], alpha=0.25)
        window = np.minimum(np.arange(len(values)), 4)  # a mean over the last five logged steps
        means = [values[i - n : i + 1].mean() for i, n in enumerate(window)]
        curves.plot(steps, means, label=row, color=colours[row])
    curves.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
