"""Command lines: --config=FILE with --config.key=value overrides, beside a command's own flags."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from data_pipeline import file_hashes
from data_pipeline.errors import UserError


def parse(argv: list[str], doc: str, options: Mapping[str, tuple[str | bool | list | None, str]]) -> dict[str, Any]:
    """Reads `--config` and the flags `options`: name -> (default, help); a flag is boolean if its default is, may be
    repeated if that is a list, and is a string otherwise.

    Returns {"config": plain nested dict or None, name: its value or None, …}. `--help` prints `doc`, the flags and the
    fields of the config, and exits. `--check_files` is told to `file_hashes`. Every mistake is a UserError.
    """
    argv = [arg if arg.startswith("--config") else underscored(arg) for arg in argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A config file.", flag_values=values, sys_argv=["command", *argv])
    flags.DEFINE_boolean("help", False, "Shows this text.", flag_values=values, short_name="h")
    options = {**options, file_hashes.FLAG.lstrip("-"): (False, file_hashes.HELP)}
    for name, (default, text) in options.items():
        kinds = {bool: flags.DEFINE_boolean, list: flags.DEFINE_multi_string}
        define = kinds.get(type(default), flags.DEFINE_string)
        define(name, default, text, flag_values=values)
    file = next((arg.partition("=")[2] for arg in argv if arg.startswith("--config=")), None)
    if file is not None and not Path(file.partition(":")[0]).is_file():
        raise UserError(f"--config={file}: no such file; give one such as configs/llava.py")
    try:
        rest = values(["command", *argv])[1:]
        config = None if values.config is None else json.loads(values.config.to_json())
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())[:300]} (see --help)") from None
    except Exception as error:  # a config file is code: whatever it raises is about it or its overrides
        message = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())
        raise UserError(f"--config={file}: {type(error).__name__}: {message[:300]} (see --help)") from error
    if values.help:
        print(doc)
        for name, (default, text) in options.items():
            print(f"  --{name}: {text}" + (f" ({default})" if default else ""))
        print("  --config: a config file; --config.NAME=VALUE sets one of its fields")
        if values.config is not None:
            print(f"\nFields of the config:\n{values.config}")
        sys.exit(0)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value (see --help)")
    file_hashes.always = values.check_files
    return {"config": config, **{name: values[name].value for name in options}}


def underscored(arg: str) -> str:
    """--rows-per-chip=2 as --rows_per_chip=2."""
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


def positive(flags: Mapping[str, str], name: str) -> int:
    """A flag as a positive integer."""
    if not flags[name].isdecimal() or len(flags[name]) > 9 or int(flags[name]) < 1:
        raise UserError(f"--{name} is {flags[name]!r:.80}, expected a positive integer of at most 9 digits")
    return int(flags[name])


def number(flags: Mapping[str, str], name: str, kind: type[int] | type[float]) -> int | float:
    """A flag as a number."""
    try:
        return kind(flags[name])
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name} is {flags[name]!r}, expected {expected}") from None
