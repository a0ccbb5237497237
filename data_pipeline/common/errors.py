"""Reports a user's mistake in every command: one line, exit code 2, no traceback."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in the input. The message says where it is, what was found, what is expected, and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the known name most similar to an unknown one, or "" without a similar name.

    Initials count as the name: lr is learning_rate.
    """

    def likeness(other: str) -> float:
        words = re.split("[._]", other)
        forms = other, "".join(word[:1] for word in words), *words
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    nearest = max(known, key=likeness, default=None)
    return f"; did you mean {nearest}?" if nearest is not None and likeness(nearest) > 0.6 else ""


def full_disk(error: BaseException | None) -> str | None:
    """The message when `error`, or a cause of it, is about a full disk or quota; None otherwise."""
    while error is not None:
        said = re.search(r"No space left on device|Disk quota exceeded", str(error))
        if said or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            file = re.search(r"[\"'](/[^\"']+)[\"']", str(error))
            where = f" ({file[1]})" if file else ""
            return f"no space left on the disk{where}: free some, then run the same command again"
        error = error.__cause__ or error.__context__
    return None


ROOT = Path(__file__).parents[2]
PACKAGES = tuple(ROOT / name for name in ("data_pipeline", "redvillm_jax", "conversion", "configs"))
FILE_REMEDIES = {
    errno.EACCES: "change its permissions, or choose another",
    errno.EPERM: "change its permissions, or choose another",
    errno.EROFS: "choose a folder on a disk that may be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
    errno.ELOOP: "its links lead to one another; remove them",
    errno.EIO: "its disk is damaged or gone; look there (dmesg), or take a copy on another disk",
}


def file_problem(error: BaseException) -> str | None:
    """The message when `error` is about a file that cannot be used; None otherwise."""
    if not (isinstance(error, OSError) and error.errno in FILE_REMEDIES):
        return None
    if error.filename is None:  # of a file that was open already
        return f"a file: {error.strerror.lower()}: {FILE_REMEDIES[error.errno]}" if error.errno == errno.EIO else None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else error.filename
    name = name if len(str(name)) <= 100 else f"{name[:60]}…{name[-30:]}"
    return f"{name}: {error.strerror.lower()}: {FILE_REMEDIES[error.errno]}"


def unexpected(error: BaseException) -> str:
    """The message for an unexpected error: its type and its place in the code."""
    said = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(folder) for folder in PACKAGES)]
    where = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in (own or frames)[-1:])
    return (
        f"{type(error).__name__}{where}{': ' if said else ''}{said}: the command does not expect this; --debug shows "
        "the whole traceback, please report it with the command"
    )


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` as a command and exits with its code.

    A mistake, a full disk or an unusable file becomes one line on stderr and exit code 2. Any other error becomes one
    line and exit code 1. `--debug` anywhere on the command line shows the traceback as well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        code = main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = str(error) if isinstance(error, UserError) else full_disk(error) or file_problem(error)
        if known is None and isinstance(error, MemoryError):
            known = "this machine has too little memory for that: ask for less at once (see --help)"
        print(f"error: {known or unexpected(error)}", file=sys.stderr)
        code = 2 if known else 1
    sys.exit(code or 0)
