"""The command line of every command: one parser, the types of its arguments, and what is said of a mistake.

A flag is written --name=value or --name value; --num-frames means --num_frames. `errors.run` takes --debug out first.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.common import file_hashes
from data_pipeline.common.errors import UserError, did_you_mean
from data_pipeline.common.files import as_path

WIDTH, COLUMN = 120, 26  # of the text of --help, and where what it says of a flag begins


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors.

    command: "python -m redvillm_jax.train"; doc: what --help says first, as it is written; needed: flags that must be
    given and not be empty; arguments: what stands on the command line without a flag, for the line of usage.
    """

    def __init__(self, command: str, doc: str, *, needed: Sequence[str] = (), arguments: str = ""):
        self.needed = tuple(needed)
        wanted = "".join(f" --{name}=…" for name in needed)
        super().__init__(
            prog=command,
            usage=f"{command}{' ' if arguments else ''}{arguments}{wanted} [--flag=value …]",
            description=doc,
            formatter_class=in_columns,
            allow_abbrev=False,
            add_help=False,  # that is the last group of flags
        )

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The flags by name, each of its type. --check_files, where a command has it, is told to `file_hashes`."""
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="help", help="show this text")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        flags, rest = self.parse_known_args([underscored(arg) for arg in argv])
        if rest and rest[0].startswith("-"):
            name = rest[0].partition("=")[0]
            near = did_you_mean(name, [f"--{known}" for known in vars(flags)])
            raise UserError(f"unknown flag {name}{near} (see --help)")
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value (see --help)")
        for name in self.needed:
            if getattr(flags, name) in (None, ""):
                raise UserError(f"--{name} is needed (see --help)")
        if "check_files" in flags:
            file_hashes.always = flags.check_files
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def in_columns(prog: str) -> argparse.HelpFormatter:
    """The layout of --help: the description as it is written, the flags in two columns."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=COLUMN, width=WIDTH)


def underscored(arg: str) -> str:
    """--rows-per-chip=2 as --rows_per_chip=2."""
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


def add_check_files(parser: Parser) -> None:
    """Adds the flag --check_files to a command that opens a base."""
    parser.add_argument(file_hashes.FLAG, action="store_true", help=file_hashes.HELP)


# ---- types of arguments: they take the text, and raise ArgumentTypeError with what was expected


def path(text: str) -> Path | None:
    """A path, on a disk or in a bucket; None for an empty text."""
    return as_path(text) if text else None


def local_path(text: str) -> Path | None:
    """A path on a disk; None for an empty text."""
    return Path(text) if text else None


def whole(most: int | None = None) -> Callable[[str], int]:
    """A whole number from 1 to `most`, by default of at most 9 digits."""
    limit = 10**9 - 1 if most is None else most
    expected = "a positive integer of at most 9 digits" if most is None else f"a number from 1 to {most}"

    def convert(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text[:12]) <= limit):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text:.80}")
        return int(text)

    return convert


def number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Any number of a type."""

    def convert(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text:.80}") from None

    return convert


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def checked(function: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type by a function that raises ValueError with what was expected."""

    def convert(text: str) -> Any:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
