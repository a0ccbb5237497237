"""JSON Lines files that grow while a run works and outlive its end, on local disks and in buckets.

`data_pipeline.common.artefacts.read_lines` reads them.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.files import as_path, in_bucket, write_text

BUCKET_SECONDS = 10  # between two writes of an object, which is written as a whole and at most once a second


def open_lines(path: str | Path, kept: Sequence[dict[str, Any]]) -> "LineFile | LineObject":
    """Opens a file for appending; it holds `kept` and nothing else then."""
    path, text = as_path(path), as_text(kept)
    write_text(path, text)
    return LineObject(path, text) if in_bucket(path) else LineFile(path)


def as_text(lines: Sequence[dict[str, Any]]) -> str:
    """Objects as JSON lines."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


class LineFile:
    """Appends lines, each flushed at once."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def write(self, *lines: dict[str, Any]) -> None:
        """Appends objects, a line each."""
        self.file.write(as_text(lines))
        self.file.flush()

    def flush(self) -> None:
        """What was written is in the file."""

    def close(self) -> None:
        self.file.close()


class LineObject:
    """The same for an object in a bucket: it cannot grow and is written again, with all its lines, now and then."""

    def __init__(self, path: Path, text: str):
        self.path, self.texts, self.written, self.time = path, [text], 1, time.monotonic()

    def write(self, *lines: dict[str, Any]) -> None:
        """Appends objects, a line each."""
        self.texts.append(as_text(lines))
        if time.monotonic() - self.time >= BUCKET_SECONDS:
            self.flush()

    def flush(self) -> None:
        """What was written is in the bucket: called before a checkpoint, after which a killed run would go on."""
        if self.written < len(self.texts):
            write_text(self.path, "".join(self.texts))
            self.written, self.time = len(self.texts), time.monotonic()

    close = flush
