"""Readers of question-answer files: every row becomes {"id", "video", "language", "question", "answer"}."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

FIELDS = ("id", "video", "language", "question", "answer")


def read_instructions(path: str | Path) -> list[dict[str, Any]]:
    """Reads a question file, whose first character tells its form.

    * JSON Lines, `{"id", "video", "language", "question", "answer"}` a line and optionally "kind"; further
      fields are kept as they are. "video" is the video's file name without extension.
    * VideoInstruct-100K's JSON list of `{"q", "a", "video_id"}`: English, the id is the row's index.

    Raises UserError naming file, row (from 1; a line's number in JSON Lines) and field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    rows = _video_instruct(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    if not rows:
        raise UserError(f"{path}: holds no questions")
    seen: dict[str, int] = {}
    for number, row in rows:
        first = seen.setdefault(row["id"], number)
        if first != number:
            raise UserError(f"{path}: row {number}: id {row['id']!r} is already that of row {first}")
    return [row for _, row in rows]


def _json_lines(path: str | Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: row {number}: is not JSON: {error}") from None
            rows.append((number, _checked(path, number, row, FIELDS, optional="kind")))
    return rows


def _video_instruct(path: str | Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    result = []
    for index, row in enumerate(rows):
        row = _checked(path, index + 1, row, ("q", "a", "video_id"))
        question = {"video": row["video_id"], "language": "en", "question": row["q"], "answer": row["a"]}
        result.append((index + 1, {"id": str(index), **question}))
    return result


def _checked(path, number: int, row: Any, fields: tuple[str, ...], optional: str | None = None) -> dict[str, Any]:
    """Returns `row`, an object whose `fields` are non-empty strings."""
    where = f"{path}: row {number}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: is a {type(row).__name__}, expected an object with {', '.join(fields)}")
    for field in fields:
        if field not in row:
            raise UserError(f"{where}: field {field!r} is missing (expected {', '.join(fields)})")
    for field in (*fields, optional):
        value = row.get(field, "-")
        if not isinstance(value, str) or not value.strip():
            found = "is empty" if isinstance(value, str) else f"is {json.dumps(value)[:40]}"
            raise UserError(f"{where}: field {field!r} {found}, expected text")
    return row
