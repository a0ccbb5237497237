"""Readers of the published formats of questions. Each turns records into instructions of the project's schema.

A reader takes all records of a file and yields (where, instruction). `FORMATS` selects the reader of a file. A record
that is no question about a video is left out, and its reason is added to the list `left_out`; without that list the
record is a UserError.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.questions.records import Record, check_object, name, show, text, value, video_path

FIELDS = ("id", "video", "language", "question", "answer")
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}
EXPECTED = "expected a list of questions and answers by turns"
MARKERS = ("<video>", "<image>")
PICTURE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?")  # a picture in Qwen-VL's chat format

Instruction = dict[str, Any]  # the fields FIELDS, all text, and optional ones (docs/data.md)
Instructions = Iterator[tuple[str, Instruction]]  # (the beginning of messages about it, the instruction)


@contextlib.contextmanager
def leaving_out(reasons: list[str] | None) -> Iterator[None]:
    """Adds a UserError of the block to `reasons` and goes on behind the block. Without a list the error is raised."""
    try:
        yield
    except UserError as error:
        if reasons is None:
            raise
        reasons.append(str(error))


def read_own(records: Iterable[Record], left_out: list[str] | None = None) -> Instructions:
    """Reads the project's schema: FIELDS and optionally "kind", all text. Further fields are kept.

    A missing "language" is guessed from question and answer.
    """
    for record in records:
        with leaving_out(left_out):
            fields = dict(record.fields)
            for field in (*(field for field in FIELDS if field != "language"), *({"kind"} & fields.keys())):
                text(record, field)
            yield record.where, fields | {"language": _language(record, fields["question"] + fields["answer"])}


def read_video_instruct(records: Iterable[Record], left_out: list[str] | None = None) -> Instructions:
    """Reads VideoInstruct-100K as published: {"q", "a", "video_id"}. The id is the record's index."""
    for index, record in enumerate(records):
        with leaving_out(left_out):
            question, answer = text(record, "q"), text(record, "a")
            video = video_path(record, "video_id", text(record, "video_id"))
            language = _language(record, question + answer)
            instruction = {"id": str(index), "video": video, "language": language}
            yield record.where, {**instruction, "question": question, "answer": answer}


def read_conversations(records: Iterable[Record], left_out: list[str] | None = None) -> Instructions:
    """Reads the form of LLaVA and Qwen: {"id", "video", "conversations": [{"from": "human", "value"}, {"from": …}, …]}.

    Qwen's roles are "user" and "assistant", and its video may stand in the text as <img>path</img>. The paper trains
    single turns, so every turn becomes an instruction of its own, without the turns before it. Published ids repeat
    (Video-ChatGPT writes the video's id), so "/0", "/1", … is added to each id, counted through the file.
    """
    count: Counter[str] = Counter()
    for record in records:
        with leaving_out(left_out):
            for instruction in _conversation(record, count):
                yield record.where, instruction


def _conversation(record: Record, count: Counter[str]) -> list[Instruction]:
    """The instructions of a conversation. count: the number of instructions so far, by id."""
    source, turns = name(record, "id"), _turns(record)
    turns[0], picture = _without_media(record, turns[0])
    if "video" not in record.fields and picture is None:
        raise UserError(f"{record.where}: has no video: expected a field 'video', or <img>path</img> in the text")
    field, path = ("conversations", picture) if "video" not in record.fields else ("video", text(record, "video"))
    video = video_path(record, field, path)
    instructions = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if not question.strip():
            raise UserError(f"{record.where}: field 'conversations' has a question without text")
        instruction = {
            "id": f"{source}/{count[source]}",
            "video": video,
            "language": _language(record, question + answer),
        }
        instructions.append({**instruction, "question": question, "answer": answer})
        count[source] += 1
    return instructions


FORMATS = {"conversations": read_conversations, "q": read_video_instruct}  # by a field of this format alone


def guess_language(words: str) -> str:
    """ "zh" for a text with more Chinese characters than words in Latin letters, else "en"."""
    return "zh" if len(re.findall("[\u4e00-\u9fff]", words)) > len(re.findall("[A-Za-z]+", words)) else "en"


def _language(record: Record, words: str) -> str:
    return text(record, "language") if "language" in record.fields else guess_language(words)


def _turns(record: Record) -> list[str]:
    """The texts of a conversation: question, answer, question, …"""
    turns = value(record, "conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{record.where}: field 'conversations' is {show(turns)}, {EXPECTED}")
    words = []
    for number, turn in enumerate(turns, start=1):
        where = f"{record.where}: turn {number}"
        turn = Record(where, check_object(where, turn))
        expected = "question" if number % 2 else "answer"
        if ROLES.get(role := text(turn, "from")) != expected:
            roles = " or ".join(role for role, part in ROLES.items() if part == expected)
            raise UserError(f"{where}: field 'from' is {show(role)}, expected {roles}")
        words.append(text(turn, "value"))
    if len(turns) % 2:
        raise UserError(f"{record.where}: field 'conversations' is {show(turns)}, {EXPECTED}")
    return words


def _without_media(record: Record, question: str) -> tuple[str, str | None]:
    """A first question without the marker of its video, and the path in the marker, if any."""
    question, path = question.strip(), None
    if match := PICTURE.match(question):
        question, path = question[match.end() :], match[1]
        if PICTURE.match(question):
            raise UserError(f"{record.where}: shows several pictures, expected one video")
    for marker in MARKERS:
        question = question.removeprefix(marker).removesuffix(f"\n{marker}").strip()
    return question, path
