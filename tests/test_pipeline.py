import collections
import functools
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import numpy as np
import pytest

from data_pipeline import store
from data_pipeline.common.errors import UserError
from data_pipeline.packing import Prefix, Question, fill_row, plan_epoch, row_bounds
from data_pipeline.pipeline import batches

NUM_VIDEOS, NUM_QUESTIONS, NUM_EPOCHS = 5, 40, 2
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def frame_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("frames") / "store")


def make_store(path):
    """Video i has 4 frames full of i, but video 2 only two."""
    settings = {
        "kind": "frames",
        "image_size": 2,
        "num_frames": 4,
        "resize": "nearest",
        "format": "raw",
        "quality": None,
    }
    sources = [{"video": f"v{i}", "source": f"{i}.mp4", "bytes": 1} for i in range(NUM_VIDEOS)]

    def encode(sources):
        for i, source in enumerate(sources):
            n = 2 if i == 2 else 4
            record = {"frames": np.full((n, 2, 2, 3), i, np.uint8), "timestamps": np.zeros(n, np.float32)}
            yield {"line": {"video": source["video"], "num_frames": n}, "record": record}

    shards = store.write_shards(path, settings, sources, encode)
    store.finish_store(path, settings, shards, [], {})
    return store.open_store(path)


@pytest.fixture(scope="module")
def options(frame_store):
    """The arguments of `batches` for two epochs of packed rows."""
    rng = np.random.default_rng(0)
    prefix = Prefix(np.array([1, 9, 2]), np.array([-1, 0, -1]), np.zeros(3, bool))
    questions = [Question(np.full(n, n), np.arange(n) > 1) for n in rng.integers(3, 8, NUM_QUESTIONS)]
    prefixes = [prefix] * NUM_VIDEOS
    lengths = [3] * NUM_VIDEOS, [len(question.ids) for question in questions]
    steps = []
    for epoch in range(NUM_EPOCHS):
        videos = np.arange(NUM_QUESTIONS) % NUM_VIDEOS
        plan = {"row_length": 24, "batch_questions": 12, "pack": True, "seed": 0, "epoch": epoch}
        steps += plan_epoch(videos, *lengths, **plan)
    bounds = row_bounds(steps, prefixes, questions)
    row_fn = functools.partial(
        fill_row,
        prefixes=prefixes,
        questions=questions,
        row_length=24,
        max_groups=bounds.groups_per_row,
        max_targets=bounds.targets_per_row,
        tokens_per_video=1,
    )
    return {
        "steps": steps,
        "row_fn": row_fn,
        "store": frame_store,
        "rows_per_step": bounds.rows_per_step + -bounds.rows_per_step % 4,  # for 1, 2 and 4 hosts
    }


@pytest.fixture(scope="module")
def whole(options):
    """One host's batches, read without workers."""
    return list(batches(**options))


def equal(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert np.array_equal(one[name], other[name]), name


def test_a_batch_is_its_steps_rows(options):
    seen = []
    for batch, step in zip(batches(**options), options["steps"], strict=True):
        assert batch["token_ids"].shape == (options["rows_per_step"], 24)
        groups = batch["videos"].shape[1]
        assert batch["frames"].shape == (options["rows_per_step"], groups, 4, 2, 2, 3)
        assert batch["frames"].dtype == np.uint8
        for r, row in enumerate(step):
            expected = options["row_fn"](row)
            assert all(np.array_equal(batch[name][r], expected[name]) for name in expected)
        for r, videos in enumerate(batch["videos"]):
            for g, video in enumerate(videos):
                n = 0 if video < 0 else 2 if video == 2 else 4
                assert batch["num_frames"][r, g] == n
                assert (batch["frames"][r, g, :n] == video).all()
                assert (batch["frames"][r, g, n:] == 0).all()
        seen += batch["target_questions"][batch["target_weights"] > 0].tolist()
    assert set(seen) == set(range(NUM_QUESTIONS))


def test_missing_rows_are_padding(options):
    padded = 0
    for batch, step in zip(batches(**options), options["steps"], strict=True):
        padded += options["rows_per_step"] - len(step)
        for name in ("token_ids", "group_ids", "target_weights", "frames", "num_frames"):
            assert (batch[name][len(step) :] == 0).all(), name
        assert (batch["group_ids"][: len(step)].max(-1) > 0).all()
    assert padded > 0


def rows_of(options, host, count):
    """Rows that one of `count` hosts may read; they need not stand side by side."""
    return list(range(host, options["rows_per_step"], count))


def share(whole, rows):
    """These rows of one host's batches."""
    return [{name: value[rows] for name, value in batch.items()} for batch in whole]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_an_epoch_has_every_question_once(options, hosts):
    """Counted in what all hosts really read: each question in one row, on its video, with all of its tokens."""
    readers = [batches(**options, rows=rows_of(options, i, hosts)) for i in range(hosts)]
    questions, seen, tokens = options["row_fn"].keywords["questions"], [], collections.Counter()
    for arrays in zip(*readers, strict=True):
        for batch in arrays:
            for r, asked in enumerate(batch["target_questions"]):
                members = np.unique(asked[asked >= 0]).tolist()
                read = {int(video) for video in batch["videos"][r] if video >= 0}
                assert {q % NUM_VIDEOS for q in members} == read
                assert {int(frames[0, 0, 0, 0]) for frames in batch["frames"][r][batch["num_frames"][r] > 0]} == read
                seen += members
            tokens.update(batch["target_questions"][batch["target_weights"] > 0].tolist())
    assert len(seen) == NUM_EPOCHS * NUM_QUESTIONS
    for epoch in range(NUM_EPOCHS):  # no step has questions of two epochs
        asked = seen[epoch * NUM_QUESTIONS : (epoch + 1) * NUM_QUESTIONS]
        assert sorted(asked) == list(range(NUM_QUESTIONS))
    assert seen[:NUM_QUESTIONS] != seen[NUM_QUESTIONS:]
    assert tokens == {i: NUM_EPOCHS * int(question.supervised.sum()) for i, question in enumerate(questions)}


GRID = [(workers, hosts) for workers in (2, 3) for hosts in (1, 2, 4)]
QUICK = [(2, 1), (3, 4)]


@pytest.mark.parametrize(
    ("workers", "hosts"), [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in GRID]
)
def test_workers_change_nothing(options, whole, workers, hosts):
    for host in range(hosts) if (workers, hosts) not in QUICK else [hosts - 1]:
        rows = rows_of(options, host, hosts)
        equal(batches(**options, num_workers=workers, rows=rows), share(whole, rows))


def test_resuming_at_any_step_goes_on_as_if_undisturbed(options, whole):
    for start in range(len(whole)):
        equal(batches(**options, start_step=start), whole[start:])
        rows = rows_of(options, 1, 2)
        equal(batches(**options, start_step=start, rows=rows), share(whole, rows)[start:])
    equal(batches(**options, start_step=3, num_workers=2), whole[3:])
    assert list(batches(**options, start_step=len(whole))) == []


def test_hosts_together_see_one_hosts_batch(options, whole):
    for hosts in (2, 4):
        for host in range(hosts):
            rows = rows_of(options, host, hosts)
            equal(batches(**options, rows=rows), share(whole, rows))


def test_the_order_is_the_seeds_and_nothing_elses():
    """Three processes with other hash seeds plan the same, another seed and another epoch do not."""
    script = """
import sys
from data_pipeline.packing import plan_epoch
options = {"row_length": 24, "batch_questions": 12, "pack": True, "seed": int(sys.argv[1]), "epoch": int(sys.argv[2])}
print(plan_epoch([i % 5 for i in range(40)], [3] * 5, [3 + i % 5 for i in range(40)], **options))
"""

    def plan(seed, epoch, hash_seed):
        command = [sys.executable, "-c", script, str(seed), str(epoch)]
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert plan(7, 0, 1) == plan(7, 0, 2)
    assert len({plan(7, 0, 3), plan(8, 0, 3), plan(7, 1, 3)}) == 3


def slow_row(row, row_fn):
    time.sleep(0.02)
    return row_fn(row)


def test_the_next_step_is_read_during_this_one(options):
    """Reading a step takes 80 ms or more, the fake steps 300 ms: only the first is waited for."""
    row_fn, waits = functools.partial(slow_row, row_fn=options["row_fn"]), []
    reader = batches(**{**options, "row_fn": row_fn})
    for _ in options["steps"]:
        start = time.time()
        next(reader)
        waits.append(time.time() - start)
        time.sleep(0.3)
    reader.close()
    assert waits[0] > 0.08 and np.median(waits[1:]) < 0.04


@pytest.mark.parametrize(("workers", "at"), [(1, 2), (2, 0), (2, -2)])
def test_a_killed_worker_ends_the_run_in_one_line(options, whole, workers, at):
    """Unless it had delivered all of its batches: then nothing is missing."""
    before, at = set(multiprocessing.active_children()), at % len(whole)
    row_fn = functools.partial(slow_row, row_fn=options["row_fn"])
    got, error, killed = [], None, 0.0
    try:
        for batch in batches(**{**options, "row_fn": row_fn}, num_workers=workers):
            got.append(batch)
            if len(got) == at + 1:
                children = set(multiprocessing.active_children()) - before
                assert len(children) == workers
                os.kill(max(children, key=lambda child: child.name).pid, signal.SIGKILL)
                killed = time.time()
    except UserError as raised:
        error = str(raised)
    assert killed and time.time() - killed < 60
    assert set(multiprocessing.active_children()) <= before
    equal(got, whole[: len(got)])
    if error is None:
        assert at == len(whole) - 2 and len(got) == len(whole)
    else:
        assert "killed by SIGKILL: " in error and "lower config.num_workers" in error and "\n" not in error
        assert at < len(got) <= len(whole)


def failing_row(row):
    raise UserError("a row that cannot be made")


def test_a_mistake_in_a_worker_is_told_as_it_is(options):
    with pytest.raises(UserError) as raised:
        next(batches(**{**options, "row_fn": failing_row}, num_workers=1))
    assert str(raised.value) == "a row that cannot be made"


def test_a_record_of_another_video_gets_into_no_batch(options, tmp_path, monkeypatch):
    """Two shards have changed places: their records are as long, and the counts are right."""
    monkeypatch.setattr(store, "VIDEOS_PER_SHARD", 2)
    made = make_store(tmp_path / "s")
    first, last = (made.path / f"frames-train.array_record-0000{i}-of-{-(-NUM_VIDEOS // 2):05d}" for i in (0, 2))
    content = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(content)
    with pytest.raises(UserError, match=r"record \d, 'v[0145]', is that of 'v[0145]'; delete this shard, then run"):
        list(batches(**{**options, "store": store.open_store(made.path)}))


def one_video(row):
    return {"videos": np.array([row[0][0] if row else -1])}


def memory():
    """Megabytes that this process holds, files in memory included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_memory_does_not_grow_with_the_store(tmp_path):
    """A store of 64 MB, read once, leaves a step or two in memory."""
    settings = {"kind": "frames", "image_size": 256, "num_frames": 2, "format": "raw", "quality": None}
    sources = [{"video": f"v{i}", "source": f"{i}.mp4", "bytes": i} for i in range(160)]
    rng = np.random.default_rng(0)

    def encode(sources):
        for source in sources:
            frames = rng.integers(0, 256, (2, 256, 256, 3), np.uint8)
            record = {"frames": frames, "timestamps": np.zeros(2, np.float32)}
            yield {"line": {"video": source["video"], "num_frames": 2}, "record": record}

    shards = store.write_shards(tmp_path / "s", settings, sources, encode)
    store.finish_store(tmp_path / "s", settings, shards, [], {})
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*array_record*")) / 2**20
    steps = [((((i, (0,)),),)) for i in range(160)]
    opened = store.open_store(tmp_path / "s")
    opened.padded([0])
    start = memory()
    most = max(memory() for _ in batches(steps, one_video, opened, rows_per_step=1))
    assert size > 55 and most - start < 20


def digest(reader):
    """A hash of all arrays of all batches, in order."""
    found = hashlib.sha256()
    for batch in reader:
        for name in sorted(batch):
            found.update(name.encode() + np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


def test_workers_read_a_store_in_a_bucket(frame_store):
    steps = [(((i % NUM_VIDEOS, (0,)),), ((i * 2 % NUM_VIDEOS, (0,)),)) for i in range(9)]
    script = """
import sys
from data_pipeline import pipeline
from data_pipeline import store
from test_pipeline import digest, one_video
steps = eval(sys.argv[1])
if __name__ == "__main__":
    for workers in (0, 2):
        frames = store.open_store("gs://bucket/frames")
        print(digest(pipeline.batches(steps, one_video, frames, rows_per_step=2, num_workers=workers)))
"""
    with fake_gcs.serve("bucket") as server:
        server.upload(frame_store.path, "bucket", "frames")
        environment = os.environ | server.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, "-c", script, repr(steps)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    expected = digest(batches(steps, one_video, frame_store, rows_per_step=2))
    assert done.stdout.split() == [expected, expected], done.stderr


def backend_row(row, row_fn):
    """A row function that looks, in the worker itself, whether jax has opened a backend."""
    from jax._src import xla_bridge

    return {**row_fn(row), "backend": np.array(xla_bridge.backends_are_initialized())}


def test_workers_open_no_jax_backend(options):
    row_fn = functools.partial(backend_row, row_fn=options["row_fn"])
    found = [batch["backend"] for batch in batches(**{**options, "row_fn": row_fn}, num_workers=2)]
    assert len(found) == len(options["steps"])
    assert not np.any(found)


def test_the_pipeline_opens_no_jax_backend_outside_app_run(frame_store):
    """In a fresh process, without absl's app.run, as a user's script would be."""
    script = f"""
import numpy as np
from data_pipeline.questions import instructions
from redvillm_jax.demo import moving_shapes
from data_pipeline import packing
from data_pipeline import pipeline
from data_pipeline import prepare
from data_pipeline import store
from data_pipeline.media import decode

def row(row):
    return {{"videos": np.array([row[0][0] if row else -1])}}

if __name__ == "__main__":
    frame_store = store.open_store({str(frame_store.path)!r})
    steps = [(((i, (0,)),),) for i in range(4)]
    options = {{"rows_per_step": 1, "num_workers": 1}}
    for i, batch in enumerate(pipeline.batches(steps, row, frame_store, **options)):
        assert batch["frames"][0, 0, 0, 0, 0, 0] == i
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
