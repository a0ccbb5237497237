"""Measures `redvillm_jax.load(...).ask` with many questions about one video, asked in three ways.

python benchmarks/many_questions.py [--base=llava|qwen_vl] [--questions=20] [--frames=100] [--rounds=5]

    one by one, nothing remembered   each question about a copy of the file: read, encoded and prefilled every time
    one by one                       the first question does that, the further ones find the video's keys and values
    in one call                      the list of questions, decoded together

The demo's base, untrained for videos, in fp32, on a generated mp4 with so many frames, all of which are used; greedy
answers of at most 16 tokens, which must be the same all three ways. Everything is compiled before it is timed; times
are medians over rounds, a ratio is the median over rounds of the ratio within a round.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import redvillm_jax  # noqa: E402
from benchmarks.train_vs_torch import convert  # noqa: E402
from benchmarks.variants import print_table  # noqa: E402
from configs.demo import get_config  # noqa: E402
from data_pipeline.common.cli import Parser  # noqa: E402
from data_pipeline.common.errors import UserError, run  # noqa: E402
from redvillm_jax.demo.moving_shapes import TEMPLATES, WORDS, moving_scene, render, write_mp4  # noqa: E402
from redvillm_jax.model.settings import plain_config  # noqa: E402

ANSWER = {"max_new_tokens": 16}
BASES = ROOT / "redvillm_jax" / "demo" / "bases"


def main(argv: list[str]) -> int:
    parser = Parser("python benchmarks/many_questions.py", __doc__)
    parser.add_argument("--base", choices=sorted(p.name for p in BASES.iterdir()), default="llava", help="(llava)")
    parser.add_argument("--questions", type=int, default=20, help="questions about the video (20)")
    parser.add_argument("--frames", type=int, default=100, help="frames of the video (100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the three ways (5)")
    flags = parser.parse_args(argv)
    questions = make_questions()
    for name, least, most in (("questions", 6, len(questions)), ("frames", 8, 1000), ("rounds", 1, 1000)):
        if not least <= getattr(flags, name) <= most:
            raise UserError(f"--{name}={getattr(flags, name)}: expected {least} to {most}")
    questions = questions[: flags.questions]

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        clip = Path(folder) / "clip.mp4"
        write_mp4(render(moving_scene(rng, flags.frames), rng), clip)
        # More copies than a model remembers lie between two questions about the same one.
        copies = [Path(shutil.copy(clip, clip.with_stem(f"clip-{number}"))) for number in range(len(questions) + 2)]
        base = Path(folder) / "base"
        convert(flags.base, BASES / flags.base, base)
        config = plain_config(get_config(flags.base)) | {"num_frames": flags.frames}
        model = redvillm_jax.load(base, config=config)

        def fresh() -> tuple[list[str], list[float]]:
            return one_by_one(model.ask, copies[: len(questions)], questions)

        def remembered() -> tuple[list[str], list[float]]:
            return one_by_one(model.ask, [copies[-2]] * len(questions), questions)

        def together() -> tuple[list[str], list[float]]:
            began = time.perf_counter()
            return model.ask(copies[-1], questions, **ANSWER), [time.perf_counter() - began]

        ways = {"one by one, nothing remembered": fresh, "one by one": remembered, "in one call": together}
        compiling = fresh()[1][0]
        together()
        rounds = [{name: way() for name, way in ways.items()} for _ in range(flags.rounds)]

    print(f"{flags.base}, {len(questions)} questions about a video of {flags.frames} frames, {flags.rounds} rounds")
    totals = {name: np.array([sum(found[name][1]) for found in rounds]) for name in ways}
    lines = []
    for name in ways:
        times = [found[name][1] for found in rounds]
        lines.append(
            {
                "asked": name,
                "all questions": f"{1000 * np.median(totals[name]):.0f} ms",
                "first": f"{1000 * np.median([t[0] for t in times]):.1f} ms" if len(times[0]) > 1 else "-",
                "each further one": f"{1000 * np.median([t[1:] for t in times]):.1f} ms" if len(times[0]) > 1 else "-",
                "x nothing remembered": f"{np.median(totals['one by one, nothing remembered'] / totals[name]):.2f}",
            }
        )
    print_table(lines)
    print(f"the first question of all, which compiles: {compiling:.1f} s; x: above 1 is faster")
    answers = {name: [found[name][0] for found in rounds] for name in ways}
    want = answers["one by one, nothing remembered"][0]
    differ = [name for name, found in answers.items() if any(one != want for one in found)]
    if differ:
        print(f"FAILED: other answers when asked {' and '.join(differ)}")
        return 1
    print(f"answers are the same each way ({len(set(want))} different ones among {len(want)})")
    gain = np.median([np.median(f["one by one"][1][1:]) / np.median(f[next(iter(ways))][1]) for f in rounds])
    print(f"result: a further question takes {100 * gain:.0f} % of what the first one takes")
    return 0


def make_questions() -> list[str]:
    """Questions of the demo's kinds about things of all colours and shapes, in turn."""
    words = WORDS["en"]
    things = [f"{colour} {shape}" for colour in words["colour"] for shape in words["shape"]]
    templates = [text for text in TEMPLATES["en"].values() if "{thing}" in text]
    plain = [text for text in TEMPLATES["en"].values() if "{thing}" not in text]
    named = [templates[i % len(templates)].format(thing=thing) for i, thing in enumerate(things)]
    return [*plain, *named]


def one_by_one(
    ask: Callable[..., str], videos: Sequence[Path], questions: Sequence[str]
) -> tuple[list[str], list[float]]:
    """The answers and the seconds that each took."""
    answers, seconds = [], []
    for video, question in zip(videos, questions, strict=True):
        began = time.perf_counter()
        answers.append(ask(video, question, **ANSWER))
        seconds.append(time.perf_counter() - began)
    return answers, seconds


if __name__ == "__main__":
    run(main)
