"""Reads several question files, each with a weight, as one list of instructions."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.questions.formats import Instruction
from data_pipeline.questions.instructions import read_instructions
from data_pipeline.questions.records import show


def read_mixture(
    files: Sequence[str], read: Callable[[str, list[str]], list[Instruction]] = read_instructions
) -> tuple[list[Instruction], dict[str, Any]]:
    """Reads files given as "file" or "file:weight"; a weight says how often an epoch asks each question of the file.

    The whole part of a weight repeats every instruction; repeats have ids "x#2", "x#3", …. The fraction takes a share
    of the instructions by a hash of their ids, so that the choice is the same each time and a smaller share is part of
    a larger one. Files that have an id in common get their name without extension before all their ids, "a/x".

    read: returns the instructions of a file, and adds the reasons of left-out records to the list that it gets.

    Returns the instructions and {"files": per file {"file", "weight", "questions", "taken", "prefix"}, "rows_left_out":
    reasons, "questions_repeated": [{"id", "same_as"}], repetitions within the files themselves}. Raises UserError.
    """
    paths, weights = zip(*map(split_weight, files), strict=True)
    left_out: list[str] = []
    parts = [read(path, left_out) for path in paths]
    count = Counter(instruction["id"] for part in parts for instruction in part)
    mixture: list[Instruction] = []
    originals: list[Instruction] = []
    report = []
    for path, weight, part in zip(paths, weights, parts, strict=True):
        prefix = f"{Path(path).stem}/" if any(count[instruction["id"]] > 1 for instruction in part) else ""
        taken = 0
        for instruction in part:
            again = copies(instruction["id"], weight)
            instruction = instruction | {"id": prefix + instruction["id"]}
            originals += [instruction][:again]
            for i in range(1, again + 1):
                mixture.append(instruction | ({"id": f"{instruction['id']}#{i}"} if i > 1 else {}))
            taken += again
        if not taken:
            raise UserError(f"{path}:{weight:g}: the weight leaves none of {len(part)} questions; take a larger one")
        report.append({"file": path, "weight": weight, "questions": len(part), "taken": taken, "prefix": prefix})
    ids = Counter(instruction["id"] for instruction in mixture)
    if twice := [id for id, times in ids.items() if times > 1]:
        raise UserError(
            f"{', '.join(paths)}: id {show(twice[0])} comes twice ({len(twice)} ids do): "
            "give each file once, and rename one of two files that share ids"
        )
    return mixture, {
        "files": report,
        "rows_left_out": left_out,
        "questions_repeated": repeated_questions(originals),
    }


def split_weight(file: str) -> tuple[str, float]:
    """Splits "file:weight"; the default weight is 1. Raises UserError for a weight out of bounds."""
    match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", file, re.DOTALL)
    if not match:
        return file, 1.0
    weight = float(match[2])
    if not 0 < weight <= 1000:
        raise UserError(f"{file}: the weight is {match[2]}, expected more than 0 and at most 1000")
    return match[1], weight


def copies(id: str, weight: float) -> int:
    """How often an epoch asks a question: the weight, rounded up for a fixed share of the ids and down for others."""
    place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8]) / 2**64
    return math.floor(weight) + (place < weight % 1)


def repeated_questions(instructions: Sequence[Instruction]) -> list[dict[str, str]]:
    """The instructions that repeat the video (or its part), the question and the answer of an earlier one."""
    first: dict[tuple[Any, ...], str] = {}
    repeated = []
    for instruction in instructions:
        part = instruction.get("start"), instruction.get("end")
        same_as = first.setdefault(
            (instruction["video"], *part, instruction["question"], instruction["answer"]), instruction["id"]
        )
        if same_as != instruction["id"]:
            repeated.append({"id": instruction["id"], "same_as": same_as})
    return repeated
