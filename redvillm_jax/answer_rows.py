"""Answer files as rows: questions with "prediction", of redvillm_jax.evaluate and data_pipeline.translate."""

import json
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.eval_sets import BENCHMARKS
from data_pipeline.instructions import read_instructions
from redvillm_jax.scoring import OWN, Row


def read_answers(path: Path, benchmark: str | None) -> list[Row]:
    """Reads answers; rows without "benchmark" get the one given. Raises UserError naming file, row and field."""
    rows = read_instructions(path)
    models = set()
    for row in rows:
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
    if len(models) > 1:
        raise UserError(
            f"{path}: has answers of {len(models)} models: {', '.join(sorted(models))[:200]}; judge each alone"
        )
    return rows


def first(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first `limit` rows, and with them the others of their groups."""
    groups = {(row.get("benchmark"), row["group"]) for row in rows[:limit] if "group" in row}
    return [row for i, row in enumerate(rows) if limit is None or i < limit or _in_group(row, groups)]


def _in_group(row: Row, groups: set[tuple]) -> bool:
    return "group" in row and (row.get("benchmark"), row["group"]) in groups
