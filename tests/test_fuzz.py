"""Every file that a command reads, damaged in many ways: one line or the right result, and nobody's file is lost.

A fixed sample runs in the ordinary suite, all cases with -m slow. One of them alone, by its name:

    FUZZ=prepare_again:frames/store.json:cut0 python -m pytest tests/test_fuzz.py -m slow -s

Then the same commands where nothing can be written: on a read-only disk, and under names that no disk takes.
"""

import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzz import call, cases, check, problem, reset, states, undamaged
from fuzz_tree import COMMANDS, Tree, need, open_tree

from data_pipeline.common.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Iterator[Tree]:
    """An empty tree; `need` makes its parts."""
    with open_tree(tmp_path_factory.mktemp("fuzz")) as tree:
        yield tree


def run_cases(tree: Tree, name: str, chosen: Callable[[str], bool]) -> tuple[int, list[str]]:
    """Runs some cases of a command; returns how many, and what was wrong with which."""
    command = tree.commands[name]
    for part in command.needs:
        need(tree, part)
    expected, said = undamaged(command, tree.pristine, tree.root)
    found, done = [], [case for case in cases(name, command, tree.pristine) if chosen(case)]
    for case in done:
        if problem := check(command, case, tree.pristine, tree.root, expected, said):
            found.append(f"{case}: {problem}")
            print(found[-1], flush=True)
    return len(done), found


SAMPLE = {  # one case of so many; the commands that compute are left to -m slow
    "from_torch": 24,
    "from_torch_shards": 16,
    "prepare": 16,
    "prepare_again": 20,
    "moving_shapes_again": 4,
    "to_torch_full": 16,
    "judge_rule": 8,
    "judge_compare": 8,
    "judge_again": 8,
    "translate_again": 8,
}


def test_a_fixed_sample(tree):
    """Each bad file gets one line; what ends well has the result of a good one; nobody's file is lost."""
    found = []
    for name, of in SAMPLE.items():
        found += run_cases(tree, name, lambda case, of=of: zlib.crc32(case.encode()) % of == 0)[1]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_all(tree, name):
    """All cases of a command, or the one that the environment variable FUZZ names."""
    only, start = os.environ.get("FUZZ", ""), time.monotonic()
    if only and only.partition(":")[0] != name:
        pytest.skip(f"FUZZ={only}")
    count, found = run_cases(tree, name, lambda case: only in ("", name, case))
    print(f"{name}: {count} cases, {len(found)} failed, {time.monotonic() - start:.0f} s")
    assert count and not found, "\n".join(found)


# ---- where nothing can be written

WRITERS = {  # commands that write, and the part of their arguments that is the output
    "from_torch": "{}/base",
    "moving_shapes_again": "{}/shapes",
    "prepare": "{}/frames",
    "show_video": "{}/show.png",
    "judge_rule": "{}/judged",
    "translate": "{}/zh/out.jsonl",
    "encode": "{}/streams",
    "train": "{}/run",
    "evaluate": "{}/answers",
    "answer_file": "{}/asked/out.jsonl",
    "to_torch": "{}/export",
}
NAMES = list(WRITERS)
SOME = pytest.mark.parametrize("names", [NAMES[:6], pytest.param(NAMES[6:], marks=pytest.mark.slow)])


def run_into(tree: Tree, name: str, output: str) -> Any:
    """Runs a command with another output; returns how it ended."""
    command = tree.commands[name]
    for part in command.needs:
        need(tree, part)
    reset(tree.pristine, command.needs, tree.root)
    arguments = [argument.replace(WRITERS[name], output) for argument in command.arguments]
    assert list(command.arguments) != arguments
    before = states(tree.root)
    end, _ = call(command._replace(arguments=arguments), tree.root)
    if isinstance(end, Exception):
        assert states(tree.root) == before, f"{name}: has changed what is there"
    return end


def refused(tree: Tree, names: Sequence[str], place: Callable[[str], str], says: str) -> list[str]:
    """The commands that do not end in a line that says so, and what they do instead."""
    ends = {name: run_into(tree, name, place(WRITERS[name])) for name in names}
    return [
        f"{name}: {problem(end) if isinstance(end, BaseException) else ''}{end!r}"
        for name, end in ends.items()
        if not isinstance(end, UserError | OSError) or problem(end) or says not in str(end)
    ]


@SOME
def test_a_read_only_disk(tree, tmp_path, names):
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs root, to mount a read-only disk")
    try:
        found = refused(tree, names, lambda output: f"{tmp_path}/{os.path.basename(output)}", "ead-only file system")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert not found, "\n".join(found)


def long_name(output: str, length: int) -> str:
    """An output with a name of that many characters."""
    suffix = Path(output).suffix
    return f"{os.path.dirname(output)}/{'x' * (length - len(suffix))}{suffix}"


@SOME
def test_names_that_no_disk_takes(tree, names):
    found = refused(tree, names, lambda output: long_name(output, 260), "ame too long")
    assert not found, "\n".join(found)


@SOME
def test_names_that_leave_no_room_for_a_temporary_one(tree, names):
    """A disk takes the name, but not with the suffix of the files that are written beside it."""
    for name in names:
        end = run_into(tree, name, long_name(WRITERS[name], 253))
        assert not problem(end), f"{name}: {problem(end)}"
