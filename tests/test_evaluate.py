"""The evaluation command: from a run and from a base, in the store's order, idempotent; what it refuses."""

import json
from pathlib import Path

import pytest
from test_train import make_config

from data_pipeline.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import evaluate, train

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, bases, stores):
    """A short run and its evaluation on its own training videos."""
    folder = tmp_path_factory.mktemp("evaluated")
    train.train(make_config("llava", bases["llava"], stores["llava"]), folder / "run")
    arguments = [
        f"--model={folder / 'run'}",
        f"--data={stores['llava']}",
        f"--out={folder / 'out'}",
        "--max_new_tokens=3",
    ]
    evaluate.main(arguments)
    return folder, arguments


def test_answers_keep_the_order_and_all_fields(evaluated, stores):
    rows = [json.loads(line) for line in (evaluated[0] / "out" / "answers.jsonl").read_text().splitlines()]
    asked = open_store(stores["llava"]).instructions
    assert [{key: row[key] for key in asked[0]} for row in rows] == asked
    assert all(isinstance(row["prediction"], str) for row in rows)


def test_the_batch_size_changes_no_answer(evaluated, tmp_path):
    folder, arguments = evaluated
    evaluate.main([*arguments, f"--out={tmp_path}", "--batch_size=8"])
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "out" / "answers.jsonl").read_text()


def test_a_second_run_does_nothing(evaluated, capsys):
    folder, arguments = evaluated
    before = (folder / "out" / "answers.jsonl").stat().st_mtime_ns
    evaluate.main(arguments)
    assert "is whole already" in capsys.readouterr().out
    assert (folder / "out" / "answers.jsonl").stat().st_mtime_ns == before


def test_a_base_alone_is_the_untrained_video_llm(bases, stores, tmp_path):
    arguments = [f"--model={bases['llava']}", f"--data={stores['llava']}", f"--out={tmp_path}", "--max_new_tokens=2"]
    with pytest.raises(UserError, match="give its switches with --config"):
        evaluate.main(arguments)
    evaluate.main([*arguments, f"--config={DEMO}:llava", "--config.num_frames=4"])
    assert json.loads((tmp_path / "summary.json").read_text())["questions"] == 72


def test_score_counts_by_kind_and_language():
    rows = [
        {"kind": "colour", "language": "en", "answer": "Red", "prediction": " red"},
        {"kind": "colour", "language": "zh", "answer": "红色", "prediction": "绿色"},
        {"kind": "count", "language": "zh", "answer": "两个", "prediction": "两个"},
    ]
    summary = evaluate.score(rows)
    assert summary["exact_match"] == {
        "all": 2 / 3,
        "kind:colour": 0.5,
        "kind:count": 1.0,
        "language:en": 1.0,
        "language:zh": 0.5,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model=", "--model is needed"),
        ("--model=/nowhere", "not a run directory"),
        ("--batch_size=0", "expected a positive integer"),
        ("--max_new_tokens=many", "expected a positive integer"),
        ("--data=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(evaluated, change, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([*evaluated[1], change])
    assert "\n" not in str(error.value)
