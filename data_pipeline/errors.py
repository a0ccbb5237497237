"""How every command reports a user's mistake: one line, exit code 2, no traceback."""

import argparse
import difflib
import errno
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """A mistake in the input: the message says what was found, where, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors; `run` takes `--debug` out before it looks."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name that asks for the known one most like it; "" where none is.

    Initials count as the name: lr is learning_rate.
    """

    def likeness(other: str) -> float:
        words = re.split("[._]", other)
        forms = other, "".join(word[:1] for word in words), *words
        return max(difflib.SequenceMatcher(None, name.lower(), form).ratio() for form in forms)

    nearest = max(known, key=likeness, default=None)
    return f"; did you mean {nearest}?" if nearest is not None and likeness(nearest) > 0.6 else ""


def full_disk(error: BaseException | None) -> str | None:
    """What to say if `error`, or one that caused it, is about a full disk or quota; None otherwise."""
    while error is not None:
        said = re.search(r"No space left on device|Disk quota exceeded", str(error))
        if said or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            file = re.search(r"[\"'](/[^\"']+)[\"']", str(error))
            where = f" ({file[1]})" if file else ""
            return f"no space left on the disk{where}: free some, then run the same command again"
        error = error.__cause__ or error.__context__
    return None


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` as a command and exits with its code.

    A `UserError` or a full disk becomes one line on stderr and exit code 2; `--debug` anywhere on the command line
    shows its traceback as well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        code = main(argv)
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else full_disk(error)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
