"""Reads question files as numbered records: JSON, JSON Lines, CSV, TSV or Parquet."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.media.video_files import VIDEO_EXTENSIONS


class Record(NamedTuple):
    """One entry of a file: a list item, a line or a table row. Messages about it begin with `where`."""

    where: str
    fields: dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """Reads the records of a file. Its first bytes tell Parquet and JSON, its extension CSV and TSV.

    Records are numbered from 1; in JSON Lines, CSV and TSV the number is the line's. The header of a table decides
    whether commas or tabs separate its cells. Empty cells are left out. Raises UserError naming file and row.
    """
    content = _read_bytes(path)
    if content.startswith(b"PAR1"):
        numbered = _read_parquet(path, content)
    else:
        text = _decode(path, content)
        if Path(path).suffix.lower() in (".csv", ".tsv"):
            numbered = _read_table(path, text)
        elif text.lstrip().startswith("["):
            numbered = list(enumerate(_parse(str(path), text), start=1))
        else:
            lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
            numbered = [(number, _parse(f"{path}: row {number}", line)) for number, line in lines]
    records = [Record(f"{path}: row {number}", row) for number, row in numbered]
    for record in records:
        check_object(*record)
    return records


def read_json(path: str | Path) -> Any:
    """Reads a file that is one JSON value. Raises UserError."""
    return _parse(str(path), read_text(path))


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Raises UserError."""
    return _decode(path, _read_bytes(path))


def value(record: Record, field: str) -> Any:
    """The value of a required field. Raises UserError."""
    if field not in record.fields:
        found = ", ".join(show(key).strip('"') for key in list(record.fields)[:12])
        raise UserError(f"{record.where}: field {field!r} is missing, the row has {found or 'no field'}")
    return record.fields[field]


def text(record: Record, field: str) -> str:
    """The text of a required field. Raises UserError for an empty one."""
    found = value(record, field)
    if not isinstance(found, str):
        raise UserError(f"{record.where}: field {field!r} is {show(found)}, expected text")
    if not found.strip():
        raise UserError(f"{record.where}: field {field!r} is empty, expected text")
    return found


def name(record: Record, field: str) -> str:
    """A required text or whole number, as text, because ids are published as either. Raises UserError."""
    found = value(record, field)
    return str(found) if isinstance(found, int) and not isinstance(found, bool) else text(record, field)


def texts(record: Record, field: str) -> list[str]:
    """A required list of texts or whole numbers, as texts. Raises UserError, also for an empty text."""
    found = value(record, field)
    if not isinstance(found, list):
        raise UserError(f"{record.where}: field {field!r} is {show(found)}, expected a list of texts")
    entries = Record(f"{record.where}: {field}", {str(i): entry for i, entry in enumerate(found, start=1)})
    return [name(entries, i) for i in entries.fields]


def video_name(record: Record, field: str, path: str) -> str:
    """A video's id from a path or file name: the last part without a video's extension. Raises UserError."""
    last = video_path(record, field, path).rsplit("/", 1)[-1]
    extension = next((extension for extension in VIDEO_EXTENSIONS if last.lower().endswith(extension)), "")
    return last.removesuffix(last[len(last) - len(extension) :])


def video_path(record: Record, field: str, path: str) -> str:
    """A video's path or file name from a question. Raises UserError for a path without a name.

    The suffix `.pkl` is removed: Video-ChatGPT's converter writes the name of a feature file.
    """
    path = path.replace("\\", "/").strip().removesuffix(".pkl")
    if os.path.splitext(f"_{path.rsplit('/', 1)[-1]}")[0] == "_":
        raise UserError(f"{record.where}: field {field!r} is {show(path)}, expected the name of a video")
    return path


def check_object(where: str, value: Any) -> dict[str, Any]:
    """Returns the value if it is an object. Raises UserError otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {show(value)}, expected an object with fields")
    return value


def show(value: Any) -> str:
    """A value for a message, on one line and cut to 60 characters."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    line = json.dumps(value, ensure_ascii=False, default=repr).encode(errors="backslashreplace").decode()
    return line if len(line) <= 60 else f"{line[:60]}…"


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path: str | Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in brackets
        raise UserError(f"{where}: is not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that comes twice, whose first value would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {show(next(key for key in keys if keys.count(key) > 1))} comes twice in an object")
    return value


def _read_table(path: str | Path, text: str) -> list[tuple[int, dict[str, str]]]:
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path}: row {reader.line_num}: is not CSV: {error}") from None
    if not rows:
        return []
    (_, columns), *rows = rows
    _check_columns(path, columns)
    for number, row in rows:
        if len(row) != len(columns):
            raise UserError(f"{path}: row {number}: has {len(row)} cells, the header has {len(columns)}")
    return [(number, {c: cell for c, cell in zip(columns, row, strict=True) if cell}) for number, row in rows]


def _read_parquet(path: str | Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    import pyarrow  # only Parquet needs it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        _check_columns(path, table.column_names)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not Parquet: {' '.join(str(error).split())[:200]}") from None
    return [(i, {c: v for c, v in row.items() if v is not None}) for i, row in enumerate(rows, start=1)]


def _check_columns(path: str | Path, columns: list[str]) -> None:
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise UserError(f"{path}: column {show(twice[0])} comes twice")
