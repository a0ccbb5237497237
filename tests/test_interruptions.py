"""A training that is stopped, killed, out of disk or spoilt by its data, in one real process."""

import functools
import os
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
from test_distributed import assert_bit_equal, finish, start, train, wait_for_step
from test_train import make_config

from data_pipeline.common.errors import UserError
from data_pipeline.store import VideoStore, open_store
from redvillm_jax import encode
from redvillm_jax import train as train_command
from redvillm_jax.training.diagnose import check_steps, in_words

MESH = (1, 4, 1)


@pytest.fixture(scope="module")
def config(bases, stores) -> dict:
    return make_config("llava", bases["llava"], stores["llava"], num_epochs=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, config):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(1, run, config, MESH)
    return run


def test_sigterm_saves_at_once_and_the_same_command_continues(tmp_path, config, undisturbed):
    run, config = tmp_path / "run", config | {"checkpoint_every": 100}
    started = start(1, run, config, MESH)
    wait_for_step(run, 5, started)
    started[0].send_signal(signal.SIGTERM)
    out, _ = finish(started, code=143)[0]
    step = int(re.search(r"trained to step (\d+) of 36, stopped by SIGTERM; run it again to go on", out)[1])
    assert 5 <= step < 36 and (run / "checkpoints" / str(step)).is_dir()
    assert f"continuing after step {step}" in train(1, run, config, MESH)[0][0]
    assert_bit_equal(run, undisturbed)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, config, undisturbed):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    damaged = next((run / "checkpoints" / "36" / "trainable").glob("**/d/*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    out, err = train(1, run, config, MESH)[0]
    assert f"note: checkpoint 36 is damaged (trainable/{damaged.relative_to(run / 'checkpoints/36/trainable')}" in err
    assert "continuing after step 32" in out and (run / "checkpoints" / "36.corrupt").is_dir()
    assert_bit_equal(run, undisturbed)


def test_a_full_disk_ends_in_one_line_and_the_same_command_continues(tmp_path, config, undisturbed):
    """A real one, of less than two checkpoints; skipped where it may not be mounted."""
    size = sum(file.stat().st_size for file in (undisturbed / "checkpoints" / "36").rglob("*") if file.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={int(1.9 * size)}", "tmpfs", disk]
    if os.geteuid() or subprocess.run(tmpfs, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        _, err = finish(start(1, disk / "run", config, MESH), code=2)[0]
        errors = [line for line in err.splitlines() if "error" in line.lower()]
        assert len(errors) == 1 and errors[0].startswith("error: no space left on the disk"), err
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
        assert "continuing after step 4" in train(1, disk / "run", config, MESH)[0][0]
        assert_bit_equal(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, bases, stores):
    out = tmp_path_factory.mktemp("streams") / "store"
    arguments = ["--config=configs/demo.py:llava", f"--config.base={bases['llava']}", "--config.num_frames=4"]
    encode.main([*arguments, f"--data={stores['llava']}", f"--out={out}", "--dtype=float32"])
    return out


def test_a_row_that_spoils_a_step_is_named(tmp_path, bases, streams, monkeypatch):
    """One video's features are not numbers: the first step with it stops the run, long before the next look at it."""
    config = make_config("llava", bases["llava"], streams, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    config |= {"log_every": 9, "checkpoint_every": 2, "num_epochs": 1}
    seen, to_global = [], train_command.to_global
    monkeypatch.setattr(train_command, "to_global", lambda b, mesh: seen.append(b["videos"]) or to_global(b, mesh))
    train_command.train(config, tmp_path / "good", jax.devices()[:1])
    steps = [[set(row[row >= 0].tolist()) for row in batch] for batch in seen]
    before = set().union(*steps[0], *steps[1])
    step, row, victim = next(
        (s, r, v) for s, rows in enumerate(steps) for r, videos in enumerate(rows) for v in videos - before
    )
    read = VideoStore.__getitem__

    def spoilt(store, index):
        return {
            k: np.full_like(v, np.nan) if k != "video" and index == victim else v for k, v in read(store, index).items()
        }

    monkeypatch.setattr(VideoStore, "__getitem__", spoilt)
    last = tmp_path / "run" / "checkpoints" / str(step // 2 * 2)
    with pytest.raises(UserError, match=rf"^step {step + 1}: loss nan, .*last good checkpoint: {last}\.") as error:
        train_command.train(config, tmp_path / "run", jax.devices()[:1])
    store = open_store(streams)
    name = store.videos[victim]["video"]
    rows = re.findall(r"row (\d+) \((.*?)\)", str(error.value))
    assert [int(number) for number, _ in rows] == [row]
    ids = set(re.search(rf"{name}: ([^,]*)", rows[0][1])[1].split())
    assert ids and ids <= {question["id"] for question in store.instructions if question["video"] == name}
    assert not (tmp_path / "run" / "checkpoints" / str(step // 2 * 2 + 2)).exists()


def test_a_loss_that_explodes_names_the_worst_rows():
    videos = [{"video": name} for name in ("zero", "one", "two", "three", "four")]
    questions = [{"id": f"q{i}"} for i in range(10)]
    name_row = functools.partial(in_words, videos=videos, instructions=questions)
    steps = [(((0, (0, 1)),), ((1, (6,)), (2, (7, 8)))), (((3, (2,)),), ((4, (5, 9)), (0, (3,))))]
    fine = {"loss": 5.0, "grad_norm": 1.0, "row_losses": np.array([6.0, 7.0, 0.0])}
    check_steps([fine, fine], steps, 0, 100, name_row, lambda: "none")
    bad = fine | {"loss": 14.0, "row_losses": np.array([9.0, 30.0, 0.0])}
    rows = r"row 1 \(four: q5 q9, zero: q3\); row 0 \(three: q2\)"
    with pytest.raises(UserError, match=rf"step 2: loss 14, .*above 13.8 has exploded; {rows}; .*: none"):
        check_steps([fine, bad], steps, 0, 100, name_row, lambda: "none")
    with pytest.raises(UserError, match="gradient norm nan: not a number; in no single row, but in the gradient"):
        check_steps([fine | {"grad_norm": np.nan}], steps, 1, 100, name_row, lambda: "none")
