"""Measures time and memory of docs/laptop.md on this machine: SmolVLM-256M on a computer without an accelerator.

python benchmarks/laptop.py [--workdir=laptop] [--clips=4] [--source=SmolVLM-256M-Instruct]

Runs the page's commands on copies of one generated clip (10 s, 1280 × 720, 25 frames a second) with five questions
each, and prints wall time, processor time and the largest memory of each command.
Without --source the weights are random, of the real size; time and memory do not depend on their values, except that
answers of random weights only end at --max_new_tokens.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import av  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from configs.smolvlm import get_config  # noqa: E402
from data_pipeline.common.cli import Parser  # noqa: E402
from data_pipeline.common.errors import run  # noqa: E402
from redvillm_jax.bases import smolvlm  # noqa: E402
from redvillm_jax.model.weights import expected_tensors  # noqa: E402
from tests.tiny_bases import smolvlm_names, write_json, write_smolvlm  # noqa: E402

WIDTH, HEIGHT, FPS, SECONDS = 1280, 720, 25, 10
QUESTIONS = ("What happens?", "Which colour appears first?", "Where is the object?", "How many are there?", "Why?")
ANSWER = "The object moves to the right and stops there for a while before it leaves the picture."


class Cost(NamedTuple):
    """What a command took: seconds on the clock and of the processor, and the largest memory of a process in GB."""

    wall: float
    processor: float
    memory: float


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/laptop.py", __doc__)
    parser.add_argument("--workdir", type=Path, default=Path("laptop"), help="made anew, and kept (laptop)")
    parser.add_argument("--clips", type=int, default=4, help="how many (4)")
    parser.add_argument("--source", type=Path, help="a published folder, instead of random weights")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="of an answer (32)")
    flags = parser.parse_args(argv)
    shutil.rmtree(flags.workdir, ignore_errors=True)
    flags.workdir.mkdir(parents=True)
    source = flags.source or flags.workdir / "published"
    # in a process of its own: what this one has used at most would count as the commands' memory, too
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_clips, flags.workdir / "clips", flags.clips).result()
        if flags.source is None:
            pool.submit(write_random, source).result()
    report(flags, source)


def report(flags: argparse.Namespace, source: Path) -> None:
    """Runs the commands and prints their costs."""
    work, config = flags.workdir, get_config()
    base, frames, streams, trained = (work / name for name in ("base", "frames", "streams", "run"))
    first = work / "clips" / "clip000.mp4"
    same = ["--config=smolvlm", f"--config.base={base}"]
    questions = [f"--question={question}" for question in QUESTIONS[:2]]
    asking = [f"--model={trained}", f"--video={first}", f"--max_new_tokens={flags.max_new_tokens}"]
    commands = {
        "convert": ["conversion.from_torch", "--family=smolvlm", f"--source={source}", f"--out={base}"],
        "prepare": [
            *("data_pipeline.prepare", f"--videos={work / 'clips'}", f"--instructions={work / 'questions.jsonl'}"),
            *(f"--base={base}", f"--num_frames={config.num_frames}", f"--out={frames}"),
        ],
        "encode": ["redvillm_jax.encode", *same, f"--data={frames}", f"--out={streams}", "--batch_size=1"],
        "train": [
            *("redvillm_jax.train", *same, f"--workdir={trained}", f"--config.data={streams}", "--config.num_epochs=2"),
            "--config.log_every=1",
        ],
        "answer one question": ["redvillm_jax.answer", *asking, questions[0]],
        "answer two questions": ["redvillm_jax.answer", *asking, *questions],
        "export": ["conversion.to_torch", f"--model={trained}", f"--out={work / 'export'}", "--full"],
    }
    print(
        f"{os.cpu_count()} cores, {flags.clips} clips with {len(QUESTIONS)} questions, {config.num_frames} frames each"
    )
    print("| command | wall time (s) | processor time (s) | memory (GB) |\n|---|---|---|---|")
    for name, command in commands.items():
        cost = measure(command)
        print(f"| {name} | {cost.wall:.0f} | {cost.processor:.0f} | {cost.memory:.1f} |", flush=True)
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rate = np.median([step["examples_per_second"] for step in steps[1:]])
    print(f"train: {config.batch_questions / rate:.1f} s a step of {config.batch_questions} questions, wall time")
    size = sum(file.stat().st_size for file in streams.rglob("*") if file.is_file())
    print(f"streams: {size / flags.clips / 1e6:.2f} MB a clip")


def measure(command: list[str]) -> Cost:
    """Runs a command of the project. Ends this one when it fails."""
    start = time.time()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=nothing, stderr=subprocess.PIPE)
        told = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\n{told[-2000:]}")
    return Cost(time.time() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def write_random(folder: Path) -> None:
    """A SmolVLM-256M with random weights in bfloat16 and the tokenizer of the tests, which knows few words."""
    import ml_dtypes

    folder.mkdir()
    size = smolvlm.SIZES["256m"]
    config = write_smolvlm(folder)
    text, vision = (
        {name: getattr(part, name, old) for name, old in config[key].items()}
        for key, part in (("text_config", size.text), ("vision_config", size.vision))
    )
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": size.text.rope_theta}
    config |= {"text_config": text, "vision_config": vision, "scale_factor": size.scale_factor}
    write_json(folder / "config.json", config)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"size": {"longest_edge": size.longest_edge}, "max_image_size": {"longest_edge": size.image_size}}
    write_json(folder / "preprocessor_config.json", processor)
    rng = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in expected_tensors(smolvlm, size).items()}
    tensors = {
        name: np.ones(shape) if "norm" in name else 0.02 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    save_file(smolvlm_names(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def write_clips(folder: Path, count: int) -> None:
    """Copies of one clip, and their questions beside the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    first = folder / "clip000.mp4"
    with av.open(str(first), "w") as container:
        stream = container.add_stream("libx264", FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FPS * SECONDS):
            picture = ground.copy()
            picture[300:420, 4 * index : 4 * index + 120] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    rows = []
    for clip in range(count):
        name = f"clip{clip:03d}"
        if clip:
            shutil.copy(first, folder / f"{name}.mp4")
        rows += [{"video": name, "question": question, "answer": ANSWER} for question in QUESTIONS]
    lines = (json.dumps({"id": str(i)} | row) for i, row in enumerate(rows))
    (folder.parent / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    run(main)
