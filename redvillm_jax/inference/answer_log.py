"""Writes answers.jsonl: several processes append answers as they come, and a killed run continues."""

import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipeline.common.artefacts import ANSWERS_BEGUN, NUMBERED_ANSWER, Form, read_lines, read_object
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path, make_folder, write_text
from redvillm_jax.runtime.distributed import is_first, wait_for_all
from redvillm_jax.runtime.jsonl import LineFile, LineObject, as_text, open_lines

Answer = dict[str, Any]  # a line of answers.jsonl: an instruction with "prediction" and its settings


class AnswerLog:
    """The unfinished answers of a file. Each process appends its own answers to FILE.part0, FILE.part1, …

    done: answers by number of the question, from `known` and from all existing parts, of any number of processes.
    Raises UserError when a part was made with other settings than `made_with`.
    """

    def __init__(self, path: str | Path, made_with: Mapping[str, Any], known: Mapping[int, Answer]):
        self.path = as_path(path)
        make_folder(self.path.parent)
        self.done: dict[int, Answer] = dict(known)
        own = self.path.with_name(f"{self.path.name}.part{jax.process_index()}")
        kept = as_lines(known) if is_first() else []
        for part in parts_of(self.path):
            header, *lines = read_part(part) or [{"made_with": made_with}]
            check_same(part, header["made_with"], made_with)
            self.done |= {line["number"]: line["answer"] for line in lines}
            kept += lines if part == own else []
        wait_for_all("answers are read")  # nobody writes while others read
        self.file: LineFile | LineObject = open_lines(own, [{"made_with": made_with}, *kept])

    def write(self, answers: Mapping[int, Answer]) -> None:
        """Writes answers, given by number of the question, to this process's part."""
        self.file.write(*as_lines(answers))

    def finish(self, count: int) -> list[Answer]:
        """Writes all `count` answers to the file in the questions' order, and returns them. Every process must call it.

        `sha256` is then the file's hash. Call `forget` to remove the parts. Raises UserError when answers are missing
        because not every process has written into the same folder.
        """
        self.file.close()
        wait_for_all("answers are written")
        done = {line["number"]: line["answer"] for part in parts_of(self.path) for line in read_part(part)[1:]}
        if missing := set(range(count)) - done.keys():
            raise UserError(
                f"{self.path}: {len(missing)} of {count} answers are not in its folder: all processes must see the "
                "same one, such as a bucket (gs://)"
            )
        answers = [done[number] for number in range(count)]
        wait_for_all("answers are complete")
        text = as_text(answers)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        if is_first():
            write_text(self.path, text)
        return answers

    def forget(self) -> None:
        """Removes the parts. One process calls it when all have finished."""
        for part in parts_of(self.path):
            part.unlink()


BEGIN = '{"made_with"'  # the beginning of each part


def parts_of(path: Path) -> list[Path]:
    """The existing parts of a file."""
    found = path.parent.glob(f"{glob.escape(path.name)}.part*")
    return sorted(part for part in found if part.name.removeprefix(f"{path.name}.part").isdecimal())


def check_own(path: Path, finished: bool) -> None:
    """Raises UserError for a file that is neither `finished` nor begun by a run of this command."""
    if path.exists() and not finished and not any(map(read_part, parts_of(path))):
        raise UserError(f"{path}: was not written by this command; choose another name, or move it away")


def read_made(path: Path, form: Form) -> dict[str, Any] | None:
    """This command's report at `path`, None without a file. Raises UserError for a file that is something else."""
    return read_object(path, form) if path.exists() else None


def read_part(part: Path) -> list[dict[str, Any]]:
    """The lines of a part: first {"made_with"}, the settings of its answers, then the answers."""
    lines = read_lines(part, NUMBERED_ANSWER, first=ANSWERS_BEGUN, growing=True)
    if not lines and not part.read_text(errors="replace").startswith(BEGIN[: part.stat().st_size]):
        raise UserError(f"{part}: is no part of {part.stem}: move it away, or choose another output")
    return lines


def as_lines(answers: Mapping[int, Answer]) -> list[dict[str, Any]]:
    """The lines of a part."""
    return [{"number": number, "answer": answer} for number, answer in answers.items()]


def check_same(part: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError naming the settings that differ."""
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise UserError(
            f"{part}: holds answers that were begun with {name}={before.get(name)!r}, this command says "
            f"{now.get(name)!r}: go on with the same settings, choose another file, or delete this one"
        )
