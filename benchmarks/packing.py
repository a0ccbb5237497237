"""Measures the savings of shared-prefix packing: row tokens per question, with padding, and examples per second.

python benchmarks/packing.py [--steps=12]

**Tokens** come from the project's own planner at the paper's 32 questions a step, over the three epochs of a run:
100,000 questions on 13,303 videos, VideoInstruct's numbers, with drawn lengths (`draw`). Before every question stand 40
tokens of text and its video's 356 (LLaVA), 512 (Qwen-VL) or 1124 (Qwen-VL, one per patch and frame). Columns:

    rows of            slots of a row; unpacked, a row is one question and as long as the longest
    left out           questions that do not fit such a row with their video (training ends with a UserError)
    questions a step   mean over the steps
    rows a step        mean of the rows that hold questions, and the most: shapes are static, so every step computes
                       that many, some of them only padding (several devices round up to their number)
    tokens a question  without padding / slots of the rows that hold questions / slots of all rows
    fill               share of slots that hold a token: of the rows that hold questions / of all rows
    saved              slots of all rows per question, unpacked over packed

**Examples per second** are real train steps (forward, backward, optimizer; batches in memory) of the tiny LLaVA that
the project carries, in fp32 on this machine, packed and unpacked in turns. All lengths are a quarter (89 video tokens,
rows of 512). Attention takes a larger share in so narrow a model than in a 7B one, and packing saves less of it: its
cost per token grows with the row.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import demo
from conversion import from_torch
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from data_pipeline.common.tables import markdown_table
from data_pipeline.packing import Prefix, Question, RowBounds, Step, fill_row, plan_epoch, row_bounds
from redvillm_jax.demo.__main__ import BASES
from redvillm_jax.model.base_folder import Base, open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.runtime.sharding import make_mesh, to_global
from redvillm_jax.training.recipe import make_training, recipe_of
from redvillm_jax.training.rows import make_prefix, pad_row

VIDEOS, QUESTIONS = 13_303, 100_000
BATCH_QUESTIONS, EPOCHS = 32, 3
TEXT_BEFORE = 40  # tokens before the video: the system prompt and the user's turn
VIDEO_TOKENS = (356, 512, 1124)
ROW_LENGTHS = (1024, 2048, 4096)
SCALE = 4  # lengths are divided by it where steps are timed


class Lengths(NamedTuple):
    """videos: (Q,) the video of each question. text: (Q,) tokens of each question with its answer."""

    videos: np.ndarray
    text: np.ndarray


class Plan(NamedTuple):
    """Steps of all epochs, their largest numbers, slots per row, and how many questions fit no row."""

    steps: list[Step]
    bounds: RowBounds
    slots: int
    left_out: int


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/packing.py", __doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed train steps, packed and unpacked each (12)")
    flags = parser.parse_args(argv)
    lengths = draw(VIDEOS, QUESTIONS)
    counts, shares = np.bincount(lengths.videos), (0.05, 0.5, 0.95)
    print(f"{QUESTIONS:,} questions on {VIDEOS:,} videos, {BATCH_QUESTIONS} a step, {EPOCHS} epochs")
    for name, values in (("questions a video", counts), ("text tokens a question", lengths.text)):
        quantiles = ", ".join(f"{value:.0f}" for value in np.quantile(values, shares))
        print(f"{name}: mean {values.mean():.1f}; 5, 50, 95 %: {quantiles}; {values.min()} to {values.max()}")
    print_table(
        [
            "video tokens",
            "rows of",
            "left out",
            "questions a step",
            "rows a step",
            "tokens a question",
            "fill",
            "saved",
        ],
        [row for video_tokens in VIDEO_TOKENS for row in token_rows(lengths, video_tokens)],
    )
    time_steps(lengths, flags.steps)


def draw(num_videos: int, num_questions: int) -> Lengths:
    """Lengths like VideoInstruct's: 7.5 questions a video, gamma distributed, one at least; 90 tokens, log-normal."""
    rng, spread = np.random.default_rng(0), 0.6
    popularity = rng.gamma(4.0, size=num_videos)
    counts = 1 + rng.multinomial(num_questions - num_videos, popularity / popularity.sum())
    text = rng.lognormal(np.log(90) - spread**2 / 2, spread, num_questions)
    return Lengths(np.repeat(np.arange(num_videos), counts), np.clip(text, 16, 512).round().astype(int))


def make_plan(lengths: Lengths, prefix: int, row_length: int, pack: bool, epochs: int = EPOCHS) -> Plan | None:
    """Plans the questions that fit; None if none does. Steps index the questions that are left."""
    fits = prefix + lengths.text <= row_length
    if not fits.any():
        return None
    videos, text = lengths.videos[fits], lengths.text[fits]
    prefixes = np.full(videos.max() + 1, prefix)
    options = {"row_length": row_length, "batch_questions": BATCH_QUESTIONS, "pack": pack, "seed": 0}
    steps = [step for epoch in range(epochs) for step in plan_epoch(videos, prefixes, text, **options, epoch=epoch)]
    shared = {n: make_question(n) for n in np.unique(text).tolist()}
    heads = [make_prefix([(0, False)] * prefix, [])] * len(prefixes)
    bounds = row_bounds(steps, heads, [shared[n] for n in text.tolist()])
    return Plan(steps, bounds, pad_row(bounds.slots_per_row), int((~fits).sum()))


def make_question(length: int, ids: np.ndarray | None = None) -> Question:
    """A question whose last three quarters are the answer."""
    ids = np.zeros(length, np.int32) if ids is None else ids
    return Question(ids, np.arange(length) >= length // 4)


def token_rows(lengths: Lengths, video_tokens: int) -> list[list[str]]:
    """The lines of the table for one size of video: unpacked, then packed in rows of every length."""
    prefix = TEXT_BEFORE + video_tokens
    longest = prefix + int(lengths.text.max())
    lines, unpacked = [], None
    for row_length in (None, *ROW_LENGTHS):
        plan = make_plan(lengths, prefix, row_length or longest, pack=row_length is not None)
        if plan is None:
            lines.append([str(video_tokens), str(row_length), "all, none fits", *["–"] * 5])
            continue
        text = lengths.text[prefix + lengths.text <= (row_length or longest)]
        groups = [group for step in plan.steps for row in step for group in row]
        questions = sum(len(members) for _, members in groups)
        tokens = len(groups) * prefix + sum(int(text[list(members)].sum()) for _, members in groups)
        rows = [len(step) for step in plan.steps]
        used, static = sum(rows) * plan.slots, len(rows) * plan.bounds.rows_per_step * plan.slots
        unpacked = unpacked or static / questions
        lines.append(
            [
                str(video_tokens),
                str(row_length or f"1 question: {plan.slots}"),
                f"{plan.left_out:,}",
                f"{questions / len(rows):.1f}",
                f"{np.mean(rows):.1f}, at most {max(rows)}",
                f"{tokens / questions:.0f} / {used / questions:.0f} / {static / questions:.0f}",
                f"{tokens / used:.2f} / {tokens / static:.2f}",
                f"{unpacked / (static / questions):.2f}×",
            ]
        )
    return lines


def time_steps(lengths: Lengths, count: int) -> None:
    """Prints examples per second of the tiny LLaVA's train step, packed and unpacked, and their ratio."""
    lengths = lengths._replace(text=-(-lengths.text // SCALE))
    text_before, video_tokens, row_length = TEXT_BEFORE // SCALE, VIDEO_TOKENS[0] // SCALE, ROW_LENGTHS[1] // SCALE
    longest = text_before + video_tokens + int(lengths.text.max())
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            from_torch.main(["--family=llava", f"--source={BASES / 'llava'}", f"--out={folder}/base"])
        base = open_base(f"{folder}/base")
        switches = {"num_frames": video_tokens - base.config.num_patches, "batch_questions": BATCH_QUESTIONS}
        config = plain_config(demo.get_config("llava")) | switches
        slots = VideoPlaces(base, model_settings(config)).slots(config["num_frames"])
        prefix = make_prefix([(1, False)] * text_before, [(0, slot) for slot in slots])
        for name, pack in (("unpacked", False), ("packed", True)):
            plan = make_plan(lengths, len(prefix.ids), row_length if pack else longest, pack, epochs=1)
            runs[name] = plan, make_timer(config, base, plan, prefix, lengths.text)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(count + 1):
        for name, (plan, timer) in runs.items():
            seconds[name].append(timer(plan.steps[index]))
    # the first step compiles
    rates = {name: BATCH_QUESTIONS / statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"\nTiny LLaVA, {video_tokens} video tokens, median of {count} train steps, {jax.devices()[0].device_kind}:")
    lines = []
    for name, (plan, _) in runs.items():
        tokens = plan.bounds.rows_per_step * plan.slots / BATCH_QUESTIONS
        cells = (f"{plan.bounds.rows_per_step} of {plan.slots}", f"{tokens:.0f}", f"{rates[name]:.1f}")
        lines.append([name, *cells, f"{rates[name] / rates['unpacked']:.2f}×"])
    print_table(["", "rows a step", "tokens a question", "examples per second", "ratio"], lines)


def make_timer(config: dict, base: Base, plan: Plan, prefix: Prefix, text: np.ndarray) -> Callable[[Step], float]:
    """A function that trains on one step of a plan, with random streams and words, and returns its seconds."""
    mesh, rng = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        model = load_model(
            base, model_settings(config), mesh, dtype=jnp.dtype(config["dtype"]), parts=("projector", "llm")
        )
        training = make_training(
            recipe_of(config),
            base,
            model_settings(config),
            model,
            mesh,
            num_steps=len(plan.steps),
            row_length=plan.slots,
        )
    state, (rows, groups, targets, _) = training.state, plan.bounds

    def timer(step: Step) -> float:
        words = {q: rng.integers(3, base.config.vocab_size, text[q]) for row in step for _, g in row for q in g}
        questions = {q: make_question(len(ids), ids) for q, ids in words.items()}
        prefixes = {video: prefix for row in step for video, _ in row}
        layout = {"row_length": plan.slots, "max_groups": groups, "max_targets": targets}
        layout["tokens_per_video"] = int(prefix.video_tokens.max()) + 1
        filled = [fill_row(row, prefixes, questions, **layout) for row in [*step, *[()] * (rows - len(step))]]
        batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        batch["num_frames"] = np.where(batch["videos"] >= 0, config["num_frames"], 0).astype(np.int32)
        for stream, length in (("temporal", config["num_frames"]), ("spatial", base.config.num_patches)):
            batch[stream] = rng.standard_normal((rows, groups, length, base.config.vision_hidden_size), np.float32)
        with jax.set_mesh(mesh):
            on_device = jax.block_until_ready(to_global(batch, mesh))
            start = time.perf_counter()
            *moved, _ = training.step(state["trainable"], state["optimizer"], training.frozen, on_device)
            state["trainable"], state["optimizer"] = jax.block_until_ready(moved)
        return time.perf_counter() - start

    return timer


def print_table(names: list[str], lines: list[list[str]]) -> None:
    """Prints a Markdown table of numbers after an empty line."""
    print("\n" + "\n".join(markdown_table(names, lines, ">")), flush=True)


if __name__ == "__main__":
    run(main)
