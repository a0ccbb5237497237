"""Writes the hashes of a folder's files to SHA256SUMS, and finds damaged files by them.

`sha256sum -c SHA256SUMS` in the folder checks the same. Files that are not in the list do not matter.
"""

import hashlib
import re
from collections.abc import Sequence

from etils import epath

from data_pipeline.common.errors import UserError

SUMS = "SHA256SUMS"


def seal(folder: epath.Path, leave_out: Sequence[str] = ()) -> None:
    """Writes SHA256SUMS for all files below `folder`, except the names in `leave_out`."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in file_names(folder, leave_out)]
    count = f"# {len(lines)} files\n"  # a comment for sha256sum; it shows that a list is complete
    (folder / SUMS).write_text("".join([count, *lines]))


def damaged(folder: epath.Path, leave_out: Sequence[str] = ()) -> list[str]:
    """Returns the names of files that are missing or have changed since `seal`; SHA256SUMS if the list itself has.

    Raises UserError for a file that cannot be read.
    """
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: value for value, name in (line.split("  ", 1) for line in lines if not line.startswith("#"))}
    except (OSError, ValueError):
        return [SUMS]
    there = set(file_names(folder, leave_out))
    try:
        wrong = {name for name, value in sums.items() if name not in there or value != sha256(folder / name)}
    except OSError as error:
        raise UserError(
            f"{folder}: {error.filename or 'a file'} cannot be read ({error.strerror}); is the disk well, and may this "
            "user read it?"
        ) from None
    if not lines[:1] or not re.fullmatch(r"# \d+ files", lines[0]):  # a list without a count
        return sorted(wrong | {name for name in there - sums.keys() if not hidden(name)})
    return sorted(wrong) if lines[0] == f"# {len(sums)} files" else [SUMS]


def hidden(name: str) -> bool:
    """Returns whether a file, or a folder above it, is hidden (begins with a dot, as .DS_Store)."""
    return any(part.startswith(".") for part in name.split("/"))


def file_names(folder: epath.Path, leave_out: Sequence[str]) -> list[str]:
    """Returns all files below a folder, relative to it, except SHA256SUMS and the names in `leave_out`."""
    names = []
    for path in folder.iterdir():
        if path.is_dir():
            names += [f"{path.name}/{name}" for name in file_names(path, leave_out)]
        elif path.name not in (SUMS, *leave_out):
            names.append(path.name)
    return sorted(names)


def sha256(path: epath.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
