"""The report of data_pipeline.prepare on videos and questions that it used or left out: report.json and a summary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.media.video_files import VideoFiles, as_text
from data_pipeline.questions.formats import Instruction
from data_pipeline.store import Shards, Source


def make_report(
    files: VideoFiles,
    sources: Sequence[Source],
    shards: Shards,
    questions: Sequence[Instruction],
    mixture: dict[str, Any],
) -> dict[str, Any]:
    """Returns report.json, which counts every file, record and question as used or lists it as left out.

    sources, shards: of the whole store. questions: all instructions, with the ids of records as "video". mixture: the
    report of `read_mixture`.
    """
    stored = {line["video"] for line in shards.videos}
    asked = {source["source"] for source in sources}
    orphans = [question for question in questions if question["video"] not in stored]
    nameless = [
        {"source": as_text(file), "reason": f"{files.root / as_text(file)}: its name is not UTF-8 text; rename it"}
        for file in files.nameless
    ]
    return {
        "videos_found": len(asked.union(*files.videos.values())) + len(nameless),
        "videos_used": len({line["source"] for line in shards.videos}),
        "videos_left_out": shards.left_out + nameless,
        "videos_cut_short": shards.notes,
        "videos_without_question": sorted(map(files.id, set().union(*files.videos.values()) - asked)),
        "records": len(shards.videos),
        "instructions": mixture["files"],
        "rows_left_out": mixture["rows_left_out"],
        "questions_found": len(questions),
        "questions_used": len(questions) - len(orphans),
        "questions_without_video": [{"id": question["id"], "video": question["video"]} for question in orphans],
        "questions_repeated": mixture["questions_repeated"],
    }


def summary(out: Path, report: dict[str, Any]) -> str:
    """Returns a few lines on the content of the store and on the videos and questions that are left out."""
    left_out, unasked = report["videos_left_out"], report["videos_without_question"]
    orphans, repeated = report["questions_without_video"], report["questions_repeated"]
    rows = report["rows_left_out"]
    short, parts = report["videos_cut_short"], report["records"] != report["videos_used"]
    lines = [
        f"{out}: {report['videos_used']} of {report['videos_found']} videos"
        + (f" in {report['records']} records (parts of a video have their own)" if parts else "")
        + f", {report['questions_used']} of {report['questions_found']} questions"
    ]
    lines += [_origin(file) for file in report["instructions"] if file["prefix"] or file["weight"] != 1]
    if repeated:
        lines.append(f"kept: {len(repeated)} questions that repeat another about their video ({_some(_ids(repeated))})")
    if short:
        lines.append(f"kept: {len(short)} videos that end before their header says:")
        lines += [f"  {video['note']}" for video in short[:10]]
    if unasked:
        lines.append(f"left out: {len(unasked)} videos without a question ({_some(unasked)})")
    if left_out:
        lines.append(f"left out: {len(left_out)} videos that gave no frames:")
        lines += [f"  {video['reason']}" for video in left_out[:10]]
    if rows:
        lines.append(f"left out: {len(rows)} records that are no question about a video:")
        lines += [f"  {reason}" for reason in rows[:10]]
    if orphans:
        missing = sorted({question["video"] for question in orphans})
        about = f"{len(missing)} videos that are not in the store ({_some(missing)})"
        lines.append(f"left out: {len(orphans)} questions about {about}")
    if left_out or short or unasked or rows or orphans or repeated:
        lines.append(f"the complete lists are in {out / 'report.json'}")
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _ids(questions: list[dict[str, str]]) -> list[str]:
    return [question["id"] for question in questions]


def _origin(file: dict[str, Any]) -> str:
    """One line on a file with a weight, or with ids that another file has, too."""
    renamed = f", ids begin with {file['prefix']} (another file has some of them)" if file["prefix"] else ""
    return f"{file['file']}: {file['taken']} questions from {file['questions']}, weight {file['weight']:g}{renamed}"
