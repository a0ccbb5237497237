"""How every command reports a user's mistake: one line, exit code 2, no traceback."""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in the input: the message says what was found, where, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors; `run` takes `--debug` out before it looks."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs `main(argv)` as a command and exits with its code.

    A `UserError` becomes one line on stderr and exit code 2; `--debug` anywhere on the command line shows
    its traceback as well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        code = main(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
