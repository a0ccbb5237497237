"""Published sets from their files to verdicts: prepare, evaluate, judge, with what the judge is shown."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline import prepare
from redvillm_jax import evaluate, judge
from redvillm_jax.evaluation.scoring import ASPECTS
from tests.fake_openai import FakeOpenAI

CONFIG = [f"--config={Path(__file__).parents[1] / 'configs/demo.py'}:llava", "--config.num_frames=4"]
MODEL = "rules-2026-01-01"


def write_sets(folder: Path, names: list[str]) -> dict[str, Path]:
    """Small files in the published forms, about these videos."""
    files: dict[str, object] = {}
    mvbench = [
        {"video": f"{names[i]}.mp4", "question": "What?", "candidates": ["left", "right"], "answer": right}
        for i, right in enumerate(("left", "right", "left"))
    ]
    files["mvbench/moving.json"] = mvbench
    files["vnbench/VNBench-main-4try.json"] = [
        {"video": f"{name}.mp4", "question": "What?", "options": list("1234"), "gt": gt, "type": "ret", "try": i}
        for name, answers in ((names[0], "1111"), (names[1], "1234"))
        for i, gt in enumerate(answers)
    ]
    files["vcgbench/generic_qa.json"] = [{"Q": "What happens?", "A": "A circle moves.", "video_name": names[0]}]
    files["vcgbench/temporal_qa.json"] = [{"Q": "What is last?", "A": "A square.", "video_name": names[1]}]
    files["vcgbench/consistency_qa.json"] = [
        {"Q1": "What is red?", "Q2": "Which shape is red?", "A": "The cross.", "video_name": names[2]}
    ]
    files["activitynet_qa/test_q.json"] = [
        {"question": f"is it {i}", "question_id": str(i), "video_name": names[i]} for i in range(3)
    ]
    files["activitynet_qa/test_a.json"] = [{"answer": "yes", "question_id": str(i), "type": 3} for i in range(3)]
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def answered(tmp_path_factory, bases, videos) -> dict[str, Path]:
    """The folder of answers to each set, by an untrained model."""
    folder = tmp_path_factory.mktemp("sets")
    names = sorted(path.stem for path in (videos / "videos").glob("*.mp4"))
    (folder / "files").mkdir()
    found = {}
    for name, path in write_sets(folder / "files", names).items():
        given = [f"--videos={videos / 'videos'}", f"--instructions={path}", f"--benchmark={name}", "--num_frames=4"]
        prepare.main([*given, f"--base={bases['llava']}", "--num_workers=1", f"--out={folder / f'{name}-frames'}"])
        asked = [f"--model={bases['llava']}", *CONFIG, f"--data={folder / f'{name}-frames'}", "--max_new_tokens=4"]
        evaluate.main([*asked, f"--out={folder / name}"])
        found[name] = folder / name
    return found


def replace_predictions(folder: Path, out: Path, predictions: list[str]) -> Path:
    """The same answers with other words: a random model says nothing that could be right."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    rows = [row | {"prediction": said} for row, said in zip(rows, predictions, strict=True)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def metrics(out: Path, name: str) -> dict[str, dict]:
    return json.loads((out / "summary.json").read_text())["benchmarks"][name]["metrics"]


def test_every_answer_names_its_set(answered):
    for name, folder in answered.items():
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert {row["benchmark"] for row in rows} == {name} and all(isinstance(row["prediction"], str) for row in rows)


def test_multiple_choice_needs_no_judge(answered, tmp_path):
    said = replace_predictions(answered["mvbench"], tmp_path / "a.jsonl", ["A", "The answer is (A).", "B. right"])
    assert judge.main([f"--answers={said}", f"--out={tmp_path / 'mv'}"]) == 0
    assert metrics(tmp_path / "mv", "mvbench")["accuracy"]["all"]["mean"] == pytest.approx(1 / 3)
    tries = ["A", "A", "A", "A", "A", "B", "C", "C"]  # all four of the first video, three of the second
    said = replace_predictions(answered["vnbench"], tmp_path / "b.jsonl", tries)
    assert judge.main([f"--answers={said}", f"--out={tmp_path / 'vn'}"]) == 0
    found = metrics(tmp_path / "vn", "vnbench")
    assert found["accuracy"]["all"]["mean"] == 0.5 and found["accuracy_of_tries"]["all"]["mean"] == 7 / 8


def test_short_answers_are_judged(answered, tmp_path):
    def verdict(messages):
        right = re.search(r"Predicted answer: yes$", messages[-1]["content"], re.M)
        return str({"pred": "yes", "score": 4.8} if right else {"pred": "no", "score": 1})

    said = replace_predictions(answered["activitynet_qa"], tmp_path / "a.jsonl", ["yes", "no", "yes"])
    with FakeOpenAI(verdict) as server:
        arguments = [f"--answers={said}", f"--out={tmp_path / 'out'}", f"--model={MODEL}", f"--base_url={server.url}"]
        assert judge.main(arguments) == 0
        assert len(server.calls) == 3
    found = metrics(tmp_path / "out", "activitynet_qa")
    assert found["accuracy"]["all"]["mean"] == pytest.approx(2 / 3)
    assert found["score"]["all"]["mean"] == pytest.approx((4 + 1 + 4) / 3)
    assert found["exact_match"]["kind:yes/no"]["mean"] == pytest.approx(2 / 3)


def test_the_five_aspects(answered, tmp_path):
    with FakeOpenAI(lambda messages: f"{{'score': {len(server.calls)}}}") as server:
        arguments = [f"--answers={answered['vcgbench']}", f"--out={tmp_path}", f"--model={MODEL}", "--concurrency=1"]
        assert judge.main([*arguments, f"--base_url={server.url}"]) == 0
        texts = server.texts
    assert len(texts) == 5  # correctness, detail, context; temporal; the pair once
    rows = [json.loads(line) for line in (answered["vcgbench"] / "answers.jsonl").read_text().splitlines()]
    pair = [row for row in rows if row["kind"] == "consistency"]
    (together,) = [text for text in texts if pair[0]["question"] in text]
    assert all(row[field] in together for row in pair for field in ("question", "answer", "prediction"))
    found = metrics(tmp_path, "vcgbench")["score"]
    assert sorted(found[f"aspect:{aspect}"]["mean"] for aspect in ASPECTS) == [1, 2, 3, 4, 5]
    assert found["mean"]["mean"] == 3
