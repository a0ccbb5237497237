"""Readers of evaluation sets: their published files become instructions of the project's schema.

Such an instruction has "id", "video", "language" ("en"), "question" and "answer" as usual, the set's name as
"benchmark", and the optional fields

    "kind"          the set's category for results; levels are separated by "/", e.g. "short/Counting Problem"
    "choices"       multiple choice: the options as the question shows them, each beginning with its label
    "group"         instructions that are judged together: VCGBench's consistency pairs, VNBench's four tries
    "start", "end"  seconds of the video that the question is about

"question" is the whole question, with its choices and the sentence that asks for a label; "answer" is then the label.
A reader whose docstring names no source is written from memory of the published files, without a comparison.
"""

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.media.sampling import checked_part
from data_pipeline.questions.formats import Instruction, Instructions
from data_pipeline.questions.instructions import check_instructions
from data_pipeline.questions.records import (
    Record,
    check_object,
    name,
    read_json,
    read_records,
    read_text,
    show,
    text,
    texts,
    value,
    video_name,
)

ASK_LETTER = "Answer with the option's letter from the given choices directly."  # Video-MME and VNBench ask so
ACTIVITYNET_KINDS = (
    *("motion", "spatial relationship", "temporal relationship"),
    *("yes/no", "color", "object", "location", "number", "other"),
)
TGIF_KINDS = ("object", "number", "color", "location")
TEMPCOMPASS_ASKS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",  # the question ends in "Generated Caption:"
}


class EvalSet(NamedTuple):
    """A reader of one file of a set, and the names or patterns of the set's published files."""

    read: Callable[[Path], Instructions]
    files: tuple[str, ...]


def read_benchmark(benchmark: str, path: str | Path) -> list[Instruction]:
    """Reads an evaluation set of `BENCHMARKS` from one of its published files, or from the folder with all of them.

    Answers are matched by id. Raises UserError naming file, row and field.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"unknown benchmark {benchmark!r}, expected one of {', '.join(BENCHMARKS)}")
    read, names = BENCHMARKS[benchmark]
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [file for name in names for file in sorted(path.glob(name)) or [path / name]]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{path}: has no {', '.join(missing)}; give one file, or the folder with all of them")
    found = (pair for file in files for pair in read(file))
    return check_instructions(path, ((where, instruction | {"benchmark": benchmark}) for where, instruction in found))


def read_vcgbench(path: Path) -> Instructions:
    """VCGBench's {generic,temporal,consistency}_qa.json: {"Q" or "Q1" and "Q2", "A", "video_name"}.

    As its code reads it. The file's name is the kind. A consistency pair becomes two instructions with one "group".
    """
    kind = _kind(path, ("generic", "temporal", "consistency"), "_qa")
    for index, record in enumerate(read_records(path)):
        instruction = _instruction(f"{kind}/{index}", _video(record, "video_name"), answer=text(record, "A"), kind=kind)
        if kind != "consistency":
            yield record.where, {**instruction, "question": text(record, "Q")}
            continue
        for i in "12":
            instruction |= {"id": f"{kind}/{index}/{i}", "question": text(record, f"Q{i}"), "group": f"{kind}/{index}"}
            yield record.where, dict(instruction)


def read_msvd_qa(path: Path) -> Instructions:
    """MSVD-QA's {train,val,test}_qa.json: {"id", "video_id": 1301, "question", "answer"}, or `read_pair`'s form.

    youtube_mapping.txt beside it, lines "name vid1301", gives the videos' names; without it they are vid1301.
    """
    if path.stem.endswith("_q"):
        yield from read_pair(path)
        return
    mapping = path.with_name("youtube_mapping.txt")
    names = {}
    if mapping.is_file():
        for number, line in enumerate(read_text(mapping).splitlines(), start=1):
            words = line.split()
            if words and (len(words) != 2 or words[1] in names):
                raise UserError(f"{mapping}: row {number}: is {show(line)}, expected a name and its own vid number")
            if words:
                names[words[1]] = words[0]
    for record in read_records(path):
        video = f"vid{name(record, 'video_id')}"
        if names and video not in names:
            raise UserError(f"{record.where}: {mapping} has no {video}; take the one that belongs to the questions")
        yield record.where, _question_and_answer(record, name(record, "id"), names.get(video, video))


def read_msrvtt_qa(path: Path) -> Instructions:
    """MSRVTT-QA's {train,val,test}_qa.json: {"id", "video_id": 7010, "question", "answer"}, or `read_pair`'s form.

    The video is video7010.
    """
    if path.stem.endswith("_q"):
        yield from read_pair(path)
        return
    for record in read_records(path):
        yield record.where, _question_and_answer(record, name(record, "id"), f"video{name(record, 'video_id')}")


def read_tgif_frameqa(path: Path) -> Instructions:
    """TGIF-QA's Test_frameqa_question.csv, whose cells are separated by tabs [checked with the published file].

    Columns gif_name, question, answer, type, vid_id (the question's id) and others. Or `read_pair`'s form.
    """
    if path.stem.endswith("_q"):
        yield from read_pair(path)
        return
    for record in read_records(path):
        instruction = _question_and_answer(record, name(record, "vid_id"), _video(record, "gif_name"))
        yield record.where, {**instruction, "kind": _choose(record, "type", TGIF_KINDS)}


def read_activitynet_qa(path: Path) -> Instructions:
    """ActivityNet-QA's test_q.json and, beside it, test_a.json [checked with the published files]."""
    return read_pair(path, ACTIVITYNET_KINDS)


def read_pair(path: Path, kinds: Sequence[str] = ()) -> Instructions:
    """Questions {"video_name", "question", "question_id"} and, beside them, answers {"answer", "type", "question_id"}.

    They are matched by question_id; answers to other questions are not used. kinds: the meanings of the numbers in
    "type". The three other sets have this form in Video-LLaVA's files [from memory].
    """
    if not path.stem.endswith("_q"):
        raise UserError(
            f"{path}: expected a file of questions with answers beside it, such as test_q.json, test_a.json"
        )
    beside = path.with_name(f"{path.stem[:-2]}_a{path.suffix}")
    answers: dict[str, Record] = {}
    for record in read_records(beside):
        id = name(record, "question_id")
        if id in answers:
            raise UserError(f"{record.where}: question_id {show(id)} is already answered")
        answers[id] = record
    for record in read_records(path):
        id = name(record, "question_id")
        if id not in answers:
            raise UserError(f"{record.where}: {beside} has no answer with question_id {show(id)}")
        instruction = _instruction(id, _video(record, "video_name"), question=text(record, "question"))
        instruction["answer"] = text(answers[id], "answer")
        if kinds:
            instruction["kind"] = _choose(answers[id], "type", kinds)
        yield record.where, instruction


def read_mvbench(path: Path) -> Instructions:
    """MVBench's json/<task>.json: {"video", "question", "candidates", "answer": one of them} [as its users read it].

    Some tasks add "start" and "end". The file's name is the kind.
    """
    for index, record in enumerate(read_records(path)):
        instruction = _instruction(f"{path.stem}/{index}", _video(record, "video"), kind=path.stem)
        instruction |= _multiple_choice(record, "candidates", "answer")
        if "start" in record.fields or "end" in record.fields:
            instruction |= _span(record)
        yield record.where, instruction


def read_videomme(path: Path) -> Instructions:
    """Video-MME's Parquet, one record a question [fields as its card lists them], or the same in JSON or JSON Lines.

    {"question_id", "videoID", "question", "options": ["A. …", …], "answer": "A", "task_type", "duration"} and others.
    """
    for record in read_records(path):
        choices, answer = texts(record, "options"), text(record, "answer")
        labels = list(string.ascii_uppercase[: len(choices)])
        if [choice[:2] for choice in choices] != [f"{label}." for label in labels]:
            raise UserError(f"{record.where}: field 'options' is {show(choices)}, expected 'A. …', 'B. …' and so on")
        if answer not in labels:
            raise UserError(f"{record.where}: answer {show(answer)} is none of {', '.join(labels)}")
        kind = f"{text(record, 'duration')}/{text(record, 'task_type')}"
        instruction = _instruction(
            name(record, "question_id"), _video(record, "videoID"), kind=kind, choices=choices, answer=answer
        )
        instruction["question"] = "\n".join((text(record, "question"), *choices, ASK_LETTER))
        yield record.where, instruction


def read_tempcompass(path: Path) -> Instructions:
    """TempCompass' {multi-choice,yes_no,caption_matching,captioning}.json [checked with the published files].

    {video: {aspect: [{"question", "answer"}, …]}}. The options are lines of the question, and the answer is one of
    them. The file's name and the aspect are the kind. Captions have no choices, because they need a judge.
    """
    form = _kind(path, tuple(TEMPCOMPASS_ASKS))
    for video, aspects in check_object(str(path), read_json(path)).items():
        for aspect, questions in check_object(f"{path}: {show(video)}", aspects).items():
            if not isinstance(questions, list):
                raise UserError(f"{path}: {show(video)}, {show(aspect)}: is {show(questions)}, expected a list")
            for index, fields in enumerate(questions):
                where = f"{path}: {show(video)}, {show(aspect)}, row {index + 1}"
                record = Record(where, check_object(where, fields))
                question, answer = text(record, "question"), text(record, "answer")
                instruction = _instruction(
                    f"{form}/{video}/{aspect}/{index}", video, kind=f"{form}/{aspect}", answer=answer
                )
                instruction["question"] = question + TEMPCOMPASS_ASKS[form]
                if form in ("multi-choice", "caption_matching"):
                    instruction["choices"] = question.split("\n")[1:]
                    if answer not in instruction["choices"]:
                        raise UserError(f"{where}: answer {show(answer)} is no line of the question")
                    instruction["answer"] = answer.partition("." if form == "multi-choice" else ":")[0]
                if form == "yes_no" and answer not in ("yes", "no"):
                    raise UserError(f"{where}: answer {show(answer)} is neither yes nor no")
                yield where, instruction


def read_vnbench(path: Path) -> Instructions:
    """VNBench's VNBench-main-4try.json: {"video", "question", "options", "gt": one of them, "type", "try": 0..3}.

    As its code reads it. A video's four tries are a group, which is right if all four are right.
    """
    for record in read_records(path):
        video = _video(record, "video")
        instruction = _instruction(f"{video}_{name(record, 'try')}", video, kind=text(record, "type"), group=video)
        yield record.where, instruction | _multiple_choice(record, "options", "gt")


BENCHMARKS = {
    "vcgbench": EvalSet(read_vcgbench, ("generic_qa.json", "temporal_qa.json", "consistency_qa.json")),
    "msvd_qa": EvalSet(read_msvd_qa, ("test_qa.json",)),
    "msrvtt_qa": EvalSet(read_msrvtt_qa, ("test_qa.json",)),
    "tgif_frameqa": EvalSet(read_tgif_frameqa, ("Test_frameqa_question.csv",)),
    "activitynet_qa": EvalSet(read_activitynet_qa, ("test_q.json",)),
    "mvbench": EvalSet(read_mvbench, ("*.json",)),
    "videomme": EvalSet(read_videomme, ("test-*.parquet",)),
    "tempcompass": EvalSet(read_tempcompass, tuple(f"{form}.json" for form in TEMPCOMPASS_ASKS)),
    "vnbench": EvalSet(read_vnbench, ("VNBench-main-4try.json",)),
}


def _instruction(id: str, video: str, **fields: Any) -> Instruction:
    return {"id": id, "video": video, "language": "en", **fields}


def _question_and_answer(record: Record, id: str, video: str) -> Instruction:
    return _instruction(id, video, question=text(record, "question"), answer=text(record, "answer"))


def _video(record: Record, field: str) -> str:
    return video_name(record, field, text(record, field))


def _kind(path: Path, kinds: Sequence[str], suffix: str = "") -> str:
    """The kind that a file's name states."""
    if not path.stem.endswith(suffix) or (kind := path.stem.removesuffix(suffix)) not in kinds:
        raise UserError(f"{path}: expected a file named {', '.join(f'{kind}{suffix}.json' for kind in kinds)}")
    return kind


def _choose(record: Record, field: str, names: Sequence[str]) -> str:
    """The entry of `names` at the index in a field, a number or its digits."""
    index = name(record, field)
    if index not in map(str, range(len(names))):
        raise UserError(f"{record.where}: field {field!r} is {show(index)}, expected 0 to {len(names) - 1}")
    return names[int(index)]


def _multiple_choice(record: Record, options: str, answer: str) -> Instruction:
    """The question with its options lettered; of equal options the first is the answer."""
    words, right = texts(record, options), name(record, answer)
    if right not in words:
        raise UserError(
            f"{record.where}: field {answer!r} is {show(right)}, which is none of its {len(words)} {options}"
        )
    if not 2 <= len(words) <= len(string.ascii_uppercase):
        raise UserError(f"{record.where}: field {options!r} has {len(words)} entries, expected 2 to 26")
    choices = [f"{letter}. {word}" for letter, word in zip(string.ascii_uppercase, words, strict=False)]
    question = "\n".join((text(record, "question"), *choices, ASK_LETTER))
    return {"question": question, "choices": choices, "answer": string.ascii_uppercase[words.index(right)]}


def _span(record: Record) -> dict[str, float]:
    """The seconds of the video that a question is about."""
    start, end = (value(record, field) for field in ("start", "end"))
    try:
        return dict(zip(("start", "end"), checked_part((start, end)), strict=True))
    except ValueError:
        raise UserError(
            f"{record.where}: is about {show(start)} to {show(end)} seconds, expected a part of a video"
        ) from None
