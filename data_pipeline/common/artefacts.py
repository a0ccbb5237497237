"""Reads files that the project itself writes. A damaged file becomes a UserError that says what to do.

A `Form` lists the fields on which the readers of a file rely; further fields are allowed. Question files of users are
read by `data_pipeline.questions.records`. Written by hand, because pydantic, which openai brings, tells a mistake in
several lines of its own words.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path, explained


@dataclasses.dataclass(frozen=True)
class Each:
    """An object with any keys, whose values all have one kind."""

    kind: Any


class Form(NamedTuple):
    """The expected fields of an object, and the remedy when they are not there.

    keys: kinds by name; a name that ends in "?" may be missing. A kind is a type or a union of types, a tuple of the
    allowed values, [kind] for a list, `Each(kind)`, or a mapping of names to kinds for an object.
    """

    keys: Mapping[str, Any]
    remedy: str


# ---- stores: data_pipeline.prepare, redvillm_jax.encode

_STORE_AGAIN = "run the command that made the store again"
_SOURCE = {"video": str, "source": str, "bytes": int, "changed?": int, "start?": float, "end?": float}
_VIDEO = {"video": str, "num_frames": int, "source?": str, "sha256?": str}
STORE = Form(
    {
        "kind": ("frames", "streams"),
        "fingerprint": str,
        "num_frames?": int,
        "sampling?": str,
        "image_size?": int,
        "shards?": Each({"records": int, "bytes?": int}),
    },
    _STORE_AGAIN,
)
VIDEO = Form(_VIDEO, _STORE_AGAIN)
QUESTION = Form({"id": str, "video": str, "language": str, "question": str, "answer": str}, _STORE_AGAIN)
REPORT = Form({"questions_found?": int, "questions_used?": int, "made_from?": str}, _STORE_AGAIN)
PLAN = Form({"settings": dict, "sources": [_SOURCE]}, "delete the store's folder and make it again")
PART = Form(
    {
        "videos": [_VIDEO],
        "left_out": [{"video": str, "reason": str}],
        "notes?": [{"note": str}],
        "num_bytes": int,
        "sources?": [_SOURCE],
        "bytes?": int,
        "sha256?": str,
        "checksum?": str,
    },
    _STORE_AGAIN,
)
SHAPES = Form({"seed": int, "language": str}, "delete its folder and make the videos again")

# ---- bases and exports: conversion

BASE = Form(
    {"family": str, "fingerprint": str, "image_size": int, "resize": str},
    "make the base folder again with conversion.from_torch",
)
CONVERTED = Form(
    {
        **BASE.keys,
        **dict.fromkeys(("parameters", "bytes", "tensors", "tensors_not_loaded"), int),
        **{"dtypes": Each(int), "source": str, "vision_source": str | None},
    },
    "delete this folder, then run the same command again",
)
EXPORT = Form(
    {"family": str, "base_fingerprint": str, "trained": bool, "method": dict},
    "export the model again with conversion.to_torch",
)

# ---- runs: redvillm_jax.train

_TEXTS = ("family", "data", "video", "sampling", "labels", "language", "dtype", "remat")
_COUNTS = ("num_frames", "row_length", "num_epochs", "batch_questions", "log_every", "checkpoint_every")
RUN = Form(  # the fields of a base and a representation are checked by `redvillm_jax.model.settings`
    {
        "base": str,
        **{f"{name}?": str for name in _TEXTS},
        **{f"{name}?": int for name in (*_COUNTS, "seed", "num_workers", "keep_checkpoints")},
        **{f"{name}?": bool for name in ("pack", "int8")},
        **{f"{name}?": float for name in ("learning_rate", "warmup_ratio", "clip_norm")},
        **{f"{name}?": Each(float) for name in ("learning_rate_scale", "weight_decay")},
        "mesh?": Each(int),
    },
    "put back this run's config.json (its checkpoints have it in their run.json)",
)
METRICS = Form({"step": int, "loss": float}, "rename the file, then run the same command again")
CHECKPOINT = Form(
    {"config": dict, "identity": {"base": str, "data": str}, "manifest": Each([int])},
    "the same training command again sets it aside",
)

# ---- answers and scores: redvillm_jax.answer, evaluate and judge

_ANSWER_AGAIN = "delete it, then run the command that wrote it again"
_NOT_OURS = "it is damaged, or was not written by this command: move it away, or choose another output"
_METRICS = Each(Each({"mean": float | None, "low": float | None, "high": float | None, "questions": int}))
_BENCHMARKS = Each({"questions": int, "videos": int, "statuses": Each(int), "metrics": _METRICS})
ANSWER = Form({"prediction": str | None}, _ANSWER_AGAIN)
ANSWERS_BEGUN = Form({"made_with": dict}, _NOT_OURS)  # the first line of unfinished answers
NUMBERED_ANSWER = Form({"number": int, "answer": {"prediction": str | None}}, _ANSWER_AGAIN)
ANSWER_REPORT = Form({"made_with": dict, "answered": int, "failed": list, "answers_sha256?": str}, _NOT_OURS)
SUMMARY = Form({"benchmarks": _BENCHMARKS, "made_with": dict, "answers_sha256?": str}, _NOT_OURS)
_JUDGE_AGAIN = "judge again"
JUDGED = Form(
    {
        "made_with": {"judge": dict | None},
        "replies": {"models": Each(int)},
        "verdicts_sha256": str,
        "benchmarks": _BENCHMARKS,
    },
    _JUDGE_AGAIN,
)
VERDICT = Form({"id": str, "video": str, "language": str, "benchmark": str, "values": Each(float)}, _JUDGE_AGAIN)


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a hash of all its fields, which `read_object` compares."""
    said = {name: inner for name, inner in value.items() if name != "checksum"}
    content = json.dumps(json.loads(json.dumps(said)), sort_keys=True)  # makes all keys texts, as a reader gets them
    return said | {"checksum": hashlib.sha256(content.encode()).hexdigest()}


def read_object(path: str | Path, form: Form) -> dict[str, Any]:
    """Reads a file of one JSON object. Raises UserError when it is missing, damaged or of another form."""
    value = _parsed(str(path), read_bytes(path, form), form)
    if "checksum" in value and value["checksum"] != with_checksum(value)["checksum"]:
        raise UserError(f"{path}: was changed after it was written; {form.remedy}")
    return value


def read_lines(
    path: str | Path, form: Form, *, first: Form | None = None, growing: bool = False
) -> list[dict[str, Any]]:
    """Reads a file of one JSON object a line. Raises UserError naming the line.

    first: the form of the first line, if it differs. growing: a missing file has no lines, and an unfinished last line,
    which a killed command leaves, does not count.
    """
    if growing and not as_path(path).exists():
        return []
    return parse_lines(path, read_bytes(path, form), form, first=first, growing=growing)


def parse_lines(
    path: str | Path, content: bytes, form: Form, *, first: Form | None = None, growing: bool = False
) -> list[dict[str, Any]]:
    """`read_lines` for the content of a file."""
    *lines, rest = content.split(b"\n")
    if rest and not growing:
        raise UserError(f"{path}: line {len(lines) + 1}: has no line break at its end; {form.remedy}")
    numbered = enumerate(lines, start=1)
    return [_parsed(f"{path}: line {i}", line, first if first and i == 1 else form) for i, line in numbered]


def read_bytes(path: str | Path, form: Form) -> bytes:
    """A file's content. Raises UserError."""
    try:
        with explained(path):
            return as_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {form.remedy}") from None


def _parsed(where: str, content: bytes, form: Form) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
        if re.search(rb"\\u[dD]", content):  # half a character (a surrogate) could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise UserError(f"{where}: is not UTF-8 text; {form.remedy}") from None
    except (ValueError, RecursionError):
        found = "is not whole JSON" if content.strip() else "is empty"
        raise UserError(f"{where}: {found}; {form.remedy}") from None
    if problem := _problem(value, form.keys):
        raise UserError(f"{where}: {problem}; {form.remedy}")
    return value


def _problem(value: Any, kind: Any, name: str = "") -> str:
    """The problem with a value, "" without one."""
    field = f"field {name!r} " if name else ""
    if isinstance(kind, tuple):
        return "" if value in kind else f"{field}is {_shown(value)}, expected {' or '.join(kind)}"
    outer = dict if isinstance(kind, Mapping | Each) else list if isinstance(kind, list) else kind
    if not _is(value, outer):
        return f"{field}is {_shown(value)}, expected {' or '.join(WORDS[t] for t in _types(outer))}"
    if isinstance(kind, Each):
        inner = [(value[key], kind.kind, key) for key in value]
    elif isinstance(kind, list):
        inner = [(item, kind[0], str(i)) for i, item in enumerate(value, start=1)]
    elif isinstance(kind, Mapping):
        if missing := [key for key in kind if not key.endswith("?") and key not in value]:
            return f"{field}has no {missing[0]!r}"
        present = ((key.removesuffix("?"), of) for key, of in kind.items())
        inner = [(value[key], of, key) for key, of in present if key in value]
    else:
        return ""
    return next((found for v, k, key in inner if (found := _problem(v, k, f"{name}.{key}" if name else key))), "")


WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    types.NoneType: "null",
}


def _types(kind: Any) -> tuple[type, ...]:
    return typing.get_args(kind) or (kind,)


def _is(value: Any, kind: Any) -> bool:
    """isinstance, except that true is no number and a whole number is a number."""
    return any(
        isinstance(value, int | float if t is float else t) and (t is bool or not isinstance(value, bool))
        for t in _types(kind)
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return WORDS[type(value)]
    return json.dumps(value, ensure_ascii=False)[:40]
