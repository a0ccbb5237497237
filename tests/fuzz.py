"""Damaged files against the commands that read them: what may be done to a file, and what a command may make of it.

A case is a command, a file that it reads and a damage, COMMAND:FILE:DAMAGE. It fails if the command ends in anything
but success or a line of `data_pipeline.common.errors`, hangs, ends with 0 and another result than without the
damage, or changes or removes a file that is not its own.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from conversion.names import load_bin
from data_pipeline.common.errors import UserError, file_problem, full_disk
from redvillm_jax.training.checkpoint import load_trainables

LIMIT_SECONDS = 240  # for one command; a loaded machine is slow
STRAY = "mine.txt"  # a user's own file, in every folder


class Command(NamedTuple):
    """A command on a tree of files.

    main: called with `arguments`, in which {} is the tree. needs: the tree's parts, made anew for each case. reads:
    patterns of the files that are damaged. writes: patterns of what it makes and may replace; this is compared, and
    what it prints, if `prints`. users: patterns of files that a user writes: who changes them means another result.
    each: how many cases a file gets of each sort of damage that has a seed.
    """

    main: Callable[[list[str]], int | None]
    arguments: Sequence[str]
    needs: Sequence[str]
    reads: Sequence[str]
    writes: Sequence[str] = ()
    users: Sequence[str] = ()
    each: int = 4
    prints: bool = False


class Hang(BaseException):
    """A command that does not end."""


# ---- damages: what is done to a file, by name; a number at the end is a seed


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))] if content else b"")


def cut_end(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, chance: random.Random) -> None:
    """One bit; early bytes, where formats have their headers, as often as all others."""
    content = bytearray(path.read_bytes())
    if content:
        most = len(content) if chance.random() < 0.5 else min(len(content), 64)
        content[chance.randrange(most)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zeros(path: Path, chance: random.Random) -> None:
    """A block of zeros, as a machine leaves that loses its power."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content)) if content else 0
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def longer(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + path.read_bytes()[-100:])


def exchange(path: Path, chance: random.Random) -> None:
    """Another file of the same kind."""
    others = sorted(p for p in path.parent.iterdir() if p.suffix == path.suffix and p != path and p.is_file())
    path.write_bytes(chance.choice(others or [path]).read_bytes())


def folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / STRAY).write_text("mine\n")


def link(path: Path, chance: random.Random, target: str = "/nowhere/at/all") -> None:
    path.unlink()
    path.symlink_to(target)


def becomes(content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda path, chance: path.write_bytes(content) and None


def values(value: Any, where: tuple = ()) -> Iterator[tuple]:
    """The places of all values in a JSON value."""
    if where:
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from values(inner, (*where, key))


ODD = (None, True, -1, 0, 10**30, float("nan"), float("inf"), "", "x", "\ud800", [], {}, [[]], "a/../../b", 1.5, "²")


def field(path: Path, chance: random.Random) -> None:
    """One value of a JSON file, or of one line, is removed or becomes an odd one."""
    text = path.read_text("utf-8")
    rows = text.splitlines() if path.name.endswith(".jsonl") else [text]
    if not text.strip():
        return
    number = chance.randrange(len(rows))
    value = json.loads(rows[number])
    places = sorted(values(value), key=lambda where: (len(where), str(where)))
    if not places:
        return
    *outer, last = chance.choice(places[: max(12, len(places) // 2)] if chance.random() < 0.7 else places)
    inner = value
    for key in outer:
        inner = inner[key]
    if chance.random() < 0.25:
        del inner[last]
    else:
        inner[last] = chance.choice(ODD)
    rows[number] = json.dumps(value)
    path.write_text("".join(f"{row}\n" for row in rows))


ONCE: Mapping[str, Callable[[Path, random.Random], None]] = {
    "missing": lambda path, chance: path.unlink(),
    "empty": becomes(b""),
    "list": becomes(b"[]"),
    "null": becomes(b"null"),
    "object": becomes(b"{}"),
    "number": becomes(b"1e999"),
    "deep": becomes(b"[" * 200_000),
    "latin": becomes('{"video": "Überblick"}\n'.encode("latin-1")),
    "noise": becomes(random.Random(0).randbytes(3000)),
    "folder": folder,
    "dangling": link,
    "circle": lambda path, chance: link(path, chance, path.name),
    "unreadable": lambda path, chance: link(path, chance, "/proc/self/mem"),
    "cut_end": cut_end,
    "longer": longer,
}
SEEDED: Mapping[str, Callable[[Path, random.Random], None]] = {
    "cut": cut,
    "flip": flip,
    "zeros": zeros,
    "exchange": exchange,
}


def damages(file: str, each: int) -> list[str]:
    """The names of what is done to a file; a few where `each` is 0."""
    if not each:
        return ["missing", "empty", "noise", "folder", "dangling", "unreadable", "cut_end", "cut0", "flip0"]
    seeded = {"cut": each, "flip": 2 * each, "zeros": each // 2, "exchange": 1}
    if file.endswith((".json", ".jsonl")):
        seeded["field"] = 4 * each
    return [*ONCE, *(f"{name}{i}" for name, count in seeded.items() for i in range(count))]


def damage(path: Path, name: str, case: str) -> None:
    """Does to a file what `name` says, the same for a case each time."""
    chance = random.Random(zlib.crc32(case.encode()))
    do = {**ONCE, **SEEDED, "field": field}
    do[name if name in ONCE else name.rstrip("0123456789")](path, chance)


# ---- a case


def files(root: Path) -> dict[str, Path]:
    """All that lies below a folder and is no folder, by its name from there."""
    return {
        str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_symlink() or path.is_file()
    }


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def state(path: Path) -> Any:
    """What must stay as it is: where a link leads, or a file's content."""
    return os.readlink(path) if path.is_symlink() else path.read_bytes()


def states(root: Path) -> dict[str, Any]:
    return {name: state(path) for name, path in files(root).items()}


def normal(name: str, content: Any) -> Any:
    """A result without what differs from run to run: speed, what a translation costs, when a video was copied."""
    if not isinstance(content, bytes):
        return content
    if name.endswith("metrics.jsonl"):
        lines = [json.loads(line) for line in content.splitlines()]
        return [{key: line[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for line in lines]
    if name.endswith(".json"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(content)
            if "/parts/" in name:
                return re.sub('"(changed|checksum)": [^,}]*', "", json.dumps(value))
            return {key: value[key] for key in ("rows_written", "failures")} if "rows_written" in value else value
    return hashlib.sha256(content).hexdigest()


def results(root: Path, command: Command) -> dict[str, Any]:
    """What a command has made; of a run's checkpoints the newest weights, as their files have names by chance."""
    made = {name: p for name, p in files(root).items() if matches(name, command.writes)}
    shown = {n: normal(n, state(p)) for n, p in made.items() if "/checkpoints/" not in n and ".sqlite" not in n}
    for run in sorted({name.partition("/checkpoints/")[0] for name in made if "/checkpoints/" in name}):
        trained = load_trainables(root / run)[1]
        shown[f"{run}/checkpoints"] = [array.tobytes() for array in jax.tree.leaves(trained)]
    return shown


def call(command: Command, root: Path) -> tuple[Any, str]:
    """Runs a command; returns its exit code, or the exception that it ended with, and its standard output."""

    def hang(*_: Any) -> None:
        raise Hang

    said, noise = io.StringIO(), io.StringIO()
    load_bin.cache_clear()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(noise):
            end: Any = command.main([argument.replace("{}", str(root)) for argument in command.arguments]) or 0
    except SystemExit as error:
        end = error.code
    except Hang as error:
        end = error
    except Exception as error:
        end = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return end, said.getvalue()


def problem(end: Any) -> str:
    """Why a command must not end so; "" if it may."""
    if isinstance(end, Hang):
        return f"hangs (more than {LIMIT_SECONDS} s)"
    if isinstance(end, UserError):
        said = str(end)
        return f"an error of {said.count(chr(10)) + 1} lines: {said[:300]}" if "\n" in said.strip() else ""
    if not isinstance(end, BaseException) or full_disk(end) or file_problem(end):
        return ""
    frames = traceback.extract_tb(end.__traceback__)
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-12:]))
    return f"{type(end).__name__}: {' '.join(str(end).split())[:200]} at {where}"


def reset(pristine: Path, parts: Sequence[str], root: Path) -> None:
    """Makes a tree of copies of these parts, each file with its times."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for part in parts:
        shutil.copytree(pristine / part, root / part, symlinks=True, dirs_exist_ok=True)


def check(command: Command, case: str, pristine: Path, root: Path, expected: Mapping[str, Any], said: str) -> str:
    """Runs one case; returns what is wrong with it, "" if nothing is."""
    _, file, name = case.split(":")
    reset(pristine, command.needs, root)
    (path,) = root.glob(file) if "*" in file else [root / file]
    damage(path, name, case)
    before = states(root)
    end, printed = call(command, root)
    if found := problem(end):
        return found
    after = states(root)
    for known, content in before.items():
        own = matches(known, command.writes) and not known.endswith(STRAY)
        aside = re.sub(r"(checkpoints/\d+)/", r"\1.corrupt/", known)  # where a damaged checkpoint goes
        if after.get(aside) == content:
            continue
        if after.get(known) != content and not own:
            return f"{known} was {'changed' if known in after else 'removed'}"
    if end == 0 and not matches(file, command.users):
        made = results(root, command)
        differ = sorted(name for name in made.keys() | expected if made.get(name) != expected.get(name))
        if command.prints and printed != said:
            differ.append("what it prints")
        if differ:
            return f"exit code 0 and another result: {', '.join(differ[:4])}"
    return ""


def undamaged(command: Command, pristine: Path, root: Path) -> tuple[dict[str, Any], str]:
    """What the command makes and prints without damage."""
    reset(pristine, command.needs, root)
    end, said = call(command, root)
    assert not isinstance(end, BaseException) and end in (0, 1), (command.arguments, end, said, problem(end))
    return results(root, command), said


def cases(name: str, command: Command, pristine: Path) -> list[str]:
    """All cases of a command, in a fixed order."""
    parts = [part for part in command.needs if (pristine / part).is_dir()]
    found = [f"{part}/{file}" for part in parts for file in files(pristine / part)]
    chosen = [file for file in found if matches(file, command.reads) and not file.endswith(STRAY)]
    stable = [re.sub("[0-9a-f]{32}", "*", file) for file in chosen]  # names by chance in checkpoints
    return [f"{name}:{file}:{what}" for file in stable for what in damages(file, command.each)]
