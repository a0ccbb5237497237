"""Appends to JSON Lines files during a run, on local disks and in buckets.

Read them with `data_pipeline.common.artefacts.read_lines`.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.files import as_path, in_bucket, write_text

BUCKET_SECONDS = 10  # between two writes of an object; each writes it whole, and buckets allow one per second


def open_lines(path: str | Path, kept: Sequence[dict[str, Any]]) -> "LineFile | LineObject":
    """Opens a file for appending, after replacing its content by the lines `kept`."""
    path, text = as_path(path), as_text(kept)
    write_text(path, text)
    return LineObject(path, text) if in_bucket(path) else LineFile(path)


def as_text(lines: Sequence[dict[str, Any]]) -> str:
    """Formats objects as JSON lines."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


class LineFile:
    """A local file that grows; each write is flushed at once."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def write(self, *lines: dict[str, Any]) -> None:
        """Appends objects, a line each."""
        self.file.write(as_text(lines))
        self.file.flush()

    def flush(self) -> None:
        """Does nothing: `write` flushes."""

    def close(self) -> None:
        self.file.close()


class LineObject:
    """An object in a bucket. It cannot grow, so all lines are written again, at most every BUCKET_SECONDS."""

    def __init__(self, path: Path, text: str):
        self.path, self.texts, self.written, self.time = path, [text], 1, time.monotonic()

    def write(self, *lines: dict[str, Any]) -> None:
        """Appends objects, a line each."""
        self.texts.append(as_text(lines))
        if time.monotonic() - self.time >= BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all lines to the bucket. Call it before a checkpoint: a killed run continues after its checkpoint."""
        if self.written < len(self.texts):
            write_text(self.path, "".join(self.texts))
            self.written, self.time = len(self.texts), time.monotonic()

    close = flush
