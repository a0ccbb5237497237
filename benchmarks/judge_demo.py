"""The demo's models answered, translated and judged by the commands that real sets take, with a rule for a judge.

    python benchmarks/judge_demo.py [--demo=demo] [--base=llava] [--seed=0]

--demo: the finished workdir of `python -m redvillm_jax.demo`. A server on loopback translates the generator's words by
a table and judges by comparing strings. Asks the same test questions in English and, translated, in Chinese; judges
the Chinese answers as they are (cn) and translated back, against the English annotations (en). Checks that the judged
accuracy is the exact match that `evaluate` reports. Everything is kept beside the runs, in DEMO/BASE/seed-SEED/judged.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.common.cli import Parser  # noqa: E402
from data_pipeline.common.errors import UserError, run  # noqa: E402
from redvillm_jax.demo.__main__ import TRAININGS, UNTRAINED  # noqa: E402
from redvillm_jax.demo.moving_shapes import TEMPLATES, WORDS  # noqa: E402
from redvillm_jax.evaluation.scoring import OWN  # noqa: E402
from tests.fake_openai import FakeOpenAI, Messages  # noqa: E402

MODEL = "rule-2026-01-01"
PROTOCOLS = {"english": "asked in English", "cn": "asked in Chinese, cn", "en": "asked in Chinese, en"}
RED_VILLM = "RED-VILLM"


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/judge_demo.py", __doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the finished demo's folder (demo)")
    parser.add_argument("--base", choices=("llava", "qwen_vl"), default="llava", help="(llava)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's trainings (0)")
    flags = parser.parse_args(argv)
    work, videos = flags.demo / flags.base, flags.demo / "videos" / "test" / "videos"
    runs = work / f"seed-{flags.seed}"
    if not (runs / "result.png").is_file():
        raise UserError(f"--demo={flags.demo}: {runs} is no finished demo; run python -m redvillm_jax.demo first")
    out = runs / "judged"
    models = {UNTRAINED: [f"--model={work / 'base'}", f"--config={ROOT / 'configs' / 'demo.py'}:{flags.base}"]}
    models |= {system: [f"--model={runs / name}", f"--base={work / 'base'}"] for system, (name, _) in TRAININGS.items()}

    english = work / "frames" / "test" / "instructions.jsonl"
    with served(translate) as endpoint:
        command("data_pipeline.translate", f"--input={english}", f"--out={out / 'zh.jsonl'}", *endpoint)
    data = (f"--videos={videos}", f"--instructions={out / 'zh.jsonl'}", f"--base={work / 'base'}")
    command("data_pipeline.prepare", *data, "--num_frames=16", "--format=raw", f"--out={out / 'zh'}")
    for system, model in models.items():
        answers = out / system.replace(" ", "_")
        generation = ("--max_new_tokens=32", "--batch_size=64")
        streams = f"--data={work / 'streams' / 'test'}"
        command("redvillm_jax.evaluate", *model, streams, "--language=en", *generation, f"--out={answers / 'english'}")
        command("redvillm_jax.evaluate", *model, f"--data={out / 'zh'}", *generation, f"--out={answers / 'cn'}")
        back = (f"--input={answers / 'cn' / 'answers.jsonl'}", f"--out={answers / 'en.jsonl'}", "--to=en")
        with served(translate) as endpoint:
            command("data_pipeline.translate", *back, "--fields=prediction", *endpoint)
        for protocol in PROTOCOLS:
            source = answers / ("en.jsonl" if protocol == "en" else protocol)
            with served(judge) as endpoint:
                judged = f"--out={answers / f'{protocol}_judged'}"
                command("redvillm_jax.judge", f"--answers={source}", judged, *endpoint)

    print(table({system: {p: cell(out, system, p) for p in PROTOCOLS} for system in models}))
    translated = [json.loads(line) for line in (out / "zh.jsonl").read_text(encoding="utf-8").splitlines()]
    other = sum(line["answer"] != own_word(line["kind"], line["source_answer"]) for line in translated)
    print(
        f"{other} of {len(translated)} Chinese annotations are another word than the generator's own: translated alone,"
    )
    print("without its question, an answer such as 'left' may be a place or a direction")


def cell(out: Path, system: str, protocol: str) -> tuple[str, str]:
    """A system's judged accuracy, and RED-VILLM's minus it ("" for RED-VILLM), in per cent with intervals.

    Raises UserError unless the accuracy is the exact match, and for answers as they are what evaluate says, too.
    """
    name = system.replace(" ", "_")
    folder = out / name / f"{protocol}_judged"
    judged = metrics(folder)
    one = judged["accuracy"]["all"]
    by_rule = [judged] if protocol == "en" else [judged, metrics(out / name / protocol)]
    if any(metric["exact_match"] != judged["accuracy"] for metric in by_rule):
        raise UserError(f"{folder}: the judged accuracy is not the exact match")
    accuracy = f"{100 * one['mean']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
    if system == RED_VILLM:
        return accuracy, ""
    printed = command("redvillm_jax.judge", "--compare", str(folder), str(out / RED_VILLM / f"{protocol}_judged"))
    return accuracy, re.search(r"^  all +(\S+ \[[^]]+\])", printed, re.MULTILINE)[1]


def metrics(folder: Path) -> dict:
    """The metrics of the folder's summary."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["benchmarks"][OWN]["metrics"]


def table(cells: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """A line a model; by protocol the accuracy, and how far RED-VILLM lies above."""
    lines = ["judged accuracy in %, and RED-VILLM minus the line, each with its 95 % interval over resampled videos"]
    lines += [f"| | {' | '.join(PROTOCOLS.values())} |", "|---|" + "---|" * len(PROTOCOLS)]
    for system, by_protocol in cells.items():
        values = [accuracy + (f"; {above}" if above else "") for accuracy, above in by_protocol.values()]
        lines.append(f"| {system} | {' | '.join(values)} |")
    return "\n".join(lines)


# The server's two rules


def vocabulary() -> dict[str, str]:
    """English to Chinese: all questions and answers of the generator. A word of two lists has its first translation."""
    words: dict[str, str] = {}
    for kind, names in WORDS["en"].items():
        for english, chinese in zip(names, WORDS["zh"][kind], strict=True):
            words.setdefault(english, chinese)
    pairs = {kind: list(zip(WORDS["en"][kind], WORDS["zh"][kind], strict=True)) for kind in ("colour", "shape")}
    things = {f"{english} object": f"{chinese}物体" for english, chinese in pairs["colour"]} | dict(pairs["shape"])
    for (colour, colour_zh), (shape, shape_zh) in product(*pairs.values()):
        things[f"{colour} {shape}"] = f"{colour_zh}的{shape_zh}"
    for kind, template in TEMPLATES["en"].items():
        for english, chinese in things.items():
            words[template.format(thing=english)] = TEMPLATES["zh"][kind].format(thing=chinese)
    return words


ENGLISH_TO_CHINESE = vocabulary()
# Chinese tells more than English: every word of its lists has one translation.
CHINESE_TO_ENGLISH = {
    chinese: english
    for kind, names in WORDS["zh"].items()
    for english, chinese in zip(WORDS["en"][kind], names, strict=True)
}


def translate(messages: Messages) -> str:
    """What the table has for the last message; what it has not, such as a model's own invention, comes back."""
    text = messages[-1]["content"]
    return (CHINESE_TO_ENGLISH | ENGLISH_TO_CHINESE).get(text, text)


def judge(messages: Messages) -> str:
    """yes and 5 for a prediction that is the correct answer, else no and 0."""
    text = messages[-1]["content"]
    correct, predicted = (re.search(rf"^{name} answer: (.*)$", text, re.M)[1] for name in ("Correct", "Predicted"))
    same = correct.strip().lower() == predicted.strip().lower()
    return str({"pred": "yes" if same else "no", "score": 5 if same else 0})


def own_word(kind: str, english: str) -> str:
    """The generator's Chinese for an answer to a question of a kind."""
    words = kind.split("_")[-1]  # first_colour is one of the colours
    return WORDS["zh"][words][WORDS["en"][words].index(english)]


@contextlib.contextmanager
def served(rule) -> Iterator[tuple[str, ...]]:
    """The flags with which a command asks a server that answers by `rule`."""
    with FakeOpenAI(rule) as server:
        yield f"--base_url={server.url}", f"--model={MODEL}"
        print(f"({len(server.calls)} requests came to the server)", file=sys.stderr)


def command(module: str, *arguments: str) -> str:
    """Runs one of the project's commands and returns what it printed, which is also shown on standard error."""
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    print(f"\n$ python -m {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    print(process.stdout, file=sys.stderr, flush=True)
    if process.returncode:
        raise UserError(f"{module} ended with code {process.returncode}; see above")
    return process.stdout


if __name__ == "__main__":
    run(main)
