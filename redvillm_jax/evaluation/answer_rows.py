"""Answer files as rows: questions with "prediction", of redvillm_jax.evaluate and data_pipeline.translate."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.questions.eval_sets import BENCHMARKS
from data_pipeline.questions.instructions import read_instructions
from redvillm_jax.evaluation.scoring import OWN, Row


def read_answers(path: Path, benchmark: str | None) -> list[Row]:
    """Reads answers, each in one language; rows without "benchmark" get the one given.

    Raises UserError naming file, row and field.
    """
    rows, models = [], set()
    for row in read_instructions(path):
        where = f"{path}: row with id {row['id']!r}"
        if "prediction" not in row:
            raise UserError(f"{where}: has no 'prediction'; expected answers, as redvillm_jax.evaluate writes them")
        kinds = {"prediction": str | None, "benchmark": str, "group": str, "choices": list, "model": dict}
        for field, kind in kinds.items():
            if field in row and not isinstance(row[field], kind):
                raise UserError(f"{where}: field {field!r} is {json.dumps(row[field])[:40]}, which it cannot be")
        if not all(isinstance(choice, str) for choice in row.get("choices", ())):
            raise UserError(f"{where}: field 'choices' is {json.dumps(row['choices'])[:40]}, expected texts")
        if benchmark is not None:
            row.setdefault("benchmark", benchmark)
        if row.get("benchmark", OWN) not in (OWN, *BENCHMARKS):
            raise UserError(f"{where}: unknown benchmark {row['benchmark']!r}, expected one of {', '.join(BENCHMARKS)}")
        if row.get("benchmark") == "vcgbench" and row.get("kind") == "consistency" and "group" not in row:
            raise UserError(f"{where}: a question of a pair, but has no field 'group'")
        models.add(json.dumps(row.get("model"), sort_keys=True))
        rows.append(in_one_language(row, where))
    if len(models) > 1:
        raise UserError(
            f"{path}: has answers of {len(models)} models: {', '.join(sorted(models))[:200]}; judge each alone"
        )
    return rows


def in_one_language(row: Row, where: str) -> Row:
    """The row with "language", "question" and "answer" in the language of its prediction.

    After data_pipeline.translate that is told by the end of the id (-en, -zh); question and answer are then those that
    stand there, or those that they were translated from. where: what a message begins with. Raises UserError if they
    are not there.
    """
    if "source_prediction" not in row:
        return row
    translated = re.search(r"-(en|zh)$", row["id"])
    if translated is None:
        raise UserError(f"{where}: has 'source_prediction', but its id does not end in -en or -zh")
    if translated[1] == row["language"]:
        return row
    if not all(isinstance(row.get(field), str) for field in ("source_question", "source_answer")):
        raise UserError(
            f"{where}: its prediction was translated ({translated[1]}), its question and answer were not "
            f"({row['language']}); translate all: --fields=question,answer,prediction"
        )
    return {**row, "language": translated[1], "question": row["source_question"], "answer": row["source_answer"]}


def first(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first `limit` rows, and with them the others of their groups."""
    groups = {(row.get("benchmark"), row["group"]) for row in rows[:limit] if "group" in row}
    return [row for i, row in enumerate(rows) if limit is None or i < limit or _in_group(row, groups)]


def _in_group(row: Row, groups: set[tuple]) -> bool:
    return "group" in row and (row.get("benchmark"), row["group"]) in groups
