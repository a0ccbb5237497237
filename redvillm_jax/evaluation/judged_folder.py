"""The output folder of redvillm_jax.judge: verdicts.jsonl and summary.json, always from one command."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.artefacts import JUDGED, VERDICT, parse_lines, read_bytes, read_object
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import write_text
from redvillm_jax.evaluation.scoring import Result, summarize


def check_folder(out: Path) -> None:
    """Raises UserError for a folder with another command's files in it."""
    if (out / "answers.jsonl").exists():
        raise UserError(f"--out={out}: holds answers.jsonl and what was made with it; choose another folder")
    if (out / "summary.json").exists() and "verdicts_sha256" not in _summary(out):
        raise UserError(f"--out={out}: has a summary.json that is not of redvillm_jax.judge; choose another folder")
    if (out / "verdicts.jsonl").exists() and not all(
        {"id", "status", "values"} <= line.keys() for line in _verdicts(out)
    ):
        raise UserError(f"--out={out}: has a verdicts.jsonl that is not of redvillm_jax.judge; choose another folder")


def make_folder(out: Path) -> None:
    """Makes the folder. Raises UserError when that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made: {error.strerror}") from None


def remove_others(out: Path, made_with: Mapping[str, Any]) -> None:
    """Removes verdicts and summary that came from other answers, another model or other settings."""
    if _summary(out).get("made_with") != made_with:
        for name in ("summary.json", "verdicts.jsonl"):
            (out / name).unlink(missing_ok=True)


def write_judged(
    out: Path, results: Sequence[Result], made_with: Mapping[str, Any], tokens: tuple[int, int]
) -> dict[str, Any]:
    """Writes verdicts.jsonl, then summary.json with its hash. Returns the summary.

    made_with: everything on which the results depend; its "judge" is None when no judge was asked. tokens: (in, out) of
    all replies, also the cached ones.
    """
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    models = Counter(result["model"] for result in results if result.get("model"))
    replies = {"models": dict(sorted(models.items())), "tokens_in": tokens[0], "tokens_out": tokens[1]}
    summary = {
        "made_with": made_with,
        "replies": replies,
        "verdicts_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "benchmarks": summarize(results),
    }
    (out / "summary.json").unlink(missing_ok=True)
    write_text(out / "verdicts.jsonl", lines)
    write_text(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    return summary


def read_judged(out: Path) -> tuple[dict[str, Any] | None, list[Result]]:
    """Returns the judge of a folder (None when its answers needed no judge) and the results. Raises UserError.

    The judge is the one in "made_with", with the names that the endpoint reported as "reported".
    """
    if not all((out / name).is_file() for name in ("verdicts.jsonl", "summary.json")):
        raise UserError(f"{out}: expected a folder with verdicts.jsonl and summary.json of redvillm_jax.judge")
    summary = read_object(out / "summary.json", JUDGED)
    content = read_bytes(out / "verdicts.jsonl", VERDICT)
    if summary["verdicts_sha256"] != hashlib.sha256(content).hexdigest():
        raise UserError(f"{out}: verdicts.jsonl is not the one that summary.json is about; judge again")
    judge, results = summary["made_with"]["judge"], parse_lines(out / "verdicts.jsonl", content, VERDICT)
    if judge is not None:
        try:
            judge |= {"reported": sorted(summary["replies"]["models"]), "prompts": dict(judge["prompts"])}
        except (LookupError, TypeError, ValueError):
            raise UserError(f"{out / 'summary.json'}: has no prompts of a judge; judge again") from None
    for number, result in enumerate(results, start=1):
        if not _is_result(result):
            raise UserError(f"{out / 'verdicts.jsonl'}: line {number} is no result of redvillm_jax.judge; judge again")
    return judge, results


def _is_result(found: Any) -> bool:
    """Whether an object has the fields of a result that means and comparisons use."""
    if not isinstance(found, dict) or not isinstance(found.get("values"), dict):
        return False
    if not all(isinstance(found.get(name), str) for name in ("id", "video", "language", "benchmark", "status")):
        return False
    if not all(isinstance(found.get(name, ""), str) for name in ("question_id", "aspect", "kind", "group")):
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in found["values"].values())


def _verdicts(out: Path) -> list[dict[str, Any]]:
    """The lines of verdicts.jsonl, with {} for a line that is no object and [{}] for an unreadable file."""
    try:
        lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError):
        return [{}]
    return [line if isinstance(line, dict) else {} for line in lines]


def _summary(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
