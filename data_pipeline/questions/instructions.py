"""Reads a question file as instructions: {"id", "video", "language", "question", "answer"}, all text."""

import json
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.questions.formats import FORMATS, Instruction, leaving_out, read_own
from data_pipeline.questions.records import read_records, show


def read_instructions(path: str | Path, left_out: list[str] | None = None) -> list[Instruction]:
    """Reads a question file. The fields of its first record select the format (`formats.FORMATS`).

    Formats are the project's own schema, VideoInstruct-100K's, and the conversations of LLaVA and Qwen, each in JSON,
    JSON Lines, CSV, TSV or Parquet. A record that is no question about a video is left out, and its reason is added to
    `left_out`; without that list it is a UserError. Raises UserError naming file, row and field.
    """
    records = read_records(path)
    fields = records[0].fields if records else {}
    reader = next((reader for field, reader in FORMATS.items() if field in fields), read_own)
    return check_instructions(path, reader(records, left_out), left_out)


def check_instructions(
    path: str | Path, instructions: Iterable[tuple[str, Instruction]], left_out: list[str] | None = None
) -> list[Instruction]:
    """The instructions of (where, instruction) pairs, without those that JSON cannot hold (see `read_instructions`).

    Raises UserError when none is left, or when an id comes twice.
    """
    first: dict[str, str] = {}
    checked = []
    for where, instruction in instructions:
        if instruction["id"] in first:
            before = first[instruction["id"]].removeprefix(f"{path}: ")
            raise UserError(f"{where}: id {show(instruction['id'])} is already that of {before}")
        with leaving_out(left_out):
            check_json(where, instruction)
            first[instruction["id"]] = where
            checked.append(instruction)
    if not checked:
        raise UserError(f"{path}: holds no questions" + (f"; the first row: {left_out[0]}" if left_out else ""))
    return checked


def check_json(where: str, instruction: Instruction) -> None:
    """Raises UserError for an instruction that JSON cannot hold: bytes and dates of Parquet, halves of characters."""
    try:
        json.dumps(instruction, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {str(error)[:200]}") from None
