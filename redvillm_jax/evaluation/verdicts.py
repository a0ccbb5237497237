"""Reads a judge's reply as a verdict. Many forms are accepted, but an unclear reply is never guessed."""

import ast
import json
import re
from typing import Any, NamedTuple

LOWEST, HIGHEST = 0, 5

_FIELD = r"(?i:\b{name}\b)['\"‘’“”]*\s*(?:[:=]|(?i:is|of)\b)\s*"
_NUMBER = r"['\"]?(-?\d++(?:\.\d++)?+)(?!\s*(?:%|[-–—~]\s*\d|/\s*(?!5\b)\d))"
_SCORE = re.compile(_FIELD.format(name="score") + _NUMBER)
_PRED = re.compile(_FIELD.format(name="pred(?:iction)?") + r"['\"‘’“”]*([A-Za-z]++)(?!\s*(?:/|(?:or|and)\b))")


class Verdict(NamedTuple):
    """A score from 0 to 5, with its fraction. correct: None when the prompt asked only for a score."""

    score: float
    correct: bool | None


def read_verdict(reply: str, *, yes_no: bool) -> Verdict | str:
    """Returns the verdict of a reply, or one line with the reason why it has none.

    A reply may be a Python or JSON dictionary, or nearly one ({''score': 4.8}), with text or a code fence around it, or
    lines such as "Score: 4". yes_no: the prompt also asked for "pred", which must be yes or no and nothing else.
    """
    text = reply.rpartition("</think>")[2].replace("*", "")
    if "<think>" in text:
        return "the reply ends in the middle of its thoughts"
    found = [fields for inside in re.findall(r"\{[^{}]*\}", text) if (fields := _fields(inside))]
    found = [fields for fields in found if "score" in fields or "pred" in fields] or [_lines(text)]
    verdicts = [_verdict(fields, yes_no) for fields in found]
    if len(set(verdicts)) > 1:
        return f"the reply has {len(verdicts)} verdicts that differ"
    return verdicts[0]


def _verdict(fields: dict[str, Any], yes_no: bool) -> Verdict | str:
    if "score" not in fields:
        return "the reply has no score"
    number = fields["score"]
    if isinstance(number, str) and (digits := re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*5\s*)?", number)):
        number = float(digits[1])
    if type(number) not in (int, float):
        return f"the score is {str(number)[:40]!r}, expected a number"
    if not LOWEST <= number <= HIGHEST:
        return f"the score is {str(number)[:40]}, expected {LOWEST} to {HIGHEST}"
    if not yes_no:
        return Verdict(float(number), None)
    if "pred" not in fields:
        return "the reply has neither yes nor no"
    said = fields["pred"]
    if not isinstance(said, str) or (word := said.strip(" .!\n").lower()) not in ("yes", "no"):
        return f"pred is {str(said)[:40]!r}, expected yes or no"
    return Verdict(float(number), word == "yes")


def _fields(dictionary: str) -> dict[str, Any] | None:
    """The fields of a dictionary given as text, also of a malformed one as far as they can be read.

    A field that occurs twice has the list of its values, where a parser would take the last.
    """
    lines = _lines(dictionary)
    if any(isinstance(value, list) for value in lines.values()):
        return lines
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(dictionary)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return {str(key).strip().lower(): one for key, one in value.items()}
    return lines


def _lines(text: str) -> dict[str, Any]:
    """The values of "Score: 4" and "pred: yes" anywhere in a text, as a list when they differ."""
    said = {"score": set(_SCORE.findall(text)), "pred": {value.lower() for value in _PRED.findall(text)}}
    return {name: min(values) if len(values) == 1 else sorted(values) for name, values in said.items() if values}
