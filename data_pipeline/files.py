"""Files that are never seen half-written."""

import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A name beside `path` to write under before renaming; the process's own."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
