"""Exchanges texts and errors between the processes of a run."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from data_pipeline.common.errors import UserError
from redvillm_jax.runtime.jax_private import allgather

T = TypeVar("T")
TEXT_BYTES = 1024  # of the text of a process; the rest is cut off
REASON_LENGTH = 300


class Failed(Exception):
    """Raised when a check fails, with the reason."""


def reason(error: Exception) -> str:
    """Returns an error in one line."""
    text = " ".join(str(error).split())[:REASON_LENGTH]
    return text if isinstance(error, (Failed, UserError)) else f"{type(error).__name__}: {text}"


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, in their order. Every process must call it."""
    mine = np.zeros(TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:TEXT_BYTES], np.uint8)
    mine[: len(encoded)] = encoded
    everyone = np.reshape(allgather(mine), (-1, TEXT_BYTES))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everyone]


def together(part: Callable[[], T]) -> T:
    """Runs `part()` in every process and returns its result if it succeeds in all of them.

    If it raises in one process, raises the same Failed in all, with the number of that process, so that no process
    waits for one that has left.
    """
    try:
        result, problem = part(), ""
    except Exception as error:
        result, problem = None, reason(error) or "failed"
    problems = gather(problem)
    bad = [i for i, text in enumerate(problems) if text]
    if not bad:
        return result
    if len(set(problems)) == 1:  # there is one process, or all have the same problem
        raise Failed(problems[0])
    more = f" (so or otherwise in {len(bad)} of {len(problems)} processes)" if len(bad) > 1 else ""
    raise Failed(f"process {bad[0]}: {problems[bad[0]]}{more}")


def same_everywhere(what: str, value: str) -> None:
    """Raises Failed, with the values, unless all processes have the same `value`."""
    values = gather(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise Failed(f"process {process} has {what} {other}, process 0 has {values[0]}")


def place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Makes a global array from an array that every process holds whole."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
