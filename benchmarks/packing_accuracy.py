"""Does packing change what the demo learns? RED-VILLM trained on packed and on single questions, over several seeds.

python benchmarks/packing_accuracy.py [--base=llava] [--workdir=demo] [--out=DIR] [--seeds=0,1,2]

`redvillm_jax.demo --base=…` comes first: its videos, base and training streams are read, never written. The development
videos are prepared and encoded with the demo's own commands; then every seed trains twice, with --config.pack=True and
False, on the same questions for the same number of steps, and answers the development questions. Only the
questions that meet in a step differ: with packing, the questions of a video come together.

Two 95 % intervals of packed minus unpacked: one resamples the videos, with these runs as they are (demo_seeds.py); the
other takes the videos as they are and the seeds as a sample (t-test of the accuracies, equal variances).
"""

import os
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.demo_seeds import RESAMPLES, hit, interval, read
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.demo.__main__ import KINDS, ROOT, command

RUNS = {"packed": True, "unpacked": False}


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/packing_accuracy.py", __doc__)
    parser.add_argument("--base", default="llava", help="llava or qwen_vl (llava)")
    parser.add_argument("--workdir", type=Path, default=Path("demo"), help="the demo's folder (demo)")
    parser.add_argument("--out", type=Path, help="folder for the results (WORKDIR/packing)")
    parser.add_argument("--seeds", default="0,1,2", help="comma separated, two or more (0,1,2)")
    flags = parser.parse_args(argv)
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    videos, base = flags.workdir / "videos" / "dev", flags.workdir / flags.base / "base"
    streams = flags.workdir / flags.base / "streams" / "train"
    for needed in (videos, base, streams):
        if not needed.exists():
            raise UserError(f"{needed} is missing: run python -m redvillm_jax.demo --base={flags.base} first")
    if len(seeds) < 2:
        raise UserError(f"--seeds={flags.seeds} is one seed; the spread over seeds needs two or more")
    out = (flags.out or flags.workdir / "packing") / flags.base
    folders = train_and_answer(flags.base, seeds, videos=videos, base=base, streams=streams, out=out)

    answers = {name: [read(folder / "answers.jsonl") for folder in runs] for name, runs in folders.items()}
    first = answers["packed"][0]
    clusters = np.unique([row["video"] for row in first], return_inverse=True)[1]
    hits = {name: 100.0 * np.array([[hit(row) for row in run] for run in runs]) for name, runs in answers.items()}
    groups = {name: np.array([row["kind"] in kinds for row in first]) for name, kinds in KINDS.items()}
    groups["all"] = np.ones(len(first), bool)

    print(f"\n{flags.base}: exact match in % on {len(first)} questions about {clusters.max() + 1} development videos\n")
    columns = ["packed, by seed", "unpacked, by seed", "packed", "unpacked", "difference", "videos resampled", "seeds"]
    print("| questions | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, members in groups.items():
        by_seed = {run: values[:, members].mean(1) for run, values in hits.items()}
        difference = (hits["packed"] - hits["unpacked"])[:, members].mean(0)
        over_videos = interval(difference, clusters[members])
        over_seeds = stats.ttest_ind(by_seed["packed"], by_seed["unpacked"]).confidence_interval()
        cells = [
            *(", ".join(f"{value:.1f}" for value in values) for values in by_seed.values()),
            *(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in by_seed.values()),
            f"{difference.mean():+.2f}",
            *(f"[{a:+.2f}, {b:+.2f}]" for a, b in (over_videos, over_seeds)),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n± is the standard deviation over seeds {seeds}; {RESAMPLES} resamplings of the videos")


def train_and_answer(
    family: str, seeds: list[int], *, videos: Path, base: Path, streams: Path, out: Path
) -> dict[str, list[Path]]:
    """Runs what is not finished yet; the folders of answers by name of the run, one per seed."""
    config = f"--config={os.path.relpath(ROOT / 'configs' / 'demo.py')}:{family}"
    frames, dev = out / "frames" / "dev", out / "streams" / "dev"
    data = (f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}")
    command("data_pipeline.prepare", *data, f"--base={base}", "--num_frames=16", "--format=raw", f"--out={frames}")
    command("redvillm_jax.encode", config, f"--config.base={base}", f"--data={frames}", f"--out={dev}")
    folders: dict[str, list[Path]] = {name: [] for name in RUNS}
    for seed in seeds:
        for name, pack in RUNS.items():
            workdir = out / f"seed-{seed}" / name
            inputs = (f"--config.base={base}", f"--config.data={streams}", f"--config.seed={seed}")
            command("redvillm_jax.train", config, f"--workdir={workdir}", *inputs, f"--config.pack={pack}")
            command("redvillm_jax.evaluate", f"--model={workdir}", f"--data={dev}", f"--out={workdir / 'dev'}")
            folders[name].append(workdir / "dev")
    return folders


if __name__ == "__main__":
    run(main)
