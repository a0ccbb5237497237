"""Everything that the demo makes, made twice: other contents of fresh memory, another order of sets, busy cores."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from redvillm_jax.demo import __main__ as demo
from redvillm_jax.training.checkpoint import load_trainables

ROOT = Path(__file__).parents[1]
# glibc fills memory that a program gets or gives back with a byte: who reads what nobody wrote reads other numbers.
MAKINGS = ({"MALLOC_PERTURB_": "1", "PYTHONHASHSEED": "1"}, {"MALLOC_PERTURB_": "127", "PYTHONHASHSEED": "2"})

VIDEOS = """
import json, sys
from pathlib import Path
from redvillm_jax.demo import moving_shapes
from data_pipeline import prepare
out = Path(sys.argv[1])
make = lambda i: moving_shapes.make_video(i, folder=out, split="train", seed=0, languages=("en", "zh"))
(out / "videos").mkdir(parents=True)
lines = [line for i in range(40, 72) for line in make(i)]
(out / "instructions.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
prepare.main([f"--videos={out / 'videos'}", f"--instructions={out / 'instructions.jsonl'}", f"--out={out / 'frames'}",
              "--num_frames=8", "--image_size=32", f"--num_workers={sys.argv[2]}"])
"""


@contextlib.contextmanager
def load(processes=2):
    """Processes that keep their cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def contents(folder, *patterns):
    """The bytes of all files that fit a pattern, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for p in patterns for path in sorted(folder.glob(p))}


def assert_same(first, second, stage):
    assert first.keys() == second.keys() and first, stage
    assert [name for name in first if first[name] != second[name]] == [], stage


def test_videos_and_frames_are_the_same_bits(tmp_path):
    """Of these 32 scenes x264's macroblock tree changes two; one worker and two read them side by side."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", VIDEOS, tmp_path / str(i), str(i + 1)], env=os.environ | making, cwd=ROOT
        )
        for i, making in enumerate(MAKINGS)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    folders = [tmp_path / str(i) for i in range(2)]
    for stage in ("videos/*.mp4", "instructions.jsonl", "frames/*.array_record-*", "frames/*.jsonl"):
        assert_same(*(contents(folder, stage) for folder in folders), stage)
    assert len(contents(folders[0], "videos/*.mp4")) == 32


def stages(work, base):
    """What each of the demo's commands has made, {stage: {name: bytes}}, without paths, times and rates."""
    runs, weights = work / base / "seed-0", {}
    for run, _ in demo.TRAININGS.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(load_trainables(runs / run)[1]):
            weights[run + jax.tree_util.keystr(path)] = leaf.tobytes()
    return {
        "videos": contents(work / "videos", "*/videos/*.mp4", "*/instructions.jsonl"),
        "base": contents(work / base / "base", "*"),
        "frames": contents(work / base / "frames", "*/*.array_record-*", "*/*.jsonl", "*/store.json"),
        "streams": contents(work / base / "streams", "*/*.array_record-*", "*/*.jsonl", "*/store.json"),
        "training": weights | contents(runs, "*/first_batch.txt"),
        "answers": contents(work / base, "**/answers.jsonl"),
        "export": contents(runs / "export", "*.safetensors"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llava", "qwen_vl"])
def test_demo_is_the_same_bits(base, tmp_path, monkeypatch):
    """The whole demo on a few videos, the second time beside other work, and with no program compiled before."""
    monkeypatch.setattr(demo, "SIZES", ("--train=70", "--dev=1", "--test=12"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    made = []
    for i, making in enumerate(MAKINGS):
        for name, value in making.items():
            monkeypatch.setenv(name, value)
        with load(2 * i):
            demo.main([f"--base={base}", f"--workdir={tmp_path / str(i)}"])
        made.append(stages(tmp_path / str(i), base))
    for stage in made[0]:
        assert_same(made[0][stage], made[1][stage], stage)


@pytest.mark.slow
def test_a_thousand_videos_are_the_same_bits(tmp_path):
    """With one worker on one core, and with three on all of them."""
    folders = [tmp_path / str(i) for i in range(2)]
    core = {min(os.sched_getaffinity(0))}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "redvillm_jax.demo.moving_shapes",
                f"--out={folder}",
                "--train=1000",
                f"--num_workers={n}",
            ],
            env=os.environ | making,
            cwd=ROOT,
            preexec_fn=None if i else lambda: os.sched_setaffinity(0, core),
        )
        for i, (folder, making, n) in enumerate(zip(folders, MAKINGS, (1, 3), strict=True))
    ]
    assert [process.wait(timeout=1200) for process in processes] == [0, 0]
    first, second = (contents(folder, "*/videos/*.mp4", "*/instructions.jsonl") for folder in folders)
    assert len(first) == 1000 + 300 + 600 + 3
    assert_same(first, second, "videos")
