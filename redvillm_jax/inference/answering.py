"""From instructions to the lines of answers.jsonl, for the commands `answer` and `evaluate`.

An instruction is a store's, or a line of `answer --input`; an answer is the instruction with the fields `WRITTEN`.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from data_pipeline.common.artefacts import ANSWER, parse_lines, read_bytes
from data_pipeline.common.cli import Parser, number, whole
from data_pipeline.common.errors import UserError
from data_pipeline.questions.formats import Instruction
from redvillm_jax.inference.answer_log import Answer, AnswerLog
from redvillm_jax.inference.assistant import Assistant
from redvillm_jax.inference.engine import Arrays, Asked, Generation
from redvillm_jax.inference.prompts import Prompt, check_length, prompt_text

T = TypeVar("T")
GENERATION = {  # --help of each setting
    "max_new_tokens": "longest answer in tokens",
    "temperature": "0: take the most likely token; above 0: draw at random",
    "top_k": "draw among the k most likely tokens; 0: among all",
    "top_p": "draw among the most likely tokens that together have this probability",
    "repetition_penalty": "above 1: tokens that came before become less likely",
    "seed": "seed of the draws; a question's number goes into it, too",
}

WRITTEN = ("prediction", "error", "finish", "prompt", "num_frames", "generation", "model")  # fields of answers


def add_answering(parser: Parser) -> None:
    """Adds the flags that both commands have: which base, how answers are drawn, and how much at once."""
    parser.add_argument(
        "--base", metavar="DIR", help="base folder, for an export of projectors alone, or if that of a run has moved"
    )
    group = parser.add_argument_group("generation")
    for field in dataclasses.fields(Generation):
        text = f"{GENERATION[field.name]} (%(default)s)"
        group.add_argument(f"--{field.name}", type=number(field.type), default=field.default, metavar="N", help=text)
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--dtype", metavar="TYPE", help="of weights and activations: bfloat16, float16 or float32 (the run's)"
    )
    group.add_argument(
        "--tensor",
        type=whole(),
        default=1,
        metavar="N",
        help="devices that share one copy of the model; the others hold further copies (%(default)s)",
    )
    group.add_argument("--batch_size", type=whole(), default=32, metavar="N", help="questions at once (%(default)s)")
    group.add_argument(
        "--video_batch_size", type=whole(), default=8, metavar="N", help="videos encoded at once (%(default)s)"
    )


def generation_of(flags: argparse.Namespace) -> Generation:
    """The generation settings of the command line. Raises UserError naming the flag."""
    try:
        return Generation(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Generation)})
    except UserError as error:
        raise UserError(f"--{error}") from None


def made_with(assistant: Assistant, instructions: Sequence[Instruction], generation: Generation) -> dict[str, Any]:
    """Everything on which the answers depend."""
    questions = hashlib.sha256(json.dumps(instructions, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    settings = dataclasses.asdict(generation) | {"dtype": assistant.dtype}
    return {"model": assistant.identity, "generation": settings, "questions": questions}


def known_answers(path: Path, instructions: Sequence[Instruction], report: Mapping[str, Any]) -> dict[int, Answer]:
    """The answers of a finished file, by number of the question, without failed ones and those to other instructions.

    {} when the file is not the one with which `report` was written.
    """
    content = read_bytes(path, ANSWER)
    if report.get("answers_sha256") not in (None, hashlib.sha256(content).hexdigest()):
        print(f"note: {path}: was changed after it was written; all questions are answered again", file=sys.stderr)
        return {}
    pairs = enumerate(zip(parse_lines(path, content, ANSWER), instructions, strict=False))
    same = {i: answer for i, (answer, instruction) in pairs if answer | instruction == answer}
    return {i: answer for i, answer in same.items() if answer.get("prediction") is not None}


def failures(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The numbers of the questions without an answer, counted from 1, with their errors."""
    return [
        {"question": i, "error": answer["error"]} for i, answer in enumerate(answers, 1) if answer["prediction"] is None
    ]


def tell(failed: Sequence[Mapping[str, Any]], where: Path) -> None:
    """Prints the first failed questions. where: the file that lists all of them."""
    for failure in failed[:5]:
        print(f"  question {failure['question']}: {failure['error']}")
    if failed:
        print(f"  all {len(failed)} failed questions are in {where}; the same command tries them again")


def write_answers(
    log: AnswerLog,
    assistant: Assistant,
    instructions: Sequence[Instruction],
    source: Callable[[Instruction], Hashable],
    read: Callable[[list[Any]], Iterator[Arrays | UserError]],
    make_prompt: Callable[[Instruction, Arrays], Prompt],
    generation: Generation,
    *,
    batch_size: int,
    video_batch_size: int,
) -> None:
    """Answers the instructions that are not in the log, for this process's share of the videos.

    source(instruction): its video. read(videos): the arrays of each video in order, or the error why there are none. A
    question without an answer gets "prediction" null and an "error".
    """
    open_questions = [i for i in range(len(instructions)) if i not in log.done]
    by_video: dict[Hashable, list[int]] = {}
    for i in open_questions:
        by_video.setdefault(source(instructions[i]), []).append(i)
    kinds = sorted(by_video, key=lambda video: type(video).__name__)  # videos and pictures have other shapes
    mine = kinds[jax.process_index() :: jax.process_count()]
    mine.sort(key=lambda video: (type(video).__name__, assistant.shape_of(video)))
    settings = dataclasses.asdict(generation) | {"dtype": assistant.dtype}

    def failed(instruction: Instruction, error: str) -> Answer:
        return instruction | {"prediction": None, "error": error, "model": assistant.identity}

    def asked() -> Iterator[Asked]:
        for video, arrays in zip(mine, ahead(read(mine), video_batch_size), strict=True):
            for i in by_video[video]:
                try:
                    if isinstance(arrays, UserError):
                        raise arrays
                    prompt = make_prompt(instructions[i], arrays)
                    check_length(prompt, generation.max_new_tokens, assistant.base)
                except UserError as error:
                    log.write({i: failed(instructions[i], str(error))})
                    progress.update()
                else:
                    yield Asked(prompt, video, arrays, i)

    with tqdm(
        total=len(instructions),
        initial=len(instructions) - len(open_questions),
        unit="question",
        disable=None,
        dynamic_ncols=True,
    ) as progress:
        sizes = {"batch_size": batch_size, "video_batch_size": video_batch_size}
        for batch in assistant.inference.answers(asked(), generation, **sizes):
            answers = {}
            for one, answer in batch:
                if not answer.finite:
                    answers[one.number] = failed(instructions[one.number], assistant.not_finite)
                    continue
                answers[one.number] = instructions[one.number] | {
                    "prediction": assistant.text(answer.ids),
                    "finish": "stop" if answer.stopped else "length",
                    "prompt": prompt_text(assistant.tokenizer, one.prompt),
                    **frames_seen(one),
                    "generation": settings,
                    "model": assistant.identity,
                }
            log.write(answers)
            progress.update(len(answers))


def frames_seen(one: Asked) -> dict[str, int]:
    """{"num_frames": …} for a question that is asked with a video, else {}."""
    return {"num_frames": int(one.arrays["num_frames"])} if one.prompt.num_visual and "num_frames" in one.arrays else {}


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yields the same items, read by a thread that runs `count` ahead. Stopping early waits for one item at most."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        try:
            coming = collections.deque(thread.submit(next, iterator, end) for _ in range(count))
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, iterator, end))
                yield item
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
