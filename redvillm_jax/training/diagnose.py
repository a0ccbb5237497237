"""Finds the first bad step of a failed training, and its bad rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.packing import Row, Step

EXPLODED = 3  # times the loss of uniform guesses; training does not recover from such a loss
NAMED = 3  # rows in a message


def check_steps(
    values: Sequence[Mapping[str, Any]],
    steps: Sequence[Step],
    first: int,
    vocab_size: int,
    name_row: Callable[[Row], str],
    last_good: Callable[[], str],
) -> None:
    """Raises UserError with step, rows and the last good checkpoint if a step is bad.

    A step is bad when its loss or gradient norm is not finite, or its loss is above EXPLODED times ln(vocab_size).
    values: loss, grad_norm and row_losses (R,) of consecutive steps. first: the index of their first step, from 0.
    name_row: returns a row's name for the message.
    """
    limit = EXPLODED * math.log(vocab_size)
    for step, metrics in enumerate(values, start=first):
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if math.isfinite(loss + norm) and loss <= limit:
            continue
        rows = np.asarray(metrics["row_losses"])[: len(steps[step])]
        if math.isfinite(loss + norm):
            found = f"a loss above {limit:.1f} has exploded"
            bad = np.argsort(-rows)
        else:
            found = "not a number"
            bad = np.flatnonzero(~np.isfinite(rows))
        some = [f"row {r} ({name_row(steps[step][r])})" for r in bad[:NAMED]]
        more = [f"and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        where = "; ".join(some + more) if len(some) else "in no single row, but in the gradient"
        everywhere = "all rows, so the weights rather than the data: " if np.isnan(rows).all() else ""
        raise UserError(
            f"step {step + 1}: loss {loss:.6g}, gradient norm {norm:.6g}: {found}; {everywhere}{where}; "
            f"last good checkpoint: {last_good()}. Lower the learning rate, or look at these questions and their videos"
        )


def in_words(row: Row, videos: Sequence[Mapping[str, Any]], instructions: Sequence[Mapping[str, Any]]) -> str:
    """Names a row: its videos, each with the ids of its questions. The row holds indices into both sequences."""
    return ", ".join(
        f"{videos[video]['video']}: {' '.join(instructions[q]['id'] for q in questions)}" for video, questions in row
    )
