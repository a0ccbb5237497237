"""Hashes of a folder's files: checked once, remembered, and checked anew for --check_files."""

import os
from pathlib import Path

import pytest

from data_pipeline.common import file_hashes
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import cache_folder

AGAIN = "make it again"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of two files, and a cache of its own."""
    monkeypatch.setenv("REDVILLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base" / "vision").mkdir(parents=True)
    (tmp_path / "base" / "a.bin").write_bytes(b"weights" * 1000)
    (tmp_path / "base" / "vision" / "b.bin").write_bytes(b"")
    return tmp_path / "base"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that are read."""
    names = []
    hash_files = file_hashes.hash_files
    monkeypatch.setattr(
        file_hashes, "hash_files", lambda folder, of=(): names.extend(of) or hash_files(folder, of or None)
    )
    return names


def flip(file: Path) -> None:
    """Changes a byte and nothing else that a file tells of itself."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_are_read_once_and_again_when_they_change(folder, hashed):
    hashes = file_hashes.hash_files(folder)
    assert sorted(hashes) == ["a.bin", "vision/b.bin"]
    assert hashes["vision/b.bin"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    hashed.clear()
    for _ in range(2):
        file_hashes.check_files(folder, hashes, AGAIN)
    assert sorted(hashed) == ["a.bin", "vision/b.bin"]
    os.utime(folder / "a.bin", ns=(1, 1))
    file_hashes.check_files(folder, hashes, AGAIN)
    assert hashed[2:] == ["a.bin"]
    (folder / "a.bin").write_bytes(b"Weights" * 1000)
    for _ in range(2):  # what is damaged is not remembered
        with pytest.raises(UserError, match=r"a\.bin: is not as it was when the folder was made; make it again"):
            file_hashes.check_files(folder, hashes, AGAIN)
    (folder / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin: No such file"):
        file_hashes.check_files(folder, hashes, AGAIN)


def test_check_files_reads_what_was_read_before(folder, hashed, monkeypatch):
    hashes = file_hashes.hash_files(folder)
    file_hashes.check_files(folder, hashes, AGAIN)
    flip(folder / "a.bin")
    file_hashes.check_files(folder, hashes, AGAIN)  # size and time are those of before
    monkeypatch.setattr(file_hashes, "always", True)
    with pytest.raises(UserError, match=r"a\.bin: is not as it was"):
        file_hashes.check_files(folder, hashes, AGAIN)
    with pytest.raises(UserError, match="was made without hashes of its files, --check_files has nothing to compare"):
        file_hashes.check_files(folder, None, AGAIN)


def test_a_cache_that_cannot_be_used_costs_another_check(folder, hashed):
    hashes = file_hashes.hash_files(folder)
    file_hashes.check_files(folder, hashes, AGAIN)
    (memory,) = (cache_folder() / "checked").iterdir()
    for damage in (lambda: memory.write_bytes(b"\xff["), lambda: memory.write_text("[]"), memory.unlink):
        damage()
        hashed.clear()
        file_hashes.check_files(folder, hashes, AGAIN)
        assert len(hashed) == 2
    memory.unlink()
    memory.parent.rmdir()
    memory.parent.write_text("in the way")
    for _ in range(2):
        hashed.clear()
        file_hashes.check_files(folder, hashes, AGAIN)
        assert len(hashed) == 2
    for wrong in ([], {"a.bin": 3}):
        with pytest.raises(UserError, match="the hashes of its files are no hashes"):
            file_hashes.check_files(folder, wrong, AGAIN)


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("REDVILLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/redvillm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "redvillm_jax"
