"""Command lines with a config: --config=FILE[:ARGUMENT], and --config.NAME=VALUE for each of its fields."""

import argparse
import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipeline.common.cli import Parser, add_check_files
from data_pipeline.common.errors import UserError, did_you_mean

ROOT = Path(__file__).parents[2]
BUNDLED = {path.stem: path for path in sorted((ROOT / "configs").glob("[a-z]*.py")) if path.stem != "common"}
KINDS = ("family", "video")  # these fields decide which other fields a config has
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}

Complete = Callable[[ConfigDict], ConfigDict]
Override = tuple[str, str, str | None]  # the argument, the field, its text; None: a switch without a value


def parse(parser: Parser, argv: Sequence[str], complete: Complete | None = None) -> argparse.Namespace:
    """Parses the command line of a command with a config: its flags, and `config`, a plain nested dict or None.

    complete(config): adds the fields of the config's `family` and `video`; overrides of these two are applied before
    it, all others after it. The last --config counts, and overrides may stand before it. `--help` shows the fields of
    the given config. Raises UserError for every mistake.
    """
    add_check_files(parser)
    text = "--config.NAME=VALUE sets one of its fields; with --config=FILE, --help shows them all."
    group = parser.add_argument_group("config", text)
    bundled = f"a file with get_config(), or one of {', '.join(BUNDLED)}"
    group.add_argument("--config", metavar="FILE[:ARG]", help=bundled)
    file, overrides, rest = split(argv)
    config = None if file is None else read_config(file, overrides, complete)
    if file is None and overrides:
        raise UserError(f"{overrides[0][0]}: sets a field of a config; give that, too, with --config=FILE")
    if config is not None:
        parser.epilog = "\n".join(["fields of the config:", *(f"  {line}" for line in shown(config))])
        parser.set_defaults(config=config)
    return parser.parse_args(rest)


def split(argv: Sequence[str]) -> tuple[str | None, list[Override], list[str]]:
    """Returns the value of the last --config, the overrides in their order, and the other arguments."""
    file, overrides, rest = None, [], []
    waiting = list(argv)
    while waiting:
        arg = waiting.pop(0)
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            file = value if equals else waiting.pop(0) if waiting else ""
            if not file:
                raise UserError(f"--config needs a file, or one of {', '.join(BUNDLED)}")
        elif found := OVERRIDE.fullmatch(arg):
            text = "false" if found[1] else found[3]
            overrides.append((arg, found[2], text))
            if text is None and waiting and not waiting[0].startswith(("--", "config.")):
                overrides[-1] = (arg, found[2], waiting.pop(0))
        elif arg.startswith("config."):
            overrides.append((arg, name.removeprefix("config."), None))
        else:
            rest.append(arg)
    return file, overrides, rest


def read_config(file: str, overrides: Sequence[Override] = (), complete: Complete | None = None) -> dict[str, Any]:
    """Reads the config of a file with overrides, as a plain nested dict; see `parse`."""
    config = load_config(file)
    if complete is not None:
        for _, name, text in overrides:
            if name in KINDS and isinstance(config.get(name), str) and text is not None:
                config[name] = text
        config = complete(config.unlock()).lock()
    for written, name, text in overrides:
        override(config, file, written, name, text)
    try:
        return json.loads(config.to_json())
    except Exception as error:  # a value that JSON does not have
        raise UserError(f"--config={file}: {type(error).__name__}: {in_one_line(error)} (see --help)") from error


def load_config(file: str) -> ConfigDict:
    """Calls `get_config` of a config file, with the text after a colon as its argument.

    The project's own files may be given from any folder, by name (llava) or path in the project (configs/llava.py).
    Raises UserError, also for any exception of the file, because a config file is code.
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


def override(config: ConfigDict, file: str, written: str, name: str, text: str | None) -> None:
    """Sets a field, by its dotted name, from a text in the field's type. Raises UserError."""
    known = list(field_names(config))
    if name not in known:
        raise UserError(f"{written}: --config={file} has no field {name!r}{did_you_mean(name, known)}")
    if not written.startswith("-"):
        raise UserError(f"unexpected argument {written!r}: write --{written}")
    *parents, leaf = name.split(".")
    within = config
    for parent in parents:
        within = within[parent]
    kind = within.get_type(leaf)
    if text is None and kind is not bool:
        raise UserError(f"{written}: has no value: write {written}=VALUE")
    if written.lstrip("-").startswith("noconfig.") and kind is not bool:
        raise UserError(f"{written}: {name} is no switch: write --config.{name}=VALUE")
    try:
        value = value_of("true" if text is None else text, kind)
        if kind is ConfigDict:
            within[leaf].update(value)
        else:
            within[leaf] = value  # ConfigDict checks the type
    except (ValueError, TypeError, SyntaxError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"{written}: {in_one_line(error)} (see --help)") from None


def value_of(text: str, kind: type) -> Any:
    """Converts a text to a field's type. Raises ValueError or SyntaxError."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"expected true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    value = ast.literal_eval(text)
    if kind is ConfigDict and not isinstance(value, dict):
        raise ValueError(f"Failed to parse {text!r} as a ConfigDict: set its fields one by one")
    return value


def field_names(config: ConfigDict, path: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields."""
    for name, value in config.items():
        yield f"{path}{name}"
        if isinstance(value, ConfigDict):
            yield from field_names(value, f"{path}{name}.")


def shown(config: dict[str, Any], path: str = "--config.") -> Iterator[str]:
    """Yields all fields in the form of command line arguments."""
    for name, value in sorted(config.items()):
        if isinstance(value, dict):
            yield from shown(value, f"{path}{name}.")
        else:
            yield f"{path}{name}={value}"


def in_one_line(error: Exception) -> str:
    """Returns the message of an exception in one line."""
    return " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())[:300]
