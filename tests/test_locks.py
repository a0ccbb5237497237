"""One run at a time writes an output, and no dead one keeps others away."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fake_gcs
import pytest
from conftest import NUM_FRAMES
from test_train import make_config

from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline import prepare, show, translate
from data_pipeline.common import locks
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path
from data_pipeline.common.locks import LOCK, locked
from redvillm_jax import answer, encode, evaluate, judge, train
from redvillm_jax.demo import __main__ as demo
from redvillm_jax.demo import moving_shapes

ROOT = Path(__file__).parents[1]
HOLD = """import os, sys, time
from data_pipeline.common.locks import locked
with locked(sys.argv[1]):
    {}
    time.sleep(60)
"""
SAY = "print('held', flush=True)"


@pytest.fixture
def hurried(monkeypatch) -> None:
    """Signs of life come often, and are missed soon."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "DEAD_SECONDS", 2)


def hold(folder: Path, code: str = SAY) -> subprocess.Popen:
    """A process that holds a folder for a minute; returns when it does."""
    command = [sys.executable, "-c", HOLD.format(code), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def eventually(fact: Callable[[], bool]) -> bool:
    """Waits until something is so, for seconds at most."""
    deadline = time.monotonic() + 20
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.01)
    return fact()


def left_by(**holder) -> bytes:
    """The lock of a run that is no more."""
    return json.dumps(
        {"host": "elsewhere", "pid": 1, "since": "then", "kernel": "another", "beats": 7} | holder
    ).encode()


def test_a_second_run_is_told_who_writes_and_a_killed_one_is_nobody(tmp_path):
    folder = tmp_path / "runs" / "a"
    first = hold(folder)
    with pytest.raises(
        UserError, match=rf"^{folder}: another run \(process {first.pid} on .*, since 20.*\) is writing"
    ):
        with locked(folder):
            pass
    first.kill()
    first.wait()
    assert (folder / LOCK).exists()
    begin = time.monotonic()
    with locked(folder):
        assert time.monotonic() - begin < 1
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir())


def test_what_a_lock_made_goes_with_it(tmp_path):
    with locked(tmp_path / "runs" / "a"):
        pass
    with locked(tmp_path / "kept"):
        (tmp_path / "kept" / "x").touch()
    with locked(tmp_path / "b.jsonl", beside=True):
        assert [path.name for path in tmp_path.iterdir() if path.name != "kept"] == [f".b.jsonl{LOCK}"]
        with pytest.raises(UserError, match="is writing here"), locked(tmp_path / "b.jsonl", beside=True):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "x"]


def test_children_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    """A fork shares the kernel's lock, and outlives its parent."""
    first = hold(
        tmp_path, "child = os.fork()\n    child and print('held', flush=True)\n    child and print(child, flush=True)"
    )
    child = int(first.stdout.readline())
    try:
        first.kill()
        first.wait()
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)


def test_another_machine_is_watched_for_signs_of_life(tmp_path, hurried, capsys):
    lock = tmp_path / LOCK
    lock.write_bytes(left_by())
    with locked(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    other = "another run (process 1 on elsewhere, since then)"
    assert capsys.readouterr().err == f"note: {tmp_path}: waits up to 2 s to see whether {other} still writes here\n"

    lock.write_bytes(left_by())
    threading.Timer(0.1, lambda: lock.write_bytes(left_by(beats=8))).start()
    with pytest.raises(UserError, match=r"another run \(process 1 on elsewhere, since then\) is writing here"):
        with locked(tmp_path):
            pass
    assert lock.read_bytes() == left_by(beats=8)


def test_disks_without_locks(tmp_path, hurried, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locked(tmp_path), pytest.raises(UserError, match="is writing here"), locked(tmp_path):
        pass
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / LOCK).write_bytes(left_by(pid=process.pid, kernel=locks.kernel()))
    monkeypatch.setattr(locks, "watch", lambda *_: pytest.fail("a process of this machine that is no more"))
    with locked(tmp_path):
        pass


def test_a_run_whose_lock_is_anothers_ends(tmp_path, hurried, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(locks, "lost", lambda path: ended.set())
    with locked(tmp_path):
        first = (tmp_path / LOCK).read_bytes()
        assert eventually(lambda: (tmp_path / LOCK).read_bytes() != first) and not ended.is_set()
        (tmp_path / LOCK).unlink()  # by somebody who thinks that it is old: nobody else writes here
        time.sleep(0.2)
        assert not ended.is_set()
        (tmp_path / LOCK).write_bytes(left_by())
        assert ended.wait(20)
    assert (tmp_path / LOCK).read_bytes() == left_by()


def test_runs_that_share_a_folder(tmp_path):
    refused = pytest.raises(UserError, match="is writing here")
    with locked(tmp_path, share=(1, 2)), locked(tmp_path, share=(2, 2)):
        for share in ((1, 2), (1, 1), (3, 3)):
            with refused, locked(tmp_path, share=share):
                pass
    with locked(tmp_path), refused, locked(tmp_path, share=(1, 2)):
        pass
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f"{LOCK}-1-of-2").write_bytes(left_by(pid=process.pid, kernel=locks.kernel()))  # of a killed run
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/proc/nowhere", "/proc/self/mem", f"/tmp/{'x' * 300}"])
def test_where_no_lock_can_be_written_the_command_says_so(path):
    with locked(path), locked(path, beside=True):
        pass


def test_buckets(hurried, monkeypatch):
    refused = pytest.raises(UserError, match=rf"another run \(process {os.getpid()} on .* is writing here")
    with fake_gcs.serve("bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        folder, lock = "gs://bucket/runs/a", f"runs/a/{LOCK}"
        with locked(folder), refused, locked(folder):
            pass
        with locked(f"{folder}.jsonl", beside=True):
            assert server.names("bucket") == [f"runs/.a.jsonl{LOCK}"]
        with locked(folder, share=(1, 2)), locked(folder, share=(2, 2)):
            with refused, locked(folder):
                pass
        assert not server.names("bucket")

        server.store("bucket", lock, left_by(), {})  # of a machine that was preempted
        with locked(folder):
            assert json.loads(server.buckets["bucket"][lock].data)["pid"] == os.getpid()
        process = subprocess.Popen(["true"])
        process.wait()
        server.store("bucket", lock, left_by(pid=process.pid, kernel=locks.kernel()), {})
        with monkeypatch.context() as patch:
            patch.setattr(locks, "watch", lambda *_: pytest.fail("a process of this machine that is no more"))
            with locked(folder):
                pass

        ended = threading.Event()
        monkeypatch.setattr(locks, "lost", lambda path: ended.set())
        with locked(folder):
            assert eventually(lambda: json.loads(server.buckets["bucket"][lock].data)["beats"] > 2)
            assert not ended.is_set()
            server.store("bucket", lock, left_by(), {})
            assert ended.wait(20)
        assert server.buckets["bucket"][lock].data == left_by()
        with pytest.raises(UserError, match="gs://nowhere/run: no such bucket"), locked("gs://nowhere/run"):
            pass


def test_every_command_that_writes_takes_a_lock(bases, stores, videos, tmp_path):
    base, frames, out = bases["llava"], stores["llava"], tmp_path / "out"
    config = [f"--config={ROOT / 'configs/demo.py'}:llava", f"--config.num_frames={NUM_FRAMES}"]
    model = [f"--model={base}", *config]
    data = [f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}", f"--out={out}"]
    question = {"id": "0", "video": "v", "language": "en", "question": "What?", "answer": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(question | {"prediction": "b"}) + "\n")
    rows = f"{tmp_path / 'rows.jsonl'}"
    judged = ["--model=m", "--allow_undated", "--base_url=http://127.0.0.1:9/v1"]
    answers, translated = tmp_path / "answers.jsonl", f"--out={tmp_path / 'zh.jsonl'}"
    commands = {
        "train": lambda: train.train(make_config("llava", base, frames), out),
        "prepare": lambda: prepare.main(data),
        "encode": lambda: encode.main([*config, f"--config.base={base}", f"--data={frames}", f"--out={out}"]),
        "evaluate": lambda: evaluate.main([*model, f"--data={frames}", f"--out={out}"]),
        "judge": lambda: judge.main([f"--answers={rows}", f"--out={out}", *judged]),
        "moving_shapes": lambda: moving_shapes.main([f"--out={out}"]),
        "demo": lambda: demo.main([f"--workdir={out.parent}", "--base=llava"]),
        "from_torch": lambda: from_torch("llava", base, out),
        "to_torch": lambda: to_torch(base, out),
        "answer": lambda: answer.main([*model, f"--input={rows}", f"--output={answers}"]),
        "translate": lambda: translate.main([f"--input={rows}", translated, *judged]),
        "show": lambda: show.main([str(frames), "--stats", f"--out={tmp_path / 'sheet.png'}"]),
    }
    with (
        locked(out),
        locked(out, beside=True),
        locked(tmp_path / "llava"),
        locked(tmp_path / "zh.jsonl", beside=True),
        locked(answers, beside=True),
        locked(tmp_path / "sheet.png", beside=True),
    ):
        for name, command in commands.items():
            with pytest.raises(UserError, match=r"another run \(process .* is writing here") as error:
                command()
            assert "\n" not in str(error.value), name
        assert [file.name for file in out.iterdir()] == [LOCK], "and nothing else"
    assert not out.exists()
    assert as_path(base).is_dir()
