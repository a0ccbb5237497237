"""From published question files over generated videos to judged answers, through every command, in two languages.

The model is the project's own tiny LLaVA before training: it answers its own kind of question sensibly and others with
odd words, so that there is something of everything to be judged.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from test_translate import MODEL, environment

from benchmarks.judge_demo import CHINESE_TO_ENGLISH, ENGLISH_TO_CHINESE
from benchmarks.judge_demo import judge as rule
from benchmarks.judge_demo import translate as table
from conversion import from_torch
from data_pipeline import prepare, translate
from data_pipeline.common.errors import UserError
from redvillm_jax import evaluate, judge
from redvillm_jax.evaluation.comparison import compare
from redvillm_jax.evaluation.scoring import OWN
from tests.fake_openai import FakeOpenAI

__all__ = ["environment"]  # a fixture for every test here, too
ROOT = Path(__file__).parents[1]
FIRST, COUNT = "Which colour appears first?", "How many shapes are there?"
PAIR = r"(?s)irst question: (.*)\nSecond question: (.*)\nCorrect answer to both: (.*)\nPredicted answer to the first "
PAIR += r"question: (.*)\nPredicted answer to the second question: (.*?)\n"
SINGLE = r"(?s)\nQuestion: (.*)\nCorrect answer: (.*)\nPredicted answer: (.*?)\n\n"
ASPECTS = {"factual": "correctness", "detail": "detail", "context": "context", "time": "temporal"}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def published(folder):
    """Four sets as they are published: {name: what --instructions is given}."""
    video = "train-{:05d}".format
    vcg = folder / "vcgbench"
    single = [{"Q": COUNT, "A": "one", "video_name": video(i)} for i in (0, 2)]
    write(vcg / "generic_qa.json", single)
    write(vcg / "temporal_qa.json", [{"Q": FIRST, "A": "red", "video_name": video(1)}])
    write(vcg / "consistency_qa.json", [{"Q1": FIRST, "Q2": COUNT, "A": "two", "video_name": video(3)}])
    activity = folder / "activitynet_qa"
    asked = [{"video_name": video(i), "question": COUNT, "question_id": f"v_{i}"} for i in range(4)]
    answers = [{"answer": "one two".split()[i % 2], "type": 7, "question_id": f"v_{i}"} for i in (3, 2, 1, 0)]
    write(activity / "test_q.json", asked)
    write(activity / "test_a.json", answers)
    choice = {"question": COUNT, "candidates": ["right", "middle"], "answer": "right"}  # it names a place among options
    mvbench = folder / "mvbench"
    write(mvbench / "count.json", [{"video": f"{video(i)}.mp4", **choice} for i in (0, 1, 2)])
    write(mvbench / "part.json", [{"video": f"{video(i)}.mp4", "start": 1, "end": 3.5, **choice} for i in (2, 3)])
    tries = [
        {"video": f"{video(i)}.mp4", "question": FIRST if (i, j) == (0, 3) else COUNT, "type": "cnt", "try": j}
        | {
            "options": ["right", "middle"][:: -1 if i and j % 2 == 0 else 1],
            "gt": "middle" if (i, j) == (2, 1) else "right",
        }
        for i in (0, 1, 2)
        for j in range(4)
    ]
    write(folder / "vnbench" / "VNBench-main-4try.json", tries)
    return {name: folder / name for name in ("vcgbench", "activitynet_qa", "mvbench", "vnbench")}


def in_chinese(source, out, *more):
    with FakeOpenAI(table) as server:
        flags = [f"--input={source}", f"--out={out}", f"--model={MODEL}", f"--base_url={server.url}"]
        assert translate.main([*flags, *more]) == 0
    return out


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, videos):
    """The answers to four published sets and to the videos' own questions, and to the translations of both."""
    folder = tmp_path_factory.mktemp("judged")
    source = ROOT / "redvillm_jax" / "demo" / "bases" / "llava"
    from_torch.main(["--family=llava", f"--source={source}", f"--out={folder / 'base'}"])
    common = [f"--videos={videos / 'videos'}", f"--base={folder / 'base'}", "--num_frames=16", "--num_workers=1"]
    stored = []
    for name, path in published(folder / "published").items():
        prepare.main([*common, f"--benchmark={name}", f"--instructions={path}", f"--out={folder / name}"])
        stored.append(folder / name / "instructions.jsonl")
    own = folder / "own.jsonl"
    english = [row for row in lines(videos / "instructions.jsonl") if row["language"] == "en"]
    own.write_text("".join(json.dumps(row) + "\n" for row in english))
    chinese = [in_chinese(own, folder / "zh" / "own_zh.jsonl")]
    chinese += [in_chinese(path, folder / "zh" / f"{path.parent.name}_zh.jsonl") for path in stored[:2]]
    files = [f"--instructions={path}" for path in (own, *stored, *chinese)]
    prepare.main([*common, *files, f"--out={folder / 'all'}"])
    model = [f"--model={folder / 'base'}", f"--config={ROOT / 'configs' / 'demo.py'}:llava"]
    evaluate.main([*model, f"--data={folder / 'all'}", f"--out={folder / 'answers'}", "--max_new_tokens=3"])
    return folder


@pytest.fixture(scope="module")
def answered(evaluated):
    return lines(evaluated / "answers" / "answers.jsonl")


def scores(messages):
    """yes or no by comparison; VCGBench's aspects by the prediction's length, a pair by whether it agrees."""
    system, text = (message["content"] for message in messages)
    if found := re.search(PAIR, text):
        return str({"score": pair_score(*found.groups()[3:])})
    aspect = next((aspect for word, aspect in ASPECTS.items() if word in system.split(".")[0]), None)
    if aspect is None:
        return rule(messages)
    return str({"score": score(aspect, re.search(SINGLE, text)[3])})


def score(aspect, prediction):
    return (len(prediction) + len(aspect)) % 6


def pair_score(first, second):
    return 5 if first == second else 2


@pytest.fixture(scope="module")
def judged(evaluated):
    """(metrics by set, verdicts, what the server was asked)."""
    with pytest.MonkeyPatch.context() as patch, FakeOpenAI(scores) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("OPENAI_API_KEY", "none")
        flags = [f"--answers={evaluated / 'answers'}", f"--model={MODEL}", f"--base_url={server.url}"]
        assert judge.main([*flags, f"--out={evaluated / 'judged'}"]) == 0
        texts = server.texts
    summary = json.loads((evaluated / "judged" / "summary.json").read_text())
    return summary["benchmarks"], lines(evaluated / "judged" / "verdicts.jsonl"), texts


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values))


def of(rows, **fields):
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def right(row):
    return row["prediction"] == row["answer"]


def test_published_systems_keep_their_fields_through_translation_and_a_second_prepare(evaluated, answered):
    by_id = {row["id"]: row for row in answered}
    for name in ("vcgbench", "activitynet_qa", "mvbench", "vnbench"):
        for asked in lines(evaluated / name / "instructions.jsonl"):
            assert {key: by_id[asked["id"]][key] for key in asked} == asked
            if name in ("mvbench", "vnbench"):
                continue
            chinese = by_id[f"{asked['id']}-zh"]
            assert chinese["question"] == ENGLISH_TO_CHINESE[asked["question"]] and chinese["language"] == "zh"
            assert (chinese["source_question"], chinese["source_answer"]) == (asked["question"], asked["answer"])
            assert all(chinese.get(key) == asked.get(key) for key in ("video", "benchmark", "kind"))
            assert chinese.get("group") == (f"{asked['group']}-zh" if "group" in asked else None)
    assert {row["video"] for row in of(answered, kind="part")} == {"train-00002#1-3.5", "train-00003#1-3.5"}


def test_accuracy_of_short_answers_is_their_exact_match(evaluated, answered, judged):
    before = json.loads((evaluated / "answers" / "summary.json").read_text())["benchmarks"]
    for name, rows in (
        (OWN, of(answered, benchmark=None)),
        ("activitynet_qa", of(answered, benchmark="activitynet_qa")),
    ):
        found = judged[0][name]["metrics"]
        assert found["accuracy"] == found["exact_match"] == before[name]["metrics"]["exact_match"]
        for language in ("en", "zh"):
            expected = [right(row) for row in of(rows, language=language)]
            assert found["accuracy"][f"language:{language}"]["mean"] == mean(expected)
            assert found["score"][f"language:{language}"]["mean"] == mean(5 * hit for hit in expected)
            assert 0 < sum(expected) < len(expected), "or this test could not fail"


def test_the_judge_sees_every_prediction_and_none_twice(answered, judged):
    texts = [match.groups() for text in judged[2] if (match := re.search(SINGLE, text))]
    generic, others = Counter(), Counter()
    for row in answered:
        if "choices" not in row and row.get("kind") != "consistency":
            one = (row["question"], row["answer"], row["prediction"])
            if row.get("benchmark") == "vcgbench":
                generic[one] = max(generic[one], 3 if row["kind"] == "generic" else 1)
            else:
                others[one] = 1
    assert Counter(texts) == generic + others


def test_vcgbench(answered, judged):
    rows, found = of(answered, benchmark="vcgbench"), judged[0]["vcgbench"]["metrics"]["score"]
    for kind, aspects in {"generic": ("correctness", "detail", "context"), "temporal": ("temporal",)}.items():
        for aspect in aspects:
            expected = mean(score(aspect, row["prediction"]) for row in of(rows, kind=kind))
            assert found[f"aspect:{aspect}"]["mean"] == expected
    pairs = [match.groups() for text in judged[2] if (match := re.search(PAIR, text))]
    expected = []
    for language in ("en", "zh"):
        first, second = of(rows, kind="consistency", language=language)
        predictions = first["prediction"], second["prediction"]
        expected.append((first["question"], second["question"], first["answer"], *predictions))
    assert sorted(pairs) == sorted(expected), "each pair once, with both predictions, languages apart"
    assert found["aspect:consistency"]["mean"] == mean(pair_score(*pair[3:]) for pair in expected)
    verdicts = of(judged[1], aspect="consistency")
    assert [(v["id"], v["question_id"]) for v in verdicts] == [
        ("consistency/0", "consistency/0"),
        ("consistency/0-zh", "consistency/0"),
    ]


def hit(row):
    """Whether a prediction is the text of the right option."""
    return f"{row['answer']}. {row['prediction']}" in row["choices"]


def test_multiple_choice(answered, judged):
    rows, found = of(answered, benchmark="mvbench"), judged[0]["mvbench"]["metrics"]["accuracy"]
    tasks = {kind: [hit(row) for row in of(rows, kind=kind)] for kind in ("count", "part")}
    for kind, hits in tasks.items():
        assert found[f"kind:{kind}"]["mean"] == mean(hits)
    assert found["all"]["mean"] == mean(tasks["count"] + tasks["part"]) and 0 < found["all"]["mean"] < 1
    assert found["mean"]["mean"] == mean(sum(hits) / len(hits) for hits in tasks.values())
    groups = [[hit(row) for row in of(answered, group=f"train-0000{i}")] for i in (0, 1, 2)]
    assert list(map(len, groups)) == [4, 4, 4] and any(map(all, groups)) and any(0 < sum(g) < 4 for g in groups)
    found = judged[0]["vnbench"]["metrics"]
    assert found["accuracy"]["all"]["mean"] == mean(map(all, groups))
    assert found["accuracy_of_tries"]["all"]["mean"] == mean(hit for group in groups for hit in group)


def test_translated_predictions_meet_the_english_annotations(evaluated, answered, tmp_path):
    back = in_chinese(evaluated / "answers" / "answers.jsonl", tmp_path / "b.jsonl", "--to=en", "--fields=prediction")
    asked_in_english = tmp_path / "english.jsonl"
    english = of(answered, language="en")
    asked_in_english.write_text("".join(json.dumps(row) + "\n" for row in english))
    with FakeOpenAI(scores) as server:
        for name, source in (("en", back), ("english", asked_in_english)):
            flags = [f"--answers={source}", f"--model={MODEL}", f"--base_url={server.url}"]
            assert judge.main([*flags, f"--out={tmp_path / name}"]) == 0
    hits = {}
    for row in of(answered, language="zh", benchmark=None):
        said = CHINESE_TO_ENGLISH.get(row["prediction"], row["prediction"])
        hits[row["id"].removesuffix("-zh")] = said == row["source_answer"]
    verdicts = of(lines(tmp_path / "en" / "verdicts.jsonl"), benchmark=OWN)
    assert {v["question_id"]: v["values"]["accuracy"] for v in verdicts} == hits
    assert sum(hits.values()) > sum(map(right, of(answered, language="zh", benchmark=None))), (
        "left is 向左 or 左边: cn loses"
    )
    found = compare(tmp_path / "english", tmp_path / "en")
    difference = mean(hits[row["id"]] - right(row) for row in of(english, benchmark=None))
    assert found[OWN]["metrics"]["accuracy"]["all"]["mean"] == difference
    assert found["vcgbench"]["common"] == 2 * 3 + 1 + 1 and found["vcgbench"]["only_first"] == 0


def test_multiple_choice_is_not_translated(evaluated, tmp_path):
    source = evaluated / "mvbench" / "instructions.jsonl"
    with pytest.raises(UserError) as error:
        in_chinese(source, tmp_path / "zh.jsonl")
    assert str(error.value) == (
        f"{source}: line with id 'count/0': is multiple choice ('choices'), whose question cannot be translated: the "
        "options in the question would not be those it is scored by"
    )
