"""Answers the questions of a store, and scores the answers that need no judge.

python -m redvillm_jax.evaluate --model=RUN --data=TEST --out=DIR
python -m redvillm_jax.evaluate --model=BASE --config=configs/llava.py --data=TEST --out=DIR    (untrained)

--data is a frame store of data_pipeline.prepare (made with --benchmark=NAME for a published set) or a stream store of
redvillm_jax.encode. The command writes DIR/answers.jsonl, with a line for each question in the store's order, which
redvillm_jax.judge can judge later, and DIR/summary.json with multiple choice, yes/no, exact match and token F1, with
95 % intervals. A stopped run continues. Several processes share the videos and write into the same DIR. A question that
cannot be answered gets "prediction": null and an "error", and is left out of all means; the exit code is then 1, and
the same command tries it again.
"""

import argparse
import json
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.common.artefacts import REPORT, SUMMARY, read_object, with_checksum
from data_pipeline.common.cli import Parser, path
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import write_text
from data_pipeline.questions.eval_sets import BENCHMARKS
from data_pipeline.questions.formats import Instruction
from data_pipeline.store import VideoStore, open_store
from redvillm_jax.evaluation.scoring import score, summarize
from redvillm_jax.evaluation.tables import summary_table
from redvillm_jax.inference.answer_log import AnswerLog, check_own, read_made
from redvillm_jax.inference.answering import (
    add_answering,
    failures,
    generation_of,
    known_answers,
    made_with,
    tell,
    write_answers,
)
from redvillm_jax.inference.assistant import Assistant
from redvillm_jax.inference.engine import Arrays, Generation
from redvillm_jax.inference.open_model import OpenedModel, open_model
from redvillm_jax.inference.prompts import Prompt
from redvillm_jax.model.settings import check_store, complete, needed_parts
from redvillm_jax.runtime.cli import parse
from redvillm_jax.runtime.distributed import command, is_first, locked
from redvillm_jax.runtime.shared_folder import require_shared


def main(argv: list[str]) -> int:
    """Runs the command. Returns 1 when a question has no answer."""
    flags = parse(make_parser(), argv, complete)
    generation = generation_of(flags)
    opened = open_model(flags.model, flags.config, flags.base)
    store = open_store(flags.data)
    check_store(store, opened.base, opened.settings)
    instructions = questions(store, flags.benchmark, flags.language)
    require_shared("--out", flags.out)
    made = read_made(flags.out / "summary.json", SUMMARY)
    check_own(flags.out / "answers.jsonl", finished=made is not None)
    with locked(flags.out):
        return answer_store(opened, store, instructions, flags, generation)


def make_parser() -> Parser:
    """The command's own flags."""
    parser = Parser("python -m redvillm_jax.evaluate", __doc__, needed=("model", "data", "out"))
    parser.add_argument("--model", metavar="DIR", help="run directory, base folder (give its --config, too), or export")
    parser.add_argument(
        "--data", type=path, metavar="DIR", help="store of data_pipeline.prepare, or of redvillm_jax.encode"
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="folder for answers.jsonl and summary.json")
    parser.add_argument("--benchmark", metavar="NAME", help="evaluation set of the questions that do not name one")
    parser.add_argument("--language", metavar="en|zh", help="only the questions in this language")
    parser.add_argument(
        "--text_only", action="store_true", help="ask without the videos: what the words of the questions give away"
    )
    add_answering(parser)
    return parser


def answer_store(
    opened: OpenedModel,
    store: VideoStore,
    instructions: list[Instruction],
    flags: argparse.Namespace,
    generation: Generation,
) -> int:
    """Answers the open questions and scores all answers. Returns the exit code."""
    out = flags.out
    assistant = Assistant(opened, dtype=flags.dtype, tensor=flags.tensor, parts=needed_parts(store))
    settings = made_with(assistant, instructions, generation) | {"data": store.meta["fingerprint"]}
    if flags.text_only:
        settings["text_only"] = True
    summary = finished(out, settings)
    known = known_answers(out / "answers.jsonl", instructions, summary) if summary else {}
    if summary and len(known) == len(instructions):
        print(f"{out} is finished already\n{summary_table(summary)}")
        return 0

    index = {video["video"]: i for i, video in enumerate(store.videos)}

    def read(videos: list[str]) -> Iterator[Arrays]:
        for video in videos:
            times = {"seconds": store.seconds(index[video])} if assistant.places.has_text else {}
            yield {name: array[0] for name, array in store.padded([index[video]]).items()} | times

    def make_prompt(instruction: Instruction, arrays: Arrays) -> Prompt:
        if flags.text_only:
            return assistant.text_prompt(instruction["question"])
        return assistant.video_prompt(instruction["question"], arrays)

    log = AnswerLog(out / "answers.jsonl", settings, known)
    sizes = {"batch_size": flags.batch_size, "video_batch_size": flags.video_batch_size}
    write_answers(log, assistant, instructions, operator.itemgetter("video"), read, make_prompt, generation, **sizes)
    answers = log.finish(len(instructions))
    failed = failures(answers)
    if is_first():
        summary = {"benchmarks": summarize(score(answers)), "left_out": left_out(store), "made_with": settings}
        summary = with_checksum(summary | {"answers_sha256": log.sha256})
        write_text(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
        log.forget()
        print(summary_table(summary))
        if summary["left_out"]:
            print(f"left out: {summary['left_out']} questions without a usable video, see {store.path}/report.json")
        tell(failed, out / "answers.jsonl")
    return 1 if failed else 0


def questions(store: VideoStore, benchmark: str | None, language: str | None) -> list[Instruction]:
    """The store's instructions, in one language or all. Raises UserError for a flag that fits none of them."""
    if benchmark is not None and benchmark not in BENCHMARKS:
        raise UserError(f"--benchmark={benchmark}: expected one of {', '.join(BENCHMARKS)}")
    chosen = [instruction for instruction in store.instructions if language in (None, instruction["language"])]
    if not chosen:
        found = ", ".join(sorted({instruction["language"] for instruction in store.instructions}))
        raise UserError(f"--language={language}: {store.path} has questions in {found}")
    return [({"benchmark": benchmark} if benchmark else {}) | instruction for instruction in chosen]


def left_out(store: VideoStore) -> int:
    """The number of questions that are not in the store because their videos could not be used."""
    report = store.path / "report.json"
    found = read_object(report, REPORT) if report.is_file() else {}
    return found.get("questions_found", 0) - found.get("questions_used", 0)


def finished(out: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary in `out` when it came from the same model, data and settings, else None."""
    summary = read_made(out / "summary.json", SUMMARY)
    same = summary is not None and summary["made_with"] == settings
    return summary if same and (out / "answers.jsonl").is_file() else None


if __name__ == "__main__":
    command(main)
