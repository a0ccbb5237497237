"""Several question files as one set, each with a weight."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.questions.formats import Row
from data_pipeline.questions.instructions import read_instructions
from data_pipeline.questions.records import show


def read_mixture(
    files: Sequence[str], read: Callable[[str, list[str]], list[Row]] = read_instructions
) -> tuple[list[Row], dict[str, Any]]:
    """Reads "file" or "file:weight", e.g. "a.json:0.5": how often an epoch asks each of its questions.

    The whole part of a weight repeats every row, its fraction takes a share of the rows by a hash of their ids: the
    same rows each time, and those of a smaller share are among those of a larger one. Repeats have ids "x#2", "x#3", ….
    Files that have an id in common get their name without extension before all their ids, "a/x".

    read: gives the rows of a file, and adds to a list the reasons of those that it leaves out.

    Returns the rows and {"files": per file {"file", "weight", "questions", "taken", "prefix"}, "rows_left_out": their
    reasons, "questions_repeated": [{"id", "same_as"}], questions that the files themselves have more than once}.
    Raises UserError.
    """
    paths, weights = zip(*map(split_weight, files), strict=True)
    left_out: list[str] = []
    parts = [read(path, left_out) for path in paths]
    count = Counter(row["id"] for part in parts for row in part)
    mixture: list[Row] = []
    originals: list[Row] = []
    report = []
    for path, weight, part in zip(paths, weights, parts, strict=True):
        prefix = f"{Path(path).stem}/" if any(count[row["id"]] > 1 for row in part) else ""
        taken = 0
        for row in part:
            again = copies(row["id"], weight)
            row = row | {"id": prefix + row["id"]}
            originals += [row][:again]
            mixture += [row | {"id": f"{row['id']}#{i}"} if i > 1 else row for i in range(1, again + 1)]
            taken += again
        if not taken:
            raise UserError(f"{path}:{weight:g}: the weight leaves none of {len(part)} questions; take a larger one")
        report.append({"file": path, "weight": weight, "questions": len(part), "taken": taken, "prefix": prefix})
    ids = Counter(row["id"] for row in mixture)
    if twice := [id for id, times in ids.items() if times > 1]:
        raise UserError(
            f"{', '.join(paths)}: id {show(twice[0])} comes twice ({len(twice)} do): "
            "give each file once, and files that share ids different names"
        )
    return mixture, {
        "files": report,
        "rows_left_out": left_out,
        "questions_repeated": repeated_questions(originals),
    }


def split_weight(file: str) -> tuple[str, float]:
    """Splits "file:weight"; without one the weight is 1. Raises UserError for a weight that takes nothing."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", file, re.DOTALL)
    if not match:
        return file, 1.0
    weight = float(match[2])
    if not 0 < weight <= 1000:
        raise UserError(f"{file}: the weight is {match[2]}, expected more than 0 and at most 1000")
    return match[1], weight


def copies(id: str, weight: float) -> int:
    """How often a row is asked per epoch: the weight, rounded up for a fixed share of the ids and down for others."""
    place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) / 2**64
    return math.floor(weight) + (place < weight % 1)


def repeated_questions(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Rows that ask a video, or the same part of it, the same question with the same answer as an earlier row."""
    first: dict[tuple[Any, ...], str] = {}
    repeated = []
    for row in rows:
        part = row.get("start"), row.get("end")
        same_as = first.setdefault((row["video"], *part, row["question"], row["answer"]), row["id"])
        if same_as != row["id"]:
            repeated.append({"id": row["id"], "same_as": same_as})
    return repeated
