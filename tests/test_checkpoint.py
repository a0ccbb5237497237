"""Checkpoints: bit-equal, refused when they are another run's, set aside when they are damaged."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from redvillm_jax.training import checkpoint

IDENTITY = {"base": "a" * 64, "data": "d" * 64}
STATE = {
    "trainable": {"spatial": {"w": jnp.arange(4096.0).reshape(64, 64), "b": jnp.full((3,), jnp.nan)}},
    "optimizer": (jnp.int32(3), jnp.ones((2, 3), jnp.bfloat16)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1, 2 and 3 were saved, 2 and 3 are kept; the state of step n is STATE with n as its counter."""
    folder = tmp_path_factory.mktemp("run")
    with checkpoint.open_checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, step, at(step), config={}, identity=IDENTITY)
            checkpoints.wait()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def at(step: int) -> dict:
    return STATE | {"optimizer": (jnp.int32(step), STATE["optimizer"][1])}


def restore(run, state=STATE, identity=IDENTITY):
    found = checkpoint.restore(run, jax.tree.map(jnp.zeros_like, state), identity=lambda _: identity)
    checkpoint.open_checkpoints(run, keep=2).close()  # takes what is left
    return found


def names(run) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def assert_restored(run, step: int) -> None:
    found, state = restore(run)
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, state, at(step))


def test_the_newest_come_back_bit_equal(run):
    assert names(run) == {"2", "3"}
    assert_restored(run, 3)
    assert names(run) == {"2", "3"}


def test_of_other_weights_are_refused_and_stay(run):
    for identity, message in (({"base": "b" * 64}, "trained on base aaaa"), ({"data": "b" * 64}, "trained on data")):
        with pytest.raises(UserError, match=message):
            restore(run, identity=IDENTITY | identity)
    with pytest.raises(UserError, match=r"other trainable weights than this config: .*\['w'\] differ"):
        restore(run, STATE | {"trainable": {"spatial": {"w": jnp.zeros((64, 65)), "b": jnp.zeros(3)}}})
    assert names(run) == {"2", "3"}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_changed_byte_is_found_or_changes_nothing(copy, capsys):
    """Whatever byte of whatever file: wrong weights never come back as if they were right."""
    newest, found = copy / "checkpoints" / "3", 0
    whole = copy.parent / "whole"
    shutil.copytree(newest, whole)
    for file in files(newest):
        size = file.stat().st_size
        for place in sorted({0, size // 3, size // 2, size - 1} if size else ()):
            data = bytearray(file.read_bytes())
            data[place] ^= 0x10
            file.write_bytes(data)
            step, state = restore(copy)
            jax.tree.map(np.testing.assert_array_equal, state, at(step))
            if step == 2:
                found += 1
                assert (copy / "checkpoints" / "3.corrupt").is_dir() and names(copy) == {"2", "3.corrupt"}
                assert "note: checkpoint 3 is damaged (" in capsys.readouterr().err
                shutil.rmtree(copy / "checkpoints" / "3.corrupt")
            else:
                assert step == 3
                shutil.rmtree(newest)
            shutil.copytree(whole, newest)
    assert found > 10


def test_a_truncated_file_is_found(copy):
    for file in files(copy / "checkpoints" / "3"):
        if file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_restored(copy, 2)
    assert names(copy) == {"2", "3.corrupt"}


def test_when_all_are_damaged_training_stops_until_somebody_decides(copy, capsys):
    (copy / "checkpoints" / "3.corrupt").mkdir()  # of an earlier time
    for step in (2, 3):
        for file in files(copy / "checkpoints" / str(step)):
            file.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint is damaged .*; put back .* or, to start over"):
            restore(copy)
        assert names(copy) == {"2.corrupt", "3.corrupt", "3.corrupt.2"}
    assert len(capsys.readouterr().err.splitlines()) == 2
    (copy / "config.json").write_text('{"base": "b"}')
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load_trainables(copy)
    shutil.rmtree(copy / "checkpoints")
    assert restore(copy)[0] == 0


def test_files_that_others_put_there_do_not_matter(copy):
    newest = copy / "checkpoints" / "3"

    def put(*names):
        for name in names:
            (newest / name).parent.mkdir(exist_ok=True)
            (newest / name).write_text("not Orbax's")

    put(".DS_Store", "trainable/.DS_Store", "trainable/d/._x", ".git/HEAD")
    sums = newest / "SHA256SUMS"
    whole = sums.read_text()
    sums.write_text(whole.split("\n", 1)[1])  # as it was written before it had a count
    assert_restored(copy, 3)
    put("notes.txt", "mine/x")
    sums.write_text(whole)
    assert_restored(copy, 3)
    sums.write_text(whole.split("\n", 1)[1])
    assert_restored(copy, 2)


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints: is a file, expected a folder or nothing"):
        checkpoint.saved_steps(tmp_path)


@pytest.mark.parametrize("lines", [0, 1, -1])
def test_a_list_of_hashes_that_is_cut_is_damaged(lines, copy):
    sums = copy / "checkpoints" / "3" / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:lines]))
    assert_restored(copy, 2)


def test_other_names_than_orbax_gives_are_no_checkpoints(copy):
    there = copy / "checkpoints"
    for name in (folders := {"075", "²", "7²", "٣", "3.copy", "4 (1)", "checkpoint"}):
        (there / name).mkdir()
    for name in (files := {"75", "076", "¹"}):
        (there / name).touch()
    assert checkpoint.saved_steps(copy) == [3, 2]
    assert_restored(copy, 3)
    assert names(copy) == {"2", "3", *folders, *files}
    (copy / "config.json").write_text('{"base": "b"}')
    assert checkpoint.load_trainables(copy)[0]["step"] == 3


def test_a_whole_one_that_cannot_be_read_is_not_set_aside(copy, monkeypatch):
    def fail(*_):
        raise OSError("connection reset")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(UserError, match=r"is whole and cannot be read .*connection reset"):
        restore(copy)
    assert names(copy) == {"2", "3"}


def test_a_checkpoint_says_what_it_is_and_standard_tools_can_check_it(run):
    saved = checkpoint.read_description(run / "checkpoints" / "3")
    assert saved["identity"] == IDENTITY and saved["manifest"]["['optimizer'][1]"] == [2, 3]
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=run / "checkpoints" / "3")
    assert checked.returncode == 0
