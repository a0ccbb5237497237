"""The demo's comparison over several seeds, with paired 95 % intervals clustered by video.

python benchmarks/demo_seeds.py [--base=llava] [--workdir=demo] [--seeds=0,1,2]

Runs `redvillm_jax.demo` for every seed that is not finished yet, then prints the mean accuracy of each model and
baseline, the lead of RED-VILLM over each of them on the same questions, and the means by kind of question and language.
The seed orders the training questions; the base, the videos and the questions are the same throughout. An interval
resamples the test videos 10,000 times.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from redvillm_jax.demo.__main__ import KINDS, TRAININGS, groups_of, results, table
from redvillm_jax.evaluation.intervals import RESAMPLES, means


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/demo_seeds.py", __doc__)
    parser.add_argument("--base", default="llava", help="llava or qwen_vl (llava)")
    parser.add_argument("--workdir", type=Path, default=Path("demo"), help="the demo's folder (demo)")
    parser.add_argument("--seeds", default="0,1,2", help="comma separated (0,1,2)")
    flags = parser.parse_args(argv)
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    for seed in seeds:
        arguments = [f"--base={flags.base}", f"--workdir={flags.workdir}", f"--seed={seed}"]
        subprocess.run([sys.executable, "-m", "redvillm_jax.demo", *arguments], check=True, stdout=sys.stderr)

    found = [results(flags.workdir, flags.base, seed) for seed in seeds]
    questions = found[0][0]
    videos = np.array([question["video"] for question in questions])
    groups = {name: members for name, members in groups_of(questions).items() if name in (*KINDS, "all")}
    # (questions,) share of the seeds that answer each question right
    hits = {system: np.mean([of[system] for _, of in found], axis=0) for system in found[0][1]}
    print(
        f"{flags.base}: exact match in %, mean over seeds {seeds}, {len(questions)} questions about {len(set(videos))}"
    )
    print("videos; the first four lines do not depend on the seed")
    print(f"in brackets: RED-VILLM minus this line, paired, 95 % interval over {RESAMPLES} resamplings of the videos")
    for system, values in hits.items():
        cells = []
        for name, members in groups.items():
            cell = f"{name} {100 * values[members].mean():5.1f}"
            if system != "RED-VILLM":
                low, high = interval((hits["RED-VILLM"] - values)[members], videos[members])
                cell += f" [{100 * low:+5.1f}, {100 * high:+5.1f}]"
            cells.append(cell)
        print(f"{system:<22}" + "   ".join(cells))
    for system in TRAININGS:
        print(f"{system:<22}all, by seed: " + "  ".join(f"{100 * of[system].mean():.1f}" for _, of in found))
    print(f"\nBy kind and language, mean over seeds {seeds}\n\n{table(questions, hits)}")


def interval(differences: np.ndarray, videos: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `differences`: (questions,), whole videos resampled together."""
    mean = means(videos.tolist(), [["all"]] * len(videos), {"difference": differences.tolist()})["difference"]["all"]
    return mean["low"], mean["high"]


if __name__ == "__main__":
    run(main)
