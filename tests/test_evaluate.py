"""The evaluation command: runs and bases, several processes and devices, kills; scores; what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_distributed import finish, launch
from test_train import make_config

from data_pipeline.common.errors import UserError
from data_pipeline.store import VideoStore, open_store
from redvillm_jax import encode, evaluate, train

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.py"


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


def test_batches_and_devices_change_no_answer(evaluated, tmp_path):
    folder, arguments = evaluated
    evaluate.main([*arguments, f"--out={tmp_path}", "--batch_size=8", "--video_batch_size=1", "--tensor=4"])
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "out" / "answers.jsonl").read_text()


def test_two_processes_share_the_videos(evaluated, tmp_path):
    folder, arguments = evaluated
    outputs = finish(launch(2, ["-m", "redvillm_jax.evaluate", *arguments, f"--out={tmp_path}"], devices=2))
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "out" / "answers.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "summary.json"]
    assert "72 questions about 12 videos" in outputs[0][0] and "questions" not in outputs[1][0]


def test_a_killed_evaluation_continues_without_asking_again(evaluated, tmp_path, monkeypatch):
    folder, arguments = evaluated
    arguments = [*arguments, f"--out={tmp_path}"]
    command = [sys.executable, "-m", "redvillm_jax.evaluate", *arguments, "--batch_size=1", "--video_batch_size=1"]
    part = tmp_path / "answers.jsonl.part0"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not part.exists() or part.read_text().count("\n") < 5:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    known = part.read_text()
    done = [json.loads(line)["number"] for line in known.split("\n")[1:-1]]
    assert 4 <= len(done) < 72 and not (tmp_path / "answers.jsonl").exists()
    with part.open("ab") as file:
        file.write('{"number": 71, "answer": "狗'.encode()[:-1])  # the line that a kill cut

    with pytest.raises(UserError, match="part0: holds answers that were begun with generation="):
        evaluate.main([*arguments, "--temperature=1"])
    written = []
    write = evaluate.AnswerLog.write
    monkeypatch.setattr(evaluate.AnswerLog, "write", lambda self, new: written.extend(new) or write(self, new))
    evaluate.main(arguments)
    assert sorted(done + written) == list(range(72))
    assert (tmp_path / "answers.jsonl").read_text() == (folder / "out" / "answers.jsonl").read_text()


def test_answers_are_kept_until_they_are_scored(evaluated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "summarize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate.main([*evaluated[1], f"--out={tmp_path}"])
    monkeypatch.setattr(evaluate.AnswerLog, "write", lambda self, new: pytest.fail("asked again"))
    evaluate.main([*evaluated[1], f"--out={tmp_path}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "summary.json"]


def test_a_video_without_numbers_has_no_answers_and_counts_nowhere(bases, stores, tmp_path, monkeypatch, capsys):
    streams = tmp_path / "streams"
    config = [f"--config={DEMO}:llava", "--config.num_frames=4"]
    encode.main([*config, f"--config.base={bases['llava']}", f"--data={stores['llava']}", f"--out={streams}"])
    arguments = [f"--model={bases['llava']}", *config, f"--data={streams}", "--max_new_tokens=2"]
    assert evaluate.main([*arguments, f"--out={tmp_path / 'good'}"]) == 0
    read = VideoStore.__getitem__

    def spoilt(store, index):
        return {k: np.full_like(v, np.nan) if k != "video" and index == 3 else v for k, v in read(store, index).items()}

    out = tmp_path / "spoilt"
    with monkeypatch.context() as patch:
        patch.setattr(VideoStore, "__getitem__", spoilt)
        assert evaluate.main([*arguments, f"--out={out}"]) == 1
        assert "6 unanswered, left out" in capsys.readouterr().out
    good, bad = (
        [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "good", out)
    )
    lost = open_store(streams).videos[3]["video"]
    assert sum(row["video"] == lost for row in good) == 6
    for want, got in zip(good, bad, strict=True):
        assert (
            (got["prediction"] is None and "numbers that are none" in got["error"])
            if got["video"] == lost
            else got == want
        )
    summary = json.loads((out / "summary.json").read_text())["benchmarks"]["own questions"]
    assert summary["statuses"] == {"scored": 66, "unanswered": 6}
    assert summary["metrics"]["exact_match"]["all"]["questions"] == 66
    hits = [row["prediction"].lower() == row["answer"].lower() for row in bad if row["video"] != lost]
    assert summary["metrics"]["exact_match"]["all"]["mean"] == pytest.approx(sum(hits) / 66)

    # the same command tries those again, and nothing else
    written, write = [], evaluate.AnswerLog.write
    monkeypatch.setattr(evaluate.AnswerLog, "write", lambda self, new: written.extend(new) or write(self, new))
    assert evaluate.main([*arguments, f"--out={out}"]) == 0
    assert sorted(written) == [i for i, row in enumerate(bad) if row["prediction"] is None]
    assert (out / "answers.jsonl").read_text() == (tmp_path / "good" / "answers.jsonl").read_text()


def test_a_second_run_does_nothing(evaluated, capsys):
    folder, arguments = evaluated
    before = (folder / "out" / "answers.jsonl").stat().st_mtime_ns
    evaluate.main(arguments)
    assert "is finished already" in capsys.readouterr().out
    assert (folder / "out" / "answers.jsonl").stat().st_mtime_ns == before


def test_answers_that_were_changed_are_given_anew(evaluated, tmp_path, capsys):
    folder, arguments = evaluated
    whole = (folder / "out" / "answers.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    rows[3]["prediction"] += "!"
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(folder / "out" / "summary.json", tmp_path)
    evaluate.main([*arguments, f"--out={tmp_path}"])
    assert (tmp_path / "answers.jsonl").read_text() == whole
    assert "was changed after it was written; all questions are answered again" in capsys.readouterr().err
    text = (tmp_path / "summary.json").read_text()
    (tmp_path / "summary.json").write_text(text.replace('"questions": 72', '"questions": 71'))
    with pytest.raises(UserError, match=r"summary\.json: was changed after it was written"):
        evaluate.main([*arguments, f"--out={tmp_path}"])


def test_files_of_others_are_not_replaced(evaluated, tmp_path):
    for name, text in (("answers.jsonl", "mine"), ("summary.json", '{"benchmarks": {}}'), ("summary.json", "[")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: .*was not written by this command") as error:
            evaluate.main([*evaluated[1], f"--out={tmp_path}"])
        assert "\n" not in str(error.value)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, text)]
        (tmp_path / name).unlink()


def test_a_base_alone_is_the_untrained_video_llm(bases, stores, tmp_path):
    arguments = [f"--model={bases['llava']}", f"--data={stores['llava']}", f"--out={tmp_path}", "--max_new_tokens=2"]
    with pytest.raises(UserError, match="give its switches with --config"):
        evaluate.main(arguments)
    evaluate.main([*arguments, f"--config={DEMO}:llava", "--config.num_frames=4"])
    assert json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["own questions"]["questions"] == 72


def test_text_only_asks_without_the_video(evaluated, bases, stores, tmp_path):
    """A run then answers as its base does: what was trained makes nothing but visual tokens."""
    untrained = [f"--model={bases['llava']}", f"--config={DEMO}:llava", "--config.num_frames=4", "--max_new_tokens=3"]
    evaluate.main([*evaluated[1], f"--out={tmp_path / 'run'}", "--text_only"])
    evaluate.main([*untrained, f"--data={stores['llava']}", f"--out={tmp_path / 'base'}", "--text_only"])
    run, base = (
        [json.loads(line) for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()]
        for name in ("run", "base")
    )
    assert [row["prediction"] for row in run] == [row["prediction"] for row in base]
    assert all("[0 visual tokens]" in row["prompt"] and "num_frames" not in row for row in run)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["made_with"]["text_only"] is True
    said = {}
    for row in run:
        said.setdefault(row["question"], set()).add(row["prediction"])
    assert max(map(len, said.values())) == 1 < len({row["prediction"] for row in run})
    with_video = (evaluated[0] / "out" / "answers.jsonl").read_text().splitlines()
    assert [row["prediction"] for row in run] != [json.loads(line)["prediction"] for line in with_video]


def test_the_summary_scores_every_kind(evaluated):
    rows = [json.loads(line) for line in (evaluated[0] / "out" / "answers.jsonl").read_text().splitlines()]
    summary = json.loads((evaluated[0] / "out" / "summary.json").read_text())
    found = summary["benchmarks"]["own questions"]["metrics"]["exact_match"]
    for group, chosen in {
        "all": rows,
        **{f"kind:{kind}": [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}},
    }.items():
        hits = [row["prediction"].lower() == row["answer"].lower() for row in chosen]
        assert found[group]["mean"] == pytest.approx(sum(hits) / len(hits)), group
        assert found[group]["questions"] == len(hits)


def test_one_language_of_a_store(evaluated, tmp_path):
    evaluate.main([*evaluated[1], f"--out={tmp_path}", "--language=zh"])
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    both = [json.loads(line) for line in (evaluated[0] / "out" / "answers.jsonl").read_text().splitlines()]
    assert rows == [row for row in both if row["language"] == "zh"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model=", "--model is needed"),
        ("--model=/nowhere", "not a run directory"),
        ("--batch_size=0", "expected a positive integer"),
        ("--max_new_tokens=many", "expected a whole number"),
        ("--language=fr", "has questions in en, zh"),
        ("--benchmark=mmbench", "expected one of vcgbench, msvd_qa"),
        ("--data=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(evaluated, change, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([*evaluated[1], change])
    assert "\n" not in str(error.value)
