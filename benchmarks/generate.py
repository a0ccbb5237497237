"""Answers to questions about pictures against transformers' `generate`: the same prompts, one machine, one run.

python benchmarks/generate.py [--size=tiny|7b] [--batches=1,8,32] [--new_tokens=64] [--rounds=N]

Each row of a batch has a picture and a question of its own, all questions of one length, so that transformers needs no
padding. Both sides start from arrays in memory and end with ids on the host; decoding is greedy and never stops early.
transformers runs LlavaForConditionalGeneration with SDPA and its usual, growing cache.

    first token   ms from the arrays to the first token of every row: the encoder, the prompt, one choice
    tokens/s      of all rows together, from the second token on

tiny: a LLaVA of the demo's sizes that transformers makes and writes, in fp32, converted for this project; the ids must
be equal. Its weights are random and large: a trained one gives all noise the same answer. 7b: LLaVA-7B's sizes with 224
pixels in bf16, random weights on either side, so that ids cannot be compared; a batch that the memory does not suffice
for is left out. Each side is a process of its own; on a CPU each has one core and they take turns, and a ratio is the
median over rounds of the ratio within a round.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_vs_torch import ROOT, big_config, convert
from benchmarks.variants import Running, Variant, ask, gpu_name, print_table, start, stop
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import read_config
from redvillm_jax.model.settings import plain_config

BEFORE, QUESTION = {"tiny": 3, "7b": 35}, 24  # tokens before the picture and behind it
SIDES = {"transformers": "with_transformers", "this project": "with_this_project"}

Measured = dict[int, tuple[np.ndarray, float, float]]  # batch -> ids (R, N), seconds to the first token and to the last


def main(argv: list[str]) -> int:
    flags = parse(argv)
    module = load_family("llava")
    with tempfile.TemporaryDirectory() as folder:
        if flags.size == "tiny":
            source, base = Path(folder) / "published", Path(folder) / "base"
            write_tiny(source)
            config = read_config(module, source)
            convert("llava", source, base)
        else:
            source = base = None
            config = big_config(module)
        common = {
            "config": config,
            "new_tokens": flags.new_tokens,
            "device": "gpu" if flags.gpu else "cpu",
            "dtype": "float32" if flags.size == "tiny" else "bfloat16",
            **make_questions(config, flags.size, max(flags.batches)),
        }
        fitting = tuple({"batches": flags.batches[:count]} for count in range(len(flags.batches), 0, -1))
        slots = BEFORE[flags.size] + config.num_patches + QUESTION
        print(f"llava {flags.size}, {common['dtype']}, {flags.gpu or 'CPU'}: prompts of {slots} tokens")
        rounds, problems = measure({"transformers": source, "this project": base}, common, fitting, flags)

    for problem in problems:
        print(problem)
    measured = [[set(found) for found in sides.values()] for sides in rounds]
    batches = [b for b in flags.batches if measured and all(b in found for sides in measured for found in sides)]
    print_table([line(batch, rounds, flags.new_tokens) for batch in batches])
    print(f"median of {len(rounds)} rounds after a warm-up; {flags.new_tokens} new tokens; x: above 1, this is faster")
    equal = flags.size != "tiny" or all(same_ids(batch, rounds) for batch in batches)
    if not (batches and equal) or problems:
        print("FAILED: " + ("not all was measured" if equal else "the answers differ"))
        return 1
    if flags.size == "tiny":
        answers = rounds[0]["this project"][batches[-1]][0]
        distinct = len(np.unique(answers, axis=0))
        print(f"ids are equal in every batch and round ({distinct} different answers, {len(np.unique(answers))} ids)")
    ratios = [ratio(batch, rounds, pace) for batch in batches for pace in (first_token, token_time)]
    print(f"result: {min(ratios):.2f} to {max(ratios):.2f} times as fast as transformers")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, with their defaults for this machine, and `gpu`."""
    parser = Parser("python benchmarks/generate.py", __doc__)
    parser.add_argument("--size", choices=("tiny", "7b"), help="tiny or 7b (7b where there is a GPU)")
    parser.add_argument("--batches", default="1,8,32", help="rows decoded at once (1,8,32)")
    parser.add_argument("--new_tokens", type=int, default=64, help="length of an answer (64)")
    parser.add_argument("--rounds", type=int, help="rounds of each side (7 on a CPU, 3 on a GPU)")
    flags = parser.parse_args(argv)
    flags.gpu = gpu_name()
    flags.size = flags.size or ("7b" if flags.gpu else "tiny")
    flags.rounds = (3 if flags.gpu else 7) if flags.rounds is None else flags.rounds
    if flags.size == "7b" and not flags.gpu:
        raise UserError("--size=7b needs a GPU and nvidia-smi finds none; leave it out for the tiny comparison")
    numbers = flags.batches.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--batches={flags.batches}: expected numbers from 1 on, separated by commas")
    flags.batches = sorted(set(map(int, numbers)))
    for name, least in (("rounds", 1), ("new_tokens", 2)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}={getattr(flags, name)}: expected {least} or more")
    return flags


def write_tiny(out: Path) -> None:
    """A LLaVA of the demo's sizes with random weights, as transformers writes it."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    demo = ROOT / "redvillm_jax" / "demo" / "bases" / "llava"
    config = LlavaConfig.from_pretrained(demo, dtype="float32")
    config.text_config.initializer_range = config.initializer_range = 0.2
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(out)
    for file in demo.glob("tokenizer*.json"):
        shutil.copy(file, out)


def make_questions(config: Any, size: str, rows: int) -> dict[str, np.ndarray]:
    """Random pictures and token ids: pictures (R, S, S, 3) uint8, before (B,) and questions (R, Q) int32."""
    rng = np.random.default_rng(0)
    known = min(config.vocab_size, 32000) - 10  # below the picture's token
    return {
        "pictures": rng.integers(0, 256, (rows, config.image_size, config.image_size, 3), dtype=np.uint8),
        "before": rng.integers(3, known, BEFORE[size]).astype(np.int32),
        "questions": rng.integers(3, known, (rows, QUESTION)).astype(np.int32),
    }


def measure(
    folders: dict[str, Path | None], common: dict[str, Any], settings: tuple[dict, ...], flags: argparse.Namespace
) -> tuple[list[dict[str, Measured]], list[str]]:
    """What each side measured in each round, and the complaints of those that failed."""
    # A process has the GPU to itself: JAX may take all of it, less what the driver and cuDNN need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if flags.gpu else "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rounds: list[dict[str, Measured]] = [{} for _ in range(flags.rounds)]
    problems = []
    # On a CPU the sides take turns, because the machine's speed varies; on a GPU each has all the memory.
    for together in [list(SIDES)] if not flags.gpu else [[name] for name in SIDES]:
        running: dict[str, Running] = {}
        for name in together:
            began = time.perf_counter()
            answer = start(SIDES[name], Variant(name, "generate", common | {"folder": folders[name]}, settings))
            if isinstance(answer, str):
                problems.append(f"{name}: {answer}")
                continue
            running[name] = answer
            print(f"{name}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for found in rounds:
            for name, worker in running.items():
                answer = ask(worker.process, worker.pipe, 1)
                if isinstance(answer, str):
                    problems.append(f"{name}: {answer}")
                else:
                    found[name] = answer[1]
        for worker in running.values():
            stop(worker.process, worker.pipe)
    return [found for found in rounds if len(found) == len(SIDES)], problems


def first_token(measured: tuple[np.ndarray, float, float]) -> float:
    """Seconds to the first token."""
    return measured[1]


def token_time(measured: tuple[np.ndarray, float, float]) -> float:
    """Seconds of a decoding step."""
    ids, first, last = measured
    return (last - first) / (ids.shape[1] - 1)


def ratio(batch: int, rounds: Sequence[dict[str, Measured]], pace: Callable) -> float:
    """transformers' time over this project's."""
    return float(np.median([pace(r["transformers"][batch]) / pace(r["this project"][batch]) for r in rounds]))


def line(batch: int, rounds: Sequence[dict[str, Measured]], new_tokens: int) -> dict[str, str]:
    """A row of the table."""
    first = {name: 1000 * np.median([first_token(r[name][batch]) for r in rounds]) for name in SIDES}
    speed = {name: batch / np.median([token_time(r[name][batch]) for r in rounds]) for name in SIDES}
    return {
        "batch": str(batch),
        **{f"first token, {name}": f"{first[name]:.1f} ms" for name in SIDES},
        "x first": f"{ratio(batch, rounds, first_token):.2f}",
        **{f"tokens/s, {name}": f"{speed[name]:,.0f}" for name in SIDES},
        "x tokens/s": f"{ratio(batch, rounds, token_time):.2f}",
    }


def same_ids(batch: int, rounds: Sequence[dict[str, Measured]]) -> bool:
    """Whether both sides gave the same ids in all rounds; says where they did not."""
    for sides in rounds:
        theirs, ours = (sides[name][batch][0] for name in SIDES)
        if theirs.shape != ours.shape or (theirs != ours).any():
            print(f"batch {batch}: {(theirs != ours).any(-1).sum()} of {batch} answers differ")
            return False
    return True


def with_transformers(
    *,
    config: Any,
    folder: Path | None,
    batches: Sequence[int],
    new_tokens: int,
    pictures: np.ndarray,
    before: np.ndarray,
    questions: np.ndarray,
    device: str,
    dtype: str,
) -> tuple[Callable[[], Measured], Callable[[], None]]:
    """A step asks transformers all batches (see `variants`); without a `folder` of weights they are random."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from benchmarks.torch_step import llava_config, open_device, random_model

    at, kind = open_device(device), getattr(torch, dtype)
    if folder:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(at)
    else:
        model = random_model(LlavaForConditionalGeneration, llava_config(config), at, kind)
    model.eval()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
    module = load_family("llava")
    pixels = ((pictures / 255 - module.MEAN) / module.STD).transpose(0, 3, 1, 2).astype(np.float32)
    picture = np.full(config.num_patches, model.config.image_token_id)

    def answers(rows: int, count: int) -> np.ndarray:
        ids = np.stack([np.concatenate([before, picture, question]) for question in questions[:rows]])
        inputs = torch.from_numpy(ids).to(at)
        found = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=torch.from_numpy(pixels[:rows]).to(at, kind),
            max_new_tokens=count,
        )
        return found[:, ids.shape[1] :].cpu().numpy()

    def step() -> Measured:
        measured = {}
        for rows in batches:
            began = time.perf_counter()
            answers(rows, 1)
            middle = time.perf_counter()
            ids = answers(rows, new_tokens)
            measured[rows] = ids, middle - began, time.perf_counter() - middle
        return measured

    return step, lambda: None


def with_this_project(
    *,
    config: Any,
    folder: Path | None,
    batches: Sequence[int],
    new_tokens: int,
    pictures: np.ndarray,
    before: np.ndarray,
    questions: np.ndarray,
    device: str,
    dtype: str,
) -> tuple[Callable[[], Measured], Callable[[], None]]:
    """The same of this project."""
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_step import load, open_mesh, open_sized
    from configs.llava import get_config
    from redvillm_jax.inference.engine import Generation, Inference
    from redvillm_jax.inference.prompts import Prompt
    from redvillm_jax.model.weights import PARTS

    mesh = open_mesh(device)
    with jax.set_mesh(mesh):
        _, model = load(open_sized("llava", config, folder), plain_config(get_config()), mesh, dtype, PARTS)
    inference = Inference(model, mesh, jnp.dtype(dtype), [-1])  # no id stops an answer
    del model
    slots = list(range(config.num_patches))
    prompts = [Prompt(before.tolist(), slots, q.tolist(), len(before) + len(slots)) for q in questions]
    generation = Generation(max_new_tokens=new_tokens)

    def step() -> Measured:
        measured = {}
        for rows in batches:
            began = time.perf_counter()
            videos = {row: ({"pictures": pictures[row]}, prompts[row]) for row in range(rows)}
            prefixes = inference.prefill(videos, rows)
            state = inference.start(prompts[:rows], range(rows), [prefixes], generation, range(rows), rows)
            np.asarray(state.current)
            middle = time.perf_counter()
            state = inference.decode(state, generation, new_tokens)
            ids = np.asarray(state.ids)[:, :new_tokens]
            measured[rows] = ids, middle - began, time.perf_counter() - began
        return measured

    return step, lambda: None


if __name__ == "__main__":
    run(main)
