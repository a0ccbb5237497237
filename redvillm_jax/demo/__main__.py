"""Turns a tiny image LLM into a video LLM on this machine, with the project's own commands.

python -m redvillm_jax.demo [--base=llava|qwen_vl] [--workdir=demo]

The demo prints every command before it runs it, so that you can copy it. It makes videos of moving shapes, prepares
them, converts a tiny image LLM that comes with the project, encodes the videos, trains the projectors in three ways,
answers questions about held-out videos, and exports the result. After a kill it continues. The table at the end begins
with baselines: how often a reader is right without the video, or without its order (docs/demo.md).
"""

import argparse
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.common.artefacts import ANSWER, METRICS, QUESTION, read_lines
from data_pipeline.common.cli import Parser, local_path, number
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.locks import locked
from data_pipeline.common.tables import table_row
from redvillm_jax.demo.baselines import commonest_answer, without_order
from redvillm_jax.evaluation.short_answers import exact_match

ROOT = Path(__file__).parents[2]
BASES = Path(__file__).parent / "bases"
TRAININGS = {  # system: (folder, switches)
    "spatial tokens only": ("spatial_only", ["--config.streams=spatial"]),
    "one shared projector": ("shared_projector", ["--config.temporal_module=false"]),
    "RED-VILLM": ("red_villm", []),
}
UNTRAINED, TEXT_ONLY = "before training", "text only"
BASELINES = ("commonest answer", TEXT_ONLY, "what, not when")
SIZES = ("--train=2000", "--dev=300", "--test=500")  # videos
KINDS = {
    "temporal": ("direction", "first_colour", "last_colour", "first_shape", "last_shape"),
    "spatial": ("colour", "shape", "horizontal", "vertical", "count"),
}
LANGUAGES = {"English": "en", "Chinese": "zh"}


def main(argv: list[str]) -> None:
    parser = Parser("python -m redvillm_jax.demo", __doc__)
    bases = sorted(p.name for p in BASES.iterdir())
    parser.add_argument("--base", choices=bases, default="llava", help="which tiny image LLM (%(default)s)")
    parser.add_argument(
        "--workdir",
        type=local_path,
        metavar="DIR",
        default=Path("demo"),
        help="folder for everything it makes (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=number(int),
        default=0,
        metavar="N",
        help="seed of the order of the training questions (%(default)s)",
    )
    flags = parser.parse_args(argv)
    with locked(flags.workdir / flags.base):
        demonstrate(flags)


def demonstrate(flags: argparse.Namespace) -> None:
    """Runs every command, then prints and draws the results."""
    start, work = time.time(), flags.workdir / flags.base
    runs = work / f"seed-{flags.seed}"
    config = f"--config={os.path.relpath(ROOT / 'configs' / 'demo.py')}:{flags.base}"
    base = work / "base"

    command("redvillm_jax.demo.moving_shapes", f"--out={flags.workdir / 'videos'}", *SIZES)
    command("conversion.from_torch", f"--family={flags.base}", f"--source={BASES / flags.base}", f"--out={base}")
    for split in ("train", "test"):
        videos, frames = flags.workdir / "videos" / split, f"{work / 'frames' / split}"
        data = (f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}")
        command("data_pipeline.prepare", *data, f"--base={base}", "--num_frames=16", "--format=raw", f"--out={frames}")
        streams = f"--out={work / 'streams' / split}"
        command("redvillm_jax.encode", config, f"--config.base={base}", f"--data={frames}", streams)

    test = (f"--data={work / 'streams' / 'test'}", "--max_new_tokens=32", "--batch_size=64")
    untrained = (f"--model={base}", config, *test)
    command("redvillm_jax.evaluate", *untrained, "--text_only", f"--out={work / 'text_only'}")
    command("redvillm_jax.evaluate", *untrained, f"--out={work / 'before_training'}")
    for name, switches in TRAININGS.values():
        inputs = (f"--config.base={base}", f"--config.data={work / 'streams' / 'train'}")
        command(
            "redvillm_jax.train", config, f"--workdir={runs / name}", *inputs, f"--config.seed={flags.seed}", *switches
        )
        command("redvillm_jax.evaluate", f"--model={runs / name}", *test, f"--out={runs / name / 'test'}")
    export = runs / "export"
    command("conversion.to_torch", f"--model={runs / 'red_villm'}", f"--out={export}", "--full")

    questions, hits = results(flags.workdir, flags.base, flags.seed)
    picture = runs / "result.png"
    losses = {system: runs / name / "metrics.jsonl" for system, (name, _) in TRAININGS.items()}
    draw(picture, flags.base, questions, hits, losses)
    print(f"\nExact match on {len(questions)} questions about held-out videos, in per cent\n")
    print(table(questions, hits))
    print(f"\npicture:  {picture}\nexported: {export}\n{time.time() - start:.0f} seconds")


def command(module: str, *arguments: str) -> None:
    """Prints and runs `python -m module arguments` from the repository; a failure ends the demo."""
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode
    if code:
        raise UserError(f"{module} ended with code {code}; mend what it says above and run the demo again")


def results(workdir: Path, base: str, seed: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The test questions, and by column of the table which of them are answered right: (questions,), 0 to 1.

    The baselines come first. "text only" is the base, asked without visual tokens. Trained projectors make nothing but
    visual tokens, so without them every model of the table answers as the base does.
    """
    work, videos = workdir / base, workdir / "videos"
    folders = {TEXT_ONLY: work / "text_only", UNTRAINED: work / "before_training"}
    folders |= {system: work / f"seed-{seed}" / name / "test" for system, (name, _) in TRAININGS.items()}
    answers = {system: read_lines(folder / "answers.jsonl", ANSWER) for system, folder in folders.items()}
    hits = {system: np.array(list(map(hit, own))) for system, own in answers.items()}
    questions = answers[UNTRAINED]
    train = read_lines(videos / "train" / "instructions.jsonl", QUESTION)
    hits |= {"commonest answer": commonest_answer(train, questions), "what, not when": without_order(questions)}
    return questions, {system: hits[system] for system in (*BASELINES, UNTRAINED, *TRAININGS)}


def hit(answer: Mapping[str, str]) -> float:
    """1 for an exact match with the reference answer, as `redvillm_jax.evaluate` counts it; no prediction counts 0."""
    return exact_match(answer["prediction"] or "", answer["answer"])


def groups_of(questions: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """Masks (questions,) of the questions of each kind, of the temporal and spatial kinds, of each language, of all."""
    kinds, languages = (np.array([question[field] for question in questions]) for field in ("kind", "language"))
    groups = {}
    for group, names in KINDS.items():
        groups |= {name: kinds == name for name in names} | {group: np.isin(kinds, names)}
    groups |= {name: languages == language for name, language in LANGUAGES.items()}
    return groups | {"all": np.ones(len(questions), bool)}


def label(group: str) -> str:
    """A group's name in the table: a kind in small letters, a group of several kinds in capitals."""
    return group.replace("_", " ") if any(group in kinds for kinds in KINDS.values()) else group.upper()


def table(questions: Sequence[Mapping], hits: Mapping[str, np.ndarray]) -> str:
    """The accuracies in per cent: a line for each group of questions, a column for each baseline and model."""
    heads = [textwrap.wrap(system, 12) for system in hits]
    depth = max(map(len, heads))
    heads = [[""] * (depth - len(head)) + head for head in heads]
    rows = [["", *(head[i] for head in heads)] for i in range(depth)]
    for group, members in groups_of(questions).items():
        rows.append([label(group), *(f"{100 * of[members].mean():.1f}" for of in hits.values())])
    return "\n".join(table_row(row, [">14"] * len(row)) for row in rows)


def draw(
    path: Path,
    base: str,
    questions: Sequence[Mapping],
    hits: Mapping[str, np.ndarray],
    losses: Mapping[str, Path],
) -> None:
    """Bars of the accuracy by kind of question with the baselines as lines across them, and the loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(14, 4.5), width_ratios=(2.2, 1), layout="constrained")
    groups = {name: members for name, members in groups_of(questions).items() if name not in LANGUAGES}
    values = {system: [100 * of[members].mean() for members in groups.values()] for system, of in hits.items()}
    places = np.arange(len(groups))
    colours = dict(zip((UNTRAINED, *TRAININGS), ("#bbbbbb", "#6baed6", "#fdae6b", "#d62728"), strict=True))
    for i, (system, colour) in enumerate(colours.items()):
        bars.bar(places + 0.2 * (i - 1.5), values[system], 0.2, label=system, color=colour)
    for system, style in zip(BASELINES, ("-", ":", "--"), strict=True):
        line = {"color": "black", "linestyle": style, "linewidth": 1.2}
        bars.hlines(values[system], places - 0.45, places + 0.45, label=system, **line)
    bars.set_xticks(places, [label(name).replace(" ", "\n") for name in groups], fontsize=8)
    bars.set(ylabel="exact match, %", ylim=(0, 122), title=f"{base}: questions about held-out videos")
    bars.set_yticks(range(0, 101, 20))
    bars.legend(ncols=4, loc="upper center", fontsize=8, frameon=False)
    for system, file in losses.items():
        lines = read_lines(file, METRICS)
        steps, values = (np.array([line[key] for line in lines]) for key in ("step", "loss"))
        curves.plot(steps, values, color=colours[system], alpha=0.25)
        window = np.minimum(np.arange(len(values)), 4)  # a mean over the last five logged steps
        means = [values[i - n : i + 1].mean() for i, n in enumerate(window)]
        curves.plot(steps, means, label=system, color=colours[system])
    curves.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
