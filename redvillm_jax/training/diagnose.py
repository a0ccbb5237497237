"""Finds the cause of a failed training: the first bad step of a few, and its rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.packing import Row, Step

EXPLODED = 3  # times the loss of a model that knows nothing: no training comes back from there
NAMED = 3  # rows in a message


def check_steps(
    values: Sequence[Mapping[str, Any]],
    steps: Sequence[Step],
    first: int,
    vocab_size: int,
    name_row: Callable[[Row], str],
    last_good: Callable[[], str],
) -> None:
    """Raises UserError, naming step, rows and the last good checkpoint, when a step has gone wrong.

    values: per step, from the one counted `first` on (from 0), its loss, grad_norm and row_losses (R,). Wrong is what
    is not a number, and a loss of more than EXPLODED times ln(vocab_size). name_row: what to call a row.
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
    """A row: its videos, by index in `videos`, each with the ids of its questions, by index in `instructions`."""
    return ", ".join(
        f"{videos[video]['video']}: {' '.join(instructions[q]['id'] for q in questions)}" for video, questions in row
    )
