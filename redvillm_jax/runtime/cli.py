"""Command lines: --config=FILE with --config.key=value overrides, beside a command's own flags."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from data_pipeline.common import file_hashes
from data_pipeline.common.errors import UserError, did_you_mean

ROOT = Path(__file__).parents[2]
BUNDLED = {path.stem: path for path in sorted((ROOT / "configs").glob("[a-z]*.py")) if path.stem != "common"}


def parse(
    argv: list[str],
    doc: str,
    options: Mapping[str, tuple[str | bool | list | None, str]],
    complete: Callable[[ConfigDict], ConfigDict] | None = None,
) -> dict[str, Any]:
    """Reads `--config` and the flags `options`: name -> (default, help); a flag is boolean if its default is, may be
    repeated if that is a list, and is a string otherwise.

    `complete` gets the config of the file with the command line's `family` and `video`, and returns it with the fields
    that these two bring; the other overrides may then set those, too.

    Returns {"config": plain nested dict or None, name: its value or None, …}. `--help` prints `doc`, the flags and the
    fields of the config, and exits. `--check_files` is told to `file_hashes`. Every mistake is a UserError.
    """
    file, argv = config_file(argv)
    argv = [arg if arg.startswith("--config.") else underscored(arg) for arg in argv]
    config = None if file is None else load_config(file)
    if config is not None and complete is not None:
        config = complete(with_kinds(config, argv).unlock()).lock()
    check_overrides(argv, file, config)
    values = flags.FlagValues()
    if config is not None:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["command", *argv])
    flags.DEFINE_boolean("help", False, "Shows this text.", flag_values=values, short_name="h")
    options = {**options, file_hashes.FLAG.lstrip("-"): (False, file_hashes.HELP)}
    for name, (default, text) in options.items():
        kinds = {bool: flags.DEFINE_boolean, list: flags.DEFINE_multi_string}
        define = kinds.get(type(default), flags.DEFINE_string)
        define(name, default, text, flag_values=values)
    try:
        rest = values(["command", *argv])[1:]
        plain = None if config is None else json.loads(values.config.to_json())
    except flags.Error as error:
        raise UserError(f"{in_one_line(error)} (see --help)") from None
    except Exception as error:  # a value that is none of JSON's
        raise UserError(f"--config={file}: {type(error).__name__}: {in_one_line(error)} (see --help)") from error
    if values.help:
        print(doc)
        for name, (default, text) in options.items():
            print(f"  --{name}: {text}" + (f" ({default})" if default else ""))
        print(f"  --config: a config file, or one of {', '.join(BUNDLED)}; --config.NAME=VALUE sets one of its fields")
        if config is not None:
            print(f"\nFields of the config:\n{values.config}")
        sys.exit(0)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value (see --help)")
    file_hashes.always = values.check_files
    return {"config": plain, **{name: values[name].value for name in options}}


def config_file(argv: list[str]) -> tuple[str | None, list[str]]:
    """What --config says, the last one, and the other arguments."""
    file, rest, waiting = None, [], iter(argv)
    for arg in waiting:
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-config"):
            rest.append(arg)
            continue
        file = value if equals else next(waiting, "")
        if not file:
            raise UserError(f"--config needs a file, or one of {', '.join(BUNDLED)}")
    return file, rest


def load_config(file: str) -> ConfigDict:
    """What `get_config` of a config file returns; what stands behind a colon is its argument.

    One of the project's own may be given from any folder, by its name (llava) or its path in the project
    (configs/llava.py). Raises UserError: a config file is code, so whatever it raises is about it.
    """
    name, colon, argument = file.partition(":")
    path, bundled = Path(name), BUNDLED.get(name.removeprefix("configs/").removesuffix(".py"))
    own = bundled is not None and not path.is_file() and name in (bundled.stem, f"configs/{bundled.name}")
    if not own and not path.is_file():
        near = did_you_mean(path.stem, BUNDLED)
        raise UserError(f"--config={file}: no such file; give one, or one of {', '.join(BUNDLED)}{near}")
    before = list(sys.path)
    if own:
        path = bundled
        sys.path.insert(0, str(ROOT))  # the current folder may have another `configs`
    try:
        loader = SourceFileLoader("config_file", str(path))
        spec = importlib.util.spec_from_loader("config_file", loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        config = module.get_config(*[argument] * bool(colon))
    except Exception as error:
        raise UserError(f"--config={file}: {type(error).__name__}: {in_one_line(error)}") from error
    finally:
        sys.path[:] = before
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={file}: get_config returns {type(config).__name__}, expected a ConfigDict")
    return config.lock()


def with_kinds(config: ConfigDict, argv: list[str]) -> ConfigDict:
    """The config with `--config.family` and `--config.video`, which decide what other fields it has."""
    for i, arg in enumerate(argv):
        found = re.fullmatch(r"--?config\.(family|video)(?:=(.*))?", arg, re.DOTALL)
        if found and isinstance(config.get(found[1]), str):
            value = found[2] if found[2] is not None else next(iter(argv[i + 1 :]), None)
            config[found[1]] = config[found[1]] if value is None else value
    return config


def check_overrides(argv: list[str], file: str | None, config: ConfigDict | None) -> None:
    """Raises UserError for a --config.NAME=VALUE, with or without its dashes, whose name is no field."""
    for arg in argv:
        if not (found := re.match(r"(?:--?(?:no)?)?config\.([^=]*)", arg)):
            continue
        if config is None:
            raise UserError(f"{arg}: sets a field of a config; give that, too, with --config=FILE")
        known = list(field_names(config))
        if found[1] not in known:
            raise UserError(f"{arg}: --config={file} has no field {found[1]!r}{did_you_mean(found[1], known)}")
        if not arg.startswith("-"):
            raise UserError(f"unexpected argument {arg!r}: write --{arg}")


def field_names(config: ConfigDict, path: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for name, value in config.items():
        yield f"{path}{name}"
        if isinstance(value, ConfigDict):
            yield from field_names(value, f"{path}{name}.")


def in_one_line(error: Exception) -> str:
    """What an exception says."""
    return " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())[:300]


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
