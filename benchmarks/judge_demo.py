"""The demo's models judged through the path that published sets take, in the paper's three protocols.

python benchmarks/judge_demo.py [--demo=demo] [--base=llava] [--out=DEMO/judged] [--seed=0]

The demo's English test questions are translated into Chinese, prepared with their videos, encoded and answered by each
of the demo's four models in both languages. Then every answer is judged: English as it is (en), Chinese as it is (cn),
and Chinese predictions translated into English against the English annotations (cn>en). Translator and judge are one
HTTP server on loopback that speaks the chat-completions protocol and follows rules: it knows the demo's words in both
languages, and says yes if prediction and answer are the same.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_pipeline.errors import Parser, UserError, run
from data_pipeline.moving_shapes import TEMPLATES, WORDS
from redvillm_jax.demo import ROOT, ROWS, UNTRAINED, command
from redvillm_jax.evaluation.comparison import compare
from redvillm_jax.evaluation.scoring import OWN
from tests.fake_openai import FakeOpenAI

MODEL = "rules-2026-01-01"
PROTOCOLS = ("en", "cn", "cn>en")
TRAINED = "RED-VILLM"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python benchmarks/judge_demo.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the demo's folder (demo)")
    parser.add_argument("--base", default="llava", help="llava or qwen_vl (llava)")
    parser.add_argument("--out", type=Path, help="folder for what this makes (DEMO/judged)")
    parser.add_argument("--seed", type=int, default=0, help="which of the demo's runs (0)")
    flags = parser.parse_args(argv)
    work, out = flags.demo / flags.base, (flags.out or flags.demo / "judged") / flags.base
    runs = work / f"seed-{flags.seed}"
    if not (runs / "red_villm" / "test").is_dir():
        raise UserError(f"{runs} has no finished demo: run python -m redvillm_jax.demo --base={flags.base} first")
    out.mkdir(parents=True, exist_ok=True)
    config = f"--config={ROOT / 'configs' / 'demo.py'}:{flags.base}"
    models = {UNTRAINED: [f"--model={work / 'base'}", config]}
    models |= {row: [f"--model={runs / folder}"] for row, (folder, _) in ROWS.items()}

    with FakeOpenAI(answer) as server:
        endpoint = (f"--model={MODEL}", f"--base_url={server.url}")
        data = ask_in_both_languages(flags.demo, work, out, config, endpoint)
        for i, arguments in enumerate(models.values()):
            for language in ("en", "zh"):
                answers = out / f"answers-{i}-{language}"
                asked = (f"--data={data}", f"--language={language}", "--max_new_tokens=32", "--batch_size=64")
                command("redvillm_jax.evaluate", *arguments, *asked, f"--out={answers}")
            translated = out / f"answers-{i}-zh-en.jsonl"
            given = (f"--input={answers / 'answers.jsonl'}", f"--out={translated}", "--to=en", "--fields=prediction")
            command("data_pipeline.translate", *given, *endpoint)
            for name, source in zip(PROTOCOLS, (out / f"answers-{i}-en", answers, translated), strict=True):
                command("redvillm_jax.judge", f"--answers={source}", f"--out={judged(out, i, name)}", *endpoint)
    report(list(models), out)


def ask_in_both_languages(demo: Path, work: Path, out: Path, config: str, endpoint: tuple[str, ...]) -> Path:
    """The demo's English test questions and their translations, in one store of streams."""
    videos = demo / "videos" / "test"
    rows = [json.loads(line) for line in (videos / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    english, chinese, both = (out / f"{name}.jsonl" for name in ("en", "zh", "both"))
    english.write_text("".join(json.dumps(row) + "\n" for row in rows if row["language"] == "en"), encoding="utf-8")
    command("data_pipeline.translate", f"--input={english}", f"--out={chinese}", *endpoint)
    both.write_text(english.read_text(encoding="utf-8") + chinese.read_text(encoding="utf-8"), encoding="utf-8")
    given = (f"--videos={videos / 'videos'}", f"--instructions={both}", f"--base={work / 'base'}")
    command("data_pipeline.prepare", *given, "--num_frames=16", "--format=raw", f"--out={out / 'frames'}")
    stored = (f"--data={out / 'frames'}", f"--out={out / 'streams'}")
    command("redvillm_jax.encode", config, f"--config.base={work / 'base'}", *stored)
    return out / "streams"


def judged(out: Path, number: int, protocol: str) -> Path:
    """Where the verdicts about a model lie."""
    return out / f"judged-{number}-{protocol.replace('>', '-')}"


def report(models: list[str], out: Path) -> None:
    """Prints the table, and checks that judged accuracy in English is the exact match that evaluate reported."""
    best = models.index(TRAINED)
    print("\n| accuracy in % | " + " | ".join(PROTOCOLS) + " |\n|" + "---|" * (len(PROTOCOLS) + 1))
    for i, name in enumerate(models):
        cells = []
        for protocol in PROTOCOLS:
            summary = json.loads((judged(out, i, protocol) / "summary.json").read_text(encoding="utf-8"))
            one = summary["benchmarks"][OWN]["metrics"]["accuracy"]["all"]
            cell = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * one[key] for key in ("mean", "low", "high")))
            if i != best:
                found = compare(judged(out, i, protocol), judged(out, best, protocol))
                more = found[OWN]["metrics"]["accuracy"]["all"]
                cell += "; {:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * more[key] for key in ("mean", "low", "high")))
            cells.append(cell)
        print(f"| {name} | " + " | ".join(cells) + " |")
        summary = json.loads((out / f"answers-{i}-en" / "summary.json").read_text(encoding="utf-8"))
        exact = summary["benchmarks"][OWN]["metrics"]["exact_match"]["all"]["mean"]
        told = json.loads((judged(out, i, "en") / "summary.json").read_text(encoding="utf-8"))
        accuracy = told["benchmarks"][OWN]["metrics"]["accuracy"]["all"]
        if accuracy["mean"] != exact:
            raise UserError(f"{name}: judged {accuracy['mean']}, evaluate says {exact}")
    print(f"\n{accuracy['questions']} questions about {accuracy['videos']} videos")
    print(f"in brackets 95 % intervals over resampled videos; behind the semicolon {TRAINED} minus this row")
    print("judged accuracy in English is evaluate's exact match in every row")


# ---- the server's rules


def dictionary() -> dict[str, str]:
    """The demo's words and questions, English to Chinese."""
    pairs = {}
    for words in WORDS["en"]:
        pairs |= dict(zip(WORDS["en"][words], WORDS["zh"][words], strict=True))
    things = dict(zip(WORDS["en"]["shape"], WORDS["zh"]["shape"], strict=True))
    for english, chinese in zip(WORDS["en"]["colour"], WORDS["zh"]["colour"], strict=True):
        things[f"{english} object"] = f"{chinese}物体"
        things |= {f"{english} {shape}": f"{chinese}的{things[shape]}" for shape in WORDS["en"]["shape"]}
    for kind, template in TEMPLATES["en"].items():
        for thing in things if "{thing}" in template else [""]:
            pairs[template.format(thing=thing)] = TEMPLATES["zh"][kind].format(thing=things.get(thing))
    return pairs


ENGLISH = dictionary()
WORD_PAIRS = [zip(WORDS["zh"][name], WORDS["en"][name], strict=True) for name in WORDS["en"]]
CHINESE = {chinese: english for pairs in WORD_PAIRS for chinese, english in pairs}


def answer(messages: list[dict[str, str]]) -> str:
    """Translates, or judges."""
    text = messages[-1]["content"]
    if messages[0]["content"].startswith("Translate"):
        return ENGLISH.get(text) or CHINESE.get(text) or f"unknown: {text}"
    said = {name.lower(): value for name, value in re.findall(r"^(Correct answer|Predicted answer): (.*)$", text, re.M)}
    right, told = (CHINESE.get(value, value) for value in (said["correct answer"], said["predicted answer"]))
    return str({"pred": "yes" if right == told else "no", "score": 5 if right == told else 0})


if __name__ == "__main__":
    run(main)
