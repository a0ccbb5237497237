"""Measures variants of one piece of work, each in a process of its own; used by train_vs_torch and encode_vs_torch.

A variant's module of `benchmarks` has a function that returns (step, peak): step() does the work once, waits for it
and returns what is compared with the other variants; peak() is the memory used so far in bytes, or None.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.common.tables import markdown_table
from redvillm_jax.bases.contract import known_families

WARM_UP = 2


class Variant(NamedTuple):
    """A way to do the work: a module of `benchmarks`, its arguments, and settings to try until one fits."""

    name: str
    module: str
    arguments: dict[str, Any]
    settings: tuple[dict[str, Any], ...] = ({},)


class Result(NamedTuple):
    """seconds: median of a step; first, last: what the first and the last step returned."""

    seconds: float
    first: Any
    last: Any
    peak_bytes: int | None
    settings: str


class Running(NamedTuple):
    """A started variant: its process, the pipe to it, the first step's value, and the settings that fitted."""

    process: Any
    pipe: Connection
    first: Any
    settings: str


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags that both benchmarks have beside the parser's own, with their defaults for this machine, and `gpu`."""
    parser.add_argument("--family", default="llava", help="llava or qwen_vl (llava)")
    parser.add_argument("--size", choices=("tiny", "7b"), help="tiny or 7b (7b where there is a GPU)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round (8)")
    parser.add_argument("--rounds", type=int, help="rounds of each variant (5 on a CPU, 1 on a GPU)")
    flags = parser.parse_args(argv)
    flags.gpu = gpu_name()
    flags.size = flags.size or ("7b" if flags.gpu else "tiny")
    flags.rounds = (1 if flags.gpu else 5) if flags.rounds is None else flags.rounds
    if flags.family not in known_families():
        raise UserError(f"--family={flags.family}: expected one of {', '.join(known_families())}")
    if flags.size == "7b" and not flags.gpu:
        raise UserError("--size=7b needs a GPU and nvidia-smi finds none; leave it out for the tiny comparison")
    for name in ("steps", "rounds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: expected 1 or more")
    return flags


def failed(result: Result | str) -> bool:
    """Whether a variant has a complaint instead of a result."""
    return isinstance(result, str)


def gpu_name() -> str:
    """The first GPU's name, "" without one; asked of nvidia-smi, so that no library takes its memory."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def measure(
    function: str, variants: Sequence[Variant], *, rounds: int, steps: int, alternate: bool
) -> dict[str, Result | str]:
    """Times `function` of every variant's module, `rounds` times `steps` steps, and says so as results come in.

    alternate: all variants run at once and take turns round by round; else one after another. A variant that
    fails gets its complaint as its result.
    """
    # A process has the GPU to itself: JAX may take all of it, less what the driver and cuDNN need.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if variants[0].arguments["device"] == "cpu" else "cuda,cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    results: dict[str, Result | str] = {}
    for together in [list(variants)] if alternate else [[variant] for variant in variants]:
        running: dict[str, Running] = {}
        for variant in together:
            started = time.perf_counter()
            answer = start(function, variant)
            if isinstance(answer, str):
                results[variant.name] = answer
                print(f"{variant.name}: {answer}", flush=True)
                continue
            running[variant.name] = answer
            seconds = time.perf_counter() - started
            print(f"{variant.name}: ready after {seconds:.0f} s {answer.settings}", file=sys.stderr, flush=True)
        times: dict[str, list[float]] = {name: [] for name in running}
        last: dict[str, tuple] = {}
        for _ in range(rounds):
            for name, worker in running.items():
                if name in results:
                    continue
                answer = ask(worker.process, worker.pipe, steps)
                if isinstance(answer, str):
                    results[name] = answer
                    print(f"{name}: {answer}", flush=True)
                else:
                    times[name] += answer[0]
                    last[name] = answer[1:]
        for name, worker in running.items():
            if name not in results:
                seconds = float(np.median(times[name]))
                results[name] = Result(seconds, worker.first, *last[name], worker.settings)
                print(f"{name}: {1000 * seconds:.1f} ms", file=sys.stderr, flush=True)
            stop(worker.process, worker.pipe)
    return results


def start(function: str, variant: Variant) -> Running | str:
    """A variant's process after its warm-up, with the first of its settings that the memory suffices for."""
    complaint = ""
    for setting in variant.settings:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        arguments = {**variant.arguments, **setting}
        process = context.Process(target=work, args=(other, variant.module, function, arguments), daemon=True)
        process.start()
        other.close()
        answer = ask(process, pipe)
        text = " ".join(f"{key}={value}" for key, value in setting.items())
        if not isinstance(answer, str):
            return Running(process, pipe, answer[0], text)
        stop(process, pipe)
        complaint = answer
        if not out_of_memory(answer):
            break
        print(f"{variant.name}: out of memory {text}", file=sys.stderr, flush=True)
    return complaint


def out_of_memory(complaint: str) -> bool:
    """Whether a complaint of PyTorch or JAX is about the GPU's memory."""
    return "out of memory" in complaint.lower() or "RESOURCE_EXHAUSTED" in complaint


def ask(process: Any, pipe: Connection, steps: int | None = None) -> tuple | str:
    """The next answer of a worker; a complaint is a string."""
    try:
        if steps is not None:
            pipe.send(steps)
        return pipe.recv()
    except (EOFError, OSError):
        process.join(10)
        return f"failed: its process ended with exit code {process.exitcode}"


def stop(process: Any, pipe: Connection) -> None:
    """Ends a worker that is waiting, and gives its memory back."""
    pipe.close()
    process.join(30)
    if process.is_alive():
        process.terminate()
        process.join()


def work(pipe: Connection, module: str, function: str, arguments: Mapping[str, Any]) -> None:
    """The worker: builds the step, warms up, then answers every number of steps with their seconds."""
    try:
        if arguments["device"] == "cpu":
            # Threads of one core: waiting threads that spin would slow a library down whenever the machine is shared.
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        step, peak = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**arguments)
        first, *_ = [step() for _ in range(WARM_UP)]
        pipe.send((first,))
        while True:
            seconds = []
            for _ in range(pipe.recv()):
                began = time.perf_counter()
                last = step()
                seconds.append(time.perf_counter() - began)
            pipe.send((seconds, last, peak()))
    except EOFError:  # the pipe is closed: nothing more to do
        return
    except Exception as error:  # whatever goes wrong here, the other variants go on
        pipe.send(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def print_table(lines: Sequence[Mapping[str, str]]) -> None:
    """Rows of equal keys as a Markdown table with aligned columns."""
    if not lines:
        return
    print("\n".join(markdown_table(list(lines[0]), [list(line.values()) for line in lines])))
