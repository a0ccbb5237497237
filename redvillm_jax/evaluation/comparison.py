"""Compares two judged answer files by the paired difference on their common questions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from redvillm_jax.evaluation.judged_folder import read_judged
from redvillm_jax.evaluation.scoring import Result, estimates, observations

REFERENCE = ("question", "question_2", "answer")


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Returns {benchmark: {"common", "only_first", "only_second", "metrics"}}: means of second minus first.

    Both are folders of `redvillm_jax.judge`. Raises UserError when their judge, prompts or settings differ, or when a
    common question has another wording or reference answer.
    """
    judges, results = zip(*(read_judged(folder) for folder in (first, second)), strict=True)
    _check_judges(*judges, f"{first} and {second}")
    compared = {}
    for benchmark in sorted({result["benchmark"] for side in results for result in side}):
        pair = [[result for result in side if result["benchmark"] == benchmark] for side in results]
        ours, theirs = (_by_question(side, folder) for side, folder in zip(pair, (first, second), strict=True))
        for key in ours:
            if key in theirs and ours[key]["values"] and theirs[key]["values"]:
                _check_same(ours[key], theirs[key])
        ours, theirs = (observations([{**r, "id": key[0]} for key, r in side.items()]) for side in (ours, theirs))
        common = {
            key: ours[key] | {"values": _difference(ours[key]["values"], theirs[key]["values"])}
            for key in ours
            if key in theirs
        }
        compared[benchmark] = {
            "common": len(common),
            "only_first": len(ours.keys() - theirs.keys()),
            "only_second": len(theirs.keys() - ours.keys()),
            "metrics": estimates(benchmark, common),
        }
    if not any(found["common"] for found in compared.values()):
        raise UserError(f"{first} and {second}: have no scored question in common")
    return compared


def _by_question(results: list[Result], folder: Path) -> dict[tuple, Result]:
    """Results by aspect and the question's id before translations, or by their own ids when those repeat."""
    for field in ("question_id", "id"):
        found = {(result.get(field, result["id"]), result.get("aspect")): result for result in results}
        if len(found) == len(results):
            return found
    raise UserError(f"{folder}: has an id twice")


def _check_judges(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None, where: str) -> None:
    """Raises UserError unless both were judged by one judge in one way, or both without a judge."""
    one, other = ours or {}, theirs or {}
    if one and other:
        both = one["prompts"].keys() & other["prompts"].keys()
        one, other = (
            judge | {"prompts": {aspect: judge["prompts"][aspect] for aspect in both}} for judge in (one, other)
        )
    for name in ("model", "reported", "temperature", "truncate", "prompts_version", "prompts"):
        if one.get(name) != other.get(name):
            raise UserError(f"{where}: judged with {name} {one.get(name)} and {other.get(name)}: not comparable")


def _check_same(ours: Result, theirs: Result) -> None:
    for field in REFERENCE:
        if ours.get(field) != theirs.get(field):
            found = " and ".join(json.dumps(side.get(field), ensure_ascii=False) for side in (ours, theirs))
            raise UserError(f"question with id {ours['id']!r}: the {field} differs: {found[:300]}: not comparable")


def _difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {metric: theirs[metric] - value for metric, value in ours.items() if metric in theirs}
