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

import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.artefacts import REPORT, SUMMARY, read_object, with_checksum
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path, write_text
from data_pipeline.questions.eval_sets import BENCHMARKS
from data_pipeline.questions.formats import Instruction
from data_pipeline.store import VideoStore, open_store
from redvillm_jax.evaluation.scoring import score, summarize
from redvillm_jax.evaluation.tables import summary_table
from redvillm_jax.inference.answer_log import AnswerLog, check_own, read_made
from redvillm_jax.inference.answering import (
    OPTIONS,
    failures,
    generation_of,
    known_answers,
    made_with,
    sizes_of,
    tell,
    write_answers,
)
from redvillm_jax.inference.assistant import Assistant
from redvillm_jax.inference.engine import Arrays, Generation
from redvillm_jax.inference.open_model import OpenedModel, open_model
from redvillm_jax.inference.prompts import Prompt
from redvillm_jax.model.settings import check_store, needed_parts
from redvillm_jax.runtime.cli import parse, positive
from redvillm_jax.runtime.distributed import command, is_first, locked
from redvillm_jax.runtime.shared_folder import require_shared

FLAGS = {
    "model": (None, "A run directory, a base folder (give its --config too), or an export."),
    "data": (None, "A store made by data_pipeline.prepare, or by redvillm_jax.encode."),
    "out": (None, "Folder for answers.jsonl and summary.json."),
    "benchmark": (None, "The set that questions without one are scored and judged as."),
    "language": (None, "Only the questions in this language, en or zh."),
    "text_only": (False, "Asks without the videos: what the words of the questions give away."),
    **OPTIONS,
}


def main(argv: list[str]) -> int:
    """Runs the command. Returns 1 when a question has no answer."""
    flags = parse(argv, __doc__, FLAGS)
    for name in ("model", "data", "out"):
        if not flags[name]:
            raise UserError(f"--{name} is needed: {FLAGS[name][1]}")
    generation, sizes, tensor = generation_of(flags), sizes_of(flags), positive(flags, "tensor")
    opened = open_model(flags["model"], flags["config"], flags["base"])
    store = open_store(flags["data"])
    check_store(store, opened.base, opened.config)
    instructions = questions(store, flags["benchmark"], flags["language"])
    require_shared("--out", as_path(flags["out"]))
    made = read_made(as_path(flags["out"]) / "summary.json", SUMMARY)
    check_own(as_path(flags["out"]) / "answers.jsonl", finished=made is not None)
    with locked(flags["out"]):
        return answer_store(opened, store, instructions, as_path(flags["out"]), flags, generation, sizes, tensor)


def answer_store(
    opened: OpenedModel,
    store: VideoStore,
    instructions: list[Instruction],
    out: Path,
    flags: Mapping[str, Any],
    generation: Generation,
    sizes: Mapping[str, int],
    tensor: int,
) -> int:
    """Answers the open questions and scores all answers. Returns the exit code."""
    assistant = Assistant(opened, dtype=flags["dtype"], tensor=tensor, parts=needed_parts(store))
    settings = made_with(assistant, instructions, generation) | {"data": store.meta["fingerprint"]}
    if flags["text_only"]:
        settings["text_only"] = True
    summary = finished(out, settings)
    known = known_answers(out / "answers.jsonl", instructions, summary) if summary else {}
    if summary and len(known) == len(instructions):
        print(f"{out} is finished already\n{summary_table(summary)}")
        return 0

    index = {video["video"]: i for i, video in enumerate(store.videos)}

    def read(videos: list[str]) -> Iterator[Arrays]:
        for video in videos:
            yield {name: array[0] for name, array in store.padded([index[video]]).items()}

    def make_prompt(instruction: Instruction, arrays: Arrays) -> Prompt:
        if flags["text_only"]:
            return assistant.text_prompt(instruction["question"])
        return assistant.video_prompt(instruction["question"], int(arrays["num_frames"]))

    log = AnswerLog(out / "answers.jsonl", settings, known)
    source = operator.itemgetter("video")
    write_answers(log, assistant, instructions, source, read, make_prompt, generation, sizes)
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
