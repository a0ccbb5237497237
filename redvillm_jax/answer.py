"""Answers questions about videos and pictures.

python -m redvillm_jax.answer --model=RUN --video=clip.mp4 --question="What happens?" --question="Who is there?"
python -m redvillm_jax.answer --model=BASE --config=configs/qwen.py --picture=photo.jpg --question="…"
python -m redvillm_jax.answer --model=EXPORT --input=questions.jsonl --output=answers.jsonl

--model is a run directory, a base folder with a --config (the untrained video LLM; for pictures, the image LLM itself),
or an export of conversion.to_torch. Use --video or --picture with one or several --question to ask on the terminal,
where the words appear as they are written; the video is read once.

Use --input and --output for files. --input has a question a line: {"question": …, "video" or "picture": path from the
file's folder}, with "start" and "end" in seconds for a part of a video, and any other fields. --output has the same
lines in the same order, with "prediction" and the settings that led to it. A stopped run continues. Several processes
share the videos. A question gets "prediction": null and an "error" when its video cannot be read or the model's logits
are NaN or infinite; OUTPUT.report.json lists these questions, the exit code is then 1, and the same command tries them
again.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from data_pipeline.common.artefacts import ANSWER_REPORT, with_checksum
from data_pipeline.common.cli import Parser, local_path, path, whole
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import write_text
from data_pipeline.common.processes import ordered_map
from data_pipeline.media.reading import Clip, Picture, lost_media, try_media
from data_pipeline.media.sampling import checked_part
from data_pipeline.questions.formats import Instruction
from data_pipeline.questions.records import Record, read_records, show, text
from redvillm_jax.inference.answer_log import AnswerLog, check_own, read_made
from redvillm_jax.inference.answering import (
    WRITTEN,
    add_answering,
    failures,
    generation_of,
    known_answers,
    made_with,
    tell,
    write_answers,
)
from redvillm_jax.inference.assistant import Assistant, load
from redvillm_jax.inference.engine import Arrays, Generation
from redvillm_jax.inference.prompts import Prompt
from redvillm_jax.model.settings import complete
from redvillm_jax.runtime.cli import parse
from redvillm_jax.runtime.distributed import command, is_first, locked
from redvillm_jax.runtime.shared_folder import require_shared


def main(argv: list[str]) -> int:
    """Runs the command. Returns 1 when a question of --input has no answer."""
    flags = parse(make_parser(), argv, complete)
    generation = generation_of(flags)
    sources = [name for name in ("video", "picture", "input") if getattr(flags, name)]
    if len(sources) != 1:
        raise UserError("give one of --video, --picture and --input")
    if (sources == ["input"]) != bool(flags.output) or (sources == ["input"]) == bool(flags.question):
        raise UserError("--video and --picture go with --question, --input with --output")
    instructions = read_questions(flags.input, flags.output) if flags.input else []
    if not instructions and jax.process_count() > 1:
        raise UserError("one video is asked in one process; several processes share the questions of --input")
    opening = {"base": flags.base, "config": flags.config, "dtype": flags.dtype, "tensor": flags.tensor}
    if instructions:
        require_shared("--output", flags.output.parent)
        with locked(flags.output, beside=True):
            return answer_file(load(flags.model, **opening), instructions, flags, generation)
    assistant = load(flags.model, **opening)
    media = Clip(flags.video) if flags.video else Picture(flags.picture)
    for question in flags.question:
        show_answer(assistant, media, question, generation)
    return 0


def make_parser() -> Parser:
    """The command's own flags."""
    arguments = "(--video=FILE | --picture=FILE | --input=FILE)"
    parser = Parser("python -m redvillm_jax.answer", __doc__, needed=("model",), arguments=arguments)
    parser.add_argument("--model", metavar="DIR", help="run directory, base folder (give its --config, too), or export")
    parser.add_argument("--video", metavar="FILE", help="a video")
    parser.add_argument("--picture", metavar="FILE", help="a picture")
    parser.add_argument("--question", action="append", metavar="TEXT", help="a question about it; may be repeated")
    parser.add_argument("--input", type=local_path, metavar="FILE", help="questions, a JSON object a line")
    parser.add_argument("--output", type=path, metavar="FILE", help="answers to --input, a JSON object a line")
    add_answering(parser)
    group = parser.add_argument_group("reading of --input")
    group.add_argument(
        "--num_workers", type=whole(), default=4, metavar="N", help="processes that read videos (%(default)s)"
    )
    group.add_argument(
        "--time_limit",
        type=whole(),
        default=120,
        metavar="SECONDS",
        help="after which a process that reads a video is ended (%(default)s)",
    )
    return parser


def show_answer(assistant: Assistant, media: Clip | Picture, question: str, generation: Generation) -> None:
    """Prints a question, and its answer word by word."""
    start = time.time()
    words = assistant.stream(media, question, **dataclasses.asdict(generation))
    print(f"> {question}", flush=True)
    for word in words:
        print(word, end="", flush=True)
    print(flush=True)
    if sys.stderr.isatty():
        print(f"({time.time() - start:.1f} s)", file=sys.stderr)


def read_questions(path: Path, output: Path) -> list[Instruction]:
    """The lines of --input; paths are from the file's folder. Raises UserError naming file and line."""
    if os.path.realpath(output) == os.path.realpath(path):
        raise UserError(f"--output={output}: is the --input")
    if output.is_dir():
        raise UserError(f"--output={output}: is a folder, expected the name of a file")
    check_own(output, finished=read_made(report_of(output), ANSWER_REPORT) is not None)
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no questions")
    return [check_question(record) for record in records]


def report_of(output: Path) -> Path:
    """The report that stands beside --output."""
    return output.with_name(f"{output.name}.report.json")


def check_question(record: Record) -> Instruction:
    """A line of --input without the fields that an earlier run has added to it. Raises UserError."""
    text(record, "question")
    named = [name for name in ("video", "picture") if name in record.fields]
    if len(named) != 1:
        raise UserError(f"{record.where}: expected either a field 'video' or a field 'picture', a path")
    text(record, named[0])
    part = [record.fields.get(name) for name in ("start", "end")]
    if part != [None, None]:
        try:
            checked_part(part if named == ["video"] else None)
        except ValueError:
            said = f"{record.where}: is about {show(part[0])} to {show(part[1])} seconds, expected a part"
            raise UserError(said) from None
    try:
        json.dumps(record.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{record.where}: has half a character (an escape \\ud800 to \\udfff alone): mend it") from None
    return {name: field for name, field in record.fields.items() if name not in WRITTEN}


def answer_file(
    assistant: Assistant,
    instructions: list[Instruction],
    flags: argparse.Namespace,
    generation: Generation,
) -> int:
    """Answers --input into --output and writes the report. A finished output is left alone, except failed questions."""
    folder, output = flags.input.parent, flags.output
    report_file = report_of(output)
    settings = made_with(assistant, instructions, generation)
    report = read_made(report_file, ANSWER_REPORT)
    known = known_answers(output, instructions, report) if report and report["made_with"] == settings else {}
    if len(known) == len(instructions):
        print(f"{output} is finished already")
        return 0

    def source(instruction: Instruction) -> Clip | Picture:
        if "picture" in instruction:
            return Picture(str(folder / instruction["picture"]))
        part = (instruction["start"], instruction["end"]) if instruction.get("start") is not None else None
        return Clip(str(folder / instruction["video"]), part)

    def read(media: list[Clip | Picture]) -> Iterator[Arrays | UserError]:
        work = functools.partial(try_media, assistant.reading)
        return ordered_map(work, media, flags.num_workers, time_limit=flags.time_limit, failed=lost_media)

    def make_prompt(instruction: Instruction, arrays: Arrays) -> Prompt:
        if "picture" in instruction:
            return assistant.picture_prompt(instruction["question"], arrays)
        return assistant.video_prompt(instruction["question"], arrays)

    log = AnswerLog(output, settings, known)
    sizes = {"batch_size": flags.batch_size, "video_batch_size": flags.video_batch_size}
    write_answers(log, assistant, instructions, source, read, make_prompt, generation, **sizes)
    answers = log.finish(len(instructions))
    failed = failures(answers)
    if is_first():
        report = {"made_with": settings, "answered": len(instructions) - len(failed), "failed": failed}
        report = with_checksum(report | {"answers_sha256": log.sha256})
        write_text(report_file, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        log.forget()
        print(f"{output}: {report['answered']} of {len(instructions)} questions answered")
        tell(failed, report_file)
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
