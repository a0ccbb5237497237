"""Folders in buckets: real commands against a stand-in of Google Cloud Storage on loopback."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import jax
import numpy as np
import pytest
from conftest import NUM_FRAMES
from test_encode import ONE
from test_train import leaves, losses, make_config

from data_pipeline.common import files
from data_pipeline.common.buckets import local_copy
from data_pipeline.common.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import train
from redvillm_jax.runtime import jsonl
from redvillm_jax.training.checkpoint import load_trainables

ROOT = Path(__file__).parents[1]
LLAVA = "--config=configs/demo.py:llava"


@pytest.fixture(scope="module")
def server(bases, stores, tmp_path_factory):
    """A server with gs://bucket/base and gs://bucket/frames, and two buckets of few permissions."""
    with (
        fake_gcs.serve("bucket", read_only=("locked",), private=("private",)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        server.upload(bases["llava"], "bucket", "base")
        server.upload(stores["llava"], "bucket", "frames")
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setenv("REDVILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield server


@pytest.fixture(scope="module")
def streams(server, bases, stores, tmp_path_factory) -> Path:
    """gs://bucket/streams, made by the command from what lies in the bucket; here the same made on the disk."""
    local = tmp_path_factory.mktemp("local") / "streams"
    common = ("encode", LLAVA, f"--config.num_frames={NUM_FRAMES}")
    here = command(*common, f"--config.base={bases['llava']}", f"--data={stores['llava']}", f"--out={local}")
    assert here.returncode == 0, here.stderr
    there = command(*common, "--config.base=gs://bucket/base", "--data=gs://bucket/frames", "--out=gs://bucket/streams")
    assert there.returncode == 0, there.stderr
    assert "train with --config.data=gs://bucket/streams" in there.stdout and "copy gs://bucket/base" in there.stderr
    return local


def command(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"redvillm_jax.{name}", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def disk(bases, streams, tmp_path_factory) -> tuple[Path, list[str]]:
    """An undisturbed run of 18 steps on the disk; the arguments of the same with base and data in the bucket."""
    config = make_config("llava", bases["llava"], streams, num_epochs=2, **ONE)
    train.train(config, folder := tmp_path_factory.mktemp("disk"), jax.devices()[:1])
    names = ("num_frames", "num_epochs", "batch_questions", "log_every", "checkpoint_every", "row_length")
    arguments = [f"--config.{name}={config[name]}" for name in names]
    arguments += [f"--config.weight_decay.{key}={value}" for key, value in config["weight_decay"].items()]
    return folder, [LLAVA, "--config.base=gs://bucket/base", "--config.data=gs://bucket/streams", *arguments]


def assert_same_run(got: Path, want: Path) -> None:
    assert losses(got) == losses(want) and len(losses(want)) == 18
    trained = leaves(got)
    for name, value in leaves(want).items():
        np.testing.assert_array_equal(trained[name], value)


def test_encode_writes_the_same_store(server, streams, tmp_path):
    copy = server.download("bucket", "streams", tmp_path)
    names = {file.relative_to(streams) for file in streams.rglob("*") if file.is_file()}
    assert {file.relative_to(copy) for file in copy.rglob("*") if file.is_file()} == names
    for name in names:
        if name.name != "report.json":  # which names the folder of the frames
            assert (copy / name).read_bytes() == (streams / name).read_bytes(), name
    report = json.loads((copy / "report.json").read_text())
    assert report == {"made_from": "gs://bucket/frames", "videos_used": 12}
    stores = [open_store(copy), pickle.loads(pickle.dumps(open_store("gs://bucket/streams")))]
    whole = open_store(streams)
    for store in stores:
        assert len(store) == len(whole) == 12 and store.instructions == whole.instructions
        for i in range(12):
            for name in ("video", "temporal", "spatial"):
                np.testing.assert_array_equal(store[i][name], whole[i][name])


def test_a_run_in_a_bucket_is_the_run_on_a_disk(server, disk, tmp_path):
    folder, arguments = disk
    result = command("train", *arguments, "--workdir=gs://bucket/run", "--config.num_workers=1")
    assert result.returncode == 0 and "trained: gs://bucket/run/checkpoints/18" in result.stdout, result.stderr
    assert_same_run(server.download("bucket", "run", tmp_path), folder)
    assert {name.split("/")[2] for name in server.names("bucket", "run/checkpoints/")} == {"16", "18"}
    assert (tmp_path / "first_batch.txt").read_text() == (folder / "first_batch.txt").read_text()
    config, _ = load_trainables("gs://bucket/run")
    assert (config["base"], config["data"], config["step"]) == ("gs://bucket/base", "gs://bucket/streams", 18)


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(server, disk, tmp_path):
    folder, arguments = disk
    arguments = [*arguments, "--workdir=gs://bucket/killed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "redvillm_jax.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 120
    while time.time() < deadline and not server.names("bucket", "killed/checkpoints/8/"):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)  # step 4 is there, step 8 in part
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert "killed/checkpoints/8/commit_success.txt" not in server.names("bucket")
    again = command("train", *arguments)
    assert again.returncode == 0 and "continuing after step 4\n" in again.stdout, again.stderr
    assert "damaged" not in again.stderr and not server.names("bucket", "killed/checkpoints/8.corrupt/")
    assert_same_run(server.download("bucket", "killed", tmp_path), folder)


def test_a_copy_follows_its_bucket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REDVILLM_CACHE", str(tmp_path))
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        server.store("bucket", f"copied/{name}", name.encode() * 1000, {})
    server.store("bucket", "copied/", b"", {})  # the console's folder

    def reads() -> list[str]:
        return [name for _, what, name in server.requests if what == "read" and name.startswith("bucket/copied/")]

    folder = local_copy("gs://bucket/copied")
    assert folder == tmp_path / "bucket/copied" and (folder / "sub/c.txt").read_text() == "sub/c.txt" * 1000
    assert len(reads()) == 3
    local_copy("gs://bucket/copied/")
    assert len(reads()) == 3
    server.store("bucket", "copied/a.txt", b"A" * 5000, {})  # of the same size
    del server.buckets["bucket"]["copied/b.txt"]
    (folder / "sub/c.txt.77.tmp").write_text("of a killed process")
    local_copy("gs://bucket/copied")
    assert reads()[3:] == ["bucket/copied/a.txt"]
    assert {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} == {"a.txt", "sub/c.txt"}
    assert (folder / "a.txt").read_text() == "A" * 5000
    assert local_copy("some/folder") == Path("some/folder")


def test_processes_of_one_host_copy_once(server, tmp_path):
    data = os.urandom(3_000_000)
    server.store("bucket", "large/x.bin", data, {})
    code = "from data_pipeline.common.buckets import local_copy; local_copy('gs://bucket/large')"
    environment = os.environ | {"REDVILLM_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "bucket/large/x.bin").read_bytes() == data
    assert sum((what, name) == ("read", "bucket/large/x.bin") for _, what, name in server.requests) == 1


def test_a_file_that_fails_half_way_has_no_name(server):
    with pytest.raises(ZeroDivisionError), files.written_whole(files.as_path("gs://bucket/half")) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert "half" not in server.names("bucket") and not temporary.exists()


def test_metrics_are_written_now_and_then(server, monkeypatch):
    def writes() -> int:
        return sum((what, name) == ("write", "bucket/logged/metrics.jsonl") for _, what, name in server.requests)

    clock = [0.0]
    monkeypatch.setattr(jsonl.time, "monotonic", lambda: clock[0])
    path = "gs://bucket/logged/metrics.jsonl"
    log = train.open_metrics(path, 0)
    for step in range(1, 41):
        clock[0] += 1
        log.write({"step": step, "loss": 1.5})
    assert writes() == 1 + 4
    log.write({"step": 41, "loss": 0.5})
    log.flush()
    log.flush()
    log.close()
    assert writes() == 6
    train.open_metrics(path, 40).close()
    kept = server.buckets["bucket"]["logged/metrics.jsonl"].data.decode().splitlines()
    assert [json.loads(line)["step"] for line in kept] == list(range(1, 41))


def test_mistakes_end_in_one_line(server, tmp_path):
    result = command("train", LLAVA, "--workdir=gs://nowhere/run", "--config.base=gs://nowhere/base")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: gs://nowhere/base: no such bucket, or nothing of that name in it; see gcloud storage ls"
    ]
    with pytest.raises(UserError, match="gs://bucket/none: nothing is there"):
        local_copy("gs://bucket/none")
    with pytest.raises(UserError, match="gs://: has no bucket"):
        local_copy("gs://")
    with pytest.raises(UserError, match="gs://bucket/base: is not a store of videos"):
        open_store("gs://bucket/base")
    with pytest.raises(UserError, match="gs://nowhere/x: no such bucket"):
        open_store("gs://nowhere/x")
    with pytest.raises(UserError, match="gs://nowhere/run: no such bucket"):
        load_trainables("gs://nowhere/run")
    with pytest.raises(UserError, match=r"gs://locked/a: no permission .*storage.objects.create"):
        files.write_text(files.as_path("gs://locked/a"), "text")
    files.check_bucket("gs://private/run")
    with pytest.raises(UserError, match=r"gs://private/run: no permission .*storage.buckets.get.*legacyBucketReader"):
        files.make_folder("gs://private/run")
    code = "import sys; sys.modules['gcsfs'] = None\nfrom data_pipeline.common import errors, files\n"
    code += "errors.run(lambda argv: files.check_bucket('gs://bucket/base'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "pip install -e '.[tpu]'" in result.stderr and result.stderr.count("\n") == 1
