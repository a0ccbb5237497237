import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import store
from data_pipeline.packing import Prefix, Question, fill_row, plan_epoch, row_bounds
from data_pipeline.pipeline import batches

NUM_VIDEOS, NUM_QUESTIONS = 5, 40


@pytest.fixture(scope="module")
def frame_store(tmp_path_factory):
    """Video i has 4 frames full of i, but video 2 only two."""
    path = tmp_path_factory.mktemp("frames") / "store"
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

    videos, _ = store.write_shards(path, settings, sources, encode)
    store.finish_store(path, settings, videos, [], {})
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
    for epoch in range(2):
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
    rows = bounds.rows_per_step + bounds.rows_per_step % 2
    return {
        "steps": steps,
        "row_fn": row_fn,
        "store": frame_store,
        "rows_per_step": rows,
    }


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


def test_workers_change_nothing(options):
    equal(batches(**options, num_workers=2), batches(**options))


def test_resume_is_exact(options):
    whole = list(batches(**options))
    for start in (1, 5, len(whole) - 1):
        equal(batches(**options, start_step=start), whole[start:])
    equal(batches(**options, start_step=3, num_workers=2), whole[3:])
    assert list(batches(**options, start_step=len(whole))) == []


def test_hosts_together_see_one_hosts_batch(options):
    hosts = [batches(**options, host_index=i, host_count=2) for i in range(2)]
    joined = ({name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True))
    equal(joined, batches(**options))
    with pytest.raises(ValueError, match="do not divide over 3 hosts"):
        next(batches(**{**options, "rows_per_step": 4}, host_count=3))


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
from data_pipeline import instructions, moving_shapes, packing, pipeline, prepare, store, videos

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
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
