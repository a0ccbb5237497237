"""The projector-only train step against PyTorch with transformers: the same questions, one machine, one run.

python benchmarks/train_vs_torch.py [--family=llava] [--size=tiny|7b] [--steps=N] [--compile=model|layers|none]

Four variants of one step (forward, backward through the frozen language model, clip, AdamW on both projectors), on the
same questions about the same pooled video features: PyTorch eager and compiled, and this project, all with one question
in a row; and this project with packed rows, in which the questions of a video share its prefix. The packed step is the
first of an epoch planned over 40 videos, with the padding that training would have.

PyTorch (benchmarks/torch_step.py) runs transformers' LlavaForConditionalGeneration, or for qwen_vl Qwen2 at Qwen-7B's
sizes (the same arithmetic in training) behind an independent resampler. It uses SDPA; right-padded rows, which need no
mask under causal attention, so that the flash kernel runs; logits at the supervised positions alone, as this project
does; and gradient checkpointing only when the memory does not suffice without it. This is faster than the usual way:
transformers' own loss makes all logits, and padding with a mask excludes the flash kernel.

tiny: the demo's bases in fp32 with the demo's rows; all variants start from the same weights, and their first losses
must agree within 1e-4. 7b: the published sizes in bf16 with random weights on either side (LLaVA with 224 pixels and
the two-layer projector), 32 questions, 100 frames, rows of 2048. Every variant is a process of its own. On a CPU each
has one core and their rounds alternate, because the machine's speed varies; on a GPU they run one after another, each
with all the memory.

MFU counts the necessary work: 4 * (the decoder's matrices * real tokens + the head * supervised tokens). Real tokens
leave out padding, row tokens count it. Memory is the peak: PyTorch's of the timed steps, this project's
of the whole process.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.variants import Variant, failed, measure, parse, print_table
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from data_pipeline.packing import Prefix, Question, Row, fill_row, plan_epoch, row_bounds
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import read_config
from redvillm_jax.runtime.chips import GPU_PEAKS
from redvillm_jax.training.flops import step_flops

ROOT = Path(__file__).parents[1]
NUM_VIDEOS = 40
REMATS = ("query,key,value,residual,gate,up", "full")  # at 7b: keep what is dear to compute, else what fits
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained on; ranges are of tokens, both ends included."""

    frames: int
    before: int  # tokens before the video
    question: tuple[int, int]
    answer: tuple[int, int]
    questions_per_video: tuple[int, ...]
    batch_questions: int
    row_length: int
    learning_rate: float


# The 7b lengths are those of VideoInstruct on average: 150 tokens of text and template besides the system prompt.
WORKLOADS = {
    ("llava", "tiny"): Workload(16, 3, (8, 11), (2, 4), (6,), 80, 128, 4e-3),
    ("qwen_vl", "tiny"): Workload(16, 6, (10, 13), (2, 4), (6,), 80, 160, 4e-3),
    ("llava", "7b"): Workload(100, 42, (15, 45), (30, 150), (7, 8), 32, 2048, 2e-5),
    ("qwen_vl", "7b"): Workload(100, 16, (20, 50), (30, 150), (7, 8), 32, 2048, 2e-5),
}


def main(argv: list[str]) -> int:
    parser = Parser("python benchmarks/train_vs_torch.py", __doc__)
    parser.add_argument("--compile", choices=("model", "layers", "none"), help="what torch.compile sees (7b: layers)")
    parser.add_argument("--remat", help=f"this project's remat (tiny: none; 7b: the first that fits of {REMATS})")
    parser.add_argument("--row_length", type=int, help="slots of a packed row (tiny: 128 or 160; 7b: 2048)")
    flags = parse(parser, argv)
    gpu, size = flags.gpu, flags.size
    work = WORKLOADS[flags.family, size]
    work = dataclasses.replace(work, row_length=work.row_length if flags.row_length is None else flags.row_length)
    module = load_family(flags.family)

    with tempfile.TemporaryDirectory() as folder:
        if size == "tiny":
            source, base = ROOT / "redvillm_jax" / "demo" / "bases" / flags.family, Path(folder) / "base"
            config = read_config(module, source)
            convert(flags.family, source, base)
        else:
            source = base = None
            config = big_config(module)
        rows, packed = make_batches(work, config)
        common = {
            "family": flags.family,
            "config": config,
            "device": "gpu" if gpu else "cpu",
            "dtype": "float32" if size == "tiny" else "bfloat16",
            "learning_rate": work.learning_rate,
            "num_steps": 1000,
        }
        remats = (flags.remat,) if flags.remat else ("none",) if size == "tiny" else REMATS
        how = flags.compile or ("model" if size == "tiny" else "layers")
        torch_side = {"batch": rows, "folder": source, **common}
        jax_side = {"folder": base, "frames": work.frames, **common}
        checkpointing = tuple({"checkpoint": flag} for flag in (False, True)[: 2 if gpu else 1])
        variants = [Variant("torch eager", "torch_step", {**torch_side, "compiled": "none"}, checkpointing)]
        if how != "none":
            compiled = {**torch_side, "compiled": how}
            variants.append(Variant(f"torch.compile ({how})", "torch_step", compiled, checkpointing))
        keeps = tuple({"remat": remat} for remat in remats)
        variants += [
            Variant("this project, unpacked", "jax_step", {**jax_side, "batch": rows}, keeps),
            Variant("this project, packed", "jax_step", {**jax_side, "batch": packed}, keeps),
        ]
        print(f"{flags.family} {size}, {common['dtype']}, {gpu or 'CPU'}, {len(rows['token_ids'])} questions a step")
        print(f"unpacked: {describe(rows)}; packed: {describe(packed)}")
        measured = measure("make_step", variants, rounds=flags.rounds, steps=flags.steps, alternate=not gpu)

    peak = next((flops for name, flops in GPU_PEAKS.items() if name in gpu), None)
    lines = []
    for variant in variants:
        batch, result = variant.arguments["batch"], measured[variant.name]
        if failed(result):
            continue
        real, row_tokens = int((batch["group_ids"] > 0).sum()), batch["group_ids"].size
        targets = int((batch["target_weights"] > 0).sum())
        flops = step_flops((body_weights(config), config.hidden_size * config.vocab_size), real, targets)
        s = result.seconds
        line = {
            "variant": variant.name,
            "ms a step": f"{1000 * s:.1f}",
            "examples/s": f"{len(rows['token_ids']) / s:.1f}",
            "real tokens/s": f"{real / s:,.0f}",
            "row tokens/s": f"{row_tokens / s:,.0f}",
            "MFU": f"{flops / (peak * s):.1%}" if peak else "-",
            "peak GiB": f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "-",
        }
        for other in variants[: -2 if how != "none" else 1]:
            reference = measured[other.name]
            line[f"x {other.name}"] = "-" if failed(reference) else f"{reference.seconds / s:.2f}"
        line |= {"first loss": f"{result.first:.5f}", "last loss": f"{result.last:.5f}", "settings": result.settings}
        lines.append(line)
    print_table(lines)
    print(f"median of {flags.rounds} x {flags.steps} steps after 2 warm-up steps; x: examples/s over that variant's")
    wrong = [v.name for v in variants if failed(measured[v.name])]
    if size == "tiny" and not failed(measured["torch eager"]):
        want = measured["torch eager"].first
        apart = {name: abs(r.first - want) for name, r in measured.items() if not failed(r)}
        print(f"first losses lie within {max(apart.values()):.1e} of torch eager's (limit {TOLERANCE:g})")
        wrong += [name for name, gap in apart.items() if not gap <= TOLERANCE]
    return 1 if wrong else 0


def convert(family: str, source: Path, out: Path) -> None:
    """The demo's published folder as a base folder."""
    from conversion.from_torch import from_torch

    from_torch(family, source, out)


def big_config(module: Any) -> Any:
    """The 7B size; LLaVA's has the paper's 224 pixels and the two-layer projector that transformers knows."""
    if "v1-7b" in module.SIZES:
        return dataclasses.replace(module.SIZES["v1-7b"], projector="mlp2x_gelu")
    return module.SIZES["7b"]


def body_weights(config: Any) -> int:
    """Weights of the decoder's matrices, without embedding and head (both families: as many key heads as heads)."""
    k = config.hidden_size
    return config.num_hidden_layers * (4 * k * k + 3 * k * config.intermediate_size)


def make_batches(work: Workload, config: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The first step of a packed epoch as rows of one question each, and packed."""
    rng = np.random.default_rng(0)
    num_tokens = 2 * getattr(config, "n_queries", 0) or work.frames + config.num_patches

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, config.vocab_size, count).astype(np.int32)

    prefixes, questions, videos = [], [], []
    start = ids(work.before)  # the same for all videos
    for video in range(NUM_VIDEOS):
        slots = np.concatenate([np.full(work.before, -1), np.arange(num_tokens)]).astype(np.int32)
        head = np.concatenate([start, np.zeros(num_tokens, np.int32)])
        prefixes.append(Prefix(head, slots, np.zeros(len(head), bool)))
        for _ in range(work.questions_per_video[video % len(work.questions_per_video)]):
            asked, answered = (int(rng.integers(low, high + 1)) for low, high in (work.question, work.answer))
            questions.append(Question(ids(asked + answered), np.arange(asked + answered) >= asked))
            videos.append(video)
    steps = plan_epoch(
        videos,
        [len(prefix.ids) for prefix in prefixes],
        [len(question.ids) for question in questions],
        row_length=work.row_length,
        batch_questions=work.batch_questions,
        pack=True,
        seed=0,
        epoch=0,
    )
    single = tuple(((video, (question,)),) for row in steps[0] for video, group in row for question in group)
    shapes = {"temporal": work.frames, "spatial": config.num_patches}
    streams = {
        name: rng.normal(size=(NUM_VIDEOS, length, config.vision_hidden_size)).astype(np.float32)
        for name, length in shapes.items()
    }

    def lay_out(rows: Sequence[Row], plan: Sequence[Sequence[Row]]) -> dict[str, np.ndarray]:
        bounds = row_bounds(plan, prefixes, questions)
        filled = [
            fill_row(
                row,
                prefixes,
                questions,
                row_length=-(-bounds.slots_per_row // 8) * 8,
                max_groups=bounds.groups_per_row,
                max_targets=bounds.targets_per_row,
                tokens_per_video=num_tokens,
            )
            for row in (*rows, *[()] * (bounds.rows_per_step - len(rows)))
        ]
        batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        there = batch["videos"] >= 0
        batch["num_frames"] = np.where(there, work.frames, 0).astype(np.int32)
        return batch | {name: x[batch["videos"]] * there[..., None, None] for name, x in streams.items()}

    return lay_out(single, [single]), lay_out(steps[0], steps)


def describe(batch: Mapping[str, np.ndarray]) -> str:
    """A batch in numbers."""
    rows, slots = batch["group_ids"].shape
    return f"{rows} rows of {slots} ({(batch['group_ids'] > 0).mean():.0%} real)"


if __name__ == "__main__":
    run(main)
