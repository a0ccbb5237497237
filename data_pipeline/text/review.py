"""The file in which a person decides on suspicious translations, one JSON line a text.

    {"source", "translation", "reasons", "rows", "ids", "ok": false, "correction": ""}

A decision is a correction, or "ok": true for the translation as it stands. Decisions are kept for ever; every run
rewrites the other lines. Only "source" and the decision are read, so a person may also add a line.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import write_text

Line = dict[str, Any]


def read_decisions(path: Path) -> dict[str, Line]:
    """Returns the decided lines of a review file by source text, {} without a file.

    Raises UserError naming the line, so that a person's text is never overwritten unread.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    decisions: dict[str, tuple[int, Line]] = {}
    for number, raw in enumerate(text.split("\n"), start=1):
        if raw.strip():
            line = _checked(f"{path}: line {number}", raw)
            if line.get("ok") or line.get("correction", "").strip():
                first, before = decisions.setdefault(line["source"], (number, line))
                if decision(before) != decision(line):
                    raise UserError(f"{path}: line {number}: decides otherwise than line {first} on the same source")
    return {source: line for source, (_, line) in decisions.items()}


def decision(line: Line) -> str:
    """The translation that a decided line stands for."""
    return line.get("correction", "").strip() or line["translation"]


def write_review(
    path: Path,
    suspicious: Mapping[str, list[str]],
    translations: Mapping[str, str],
    uses: Iterable[tuple[str, set[str]]],
    decisions: Mapping[str, Line],
) -> None:
    """Writes a line for each suspicious text, then the decided lines as they were read.

    suspicious: reasons by source text. uses: the id and the source texts of each instruction; a line counts the
    instructions with its text and names three of them.
    """
    ids: dict[str, list[str]] = {text: [] for text in suspicious}
    for own_id, texts in uses:
        for text in texts & ids.keys():
            ids[text].append(own_id)
    lines = [
        {
            "source": text,
            "translation": translations.get(text, ""),
            "reasons": reasons,
            "rows": len(ids[text]),
            "ids": ids[text][:3],
            "ok": False,
            "correction": "",
        }
        for text, reasons in suspicious.items()
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*lines, *decisions.values())))


def _checked(where: str, raw: str) -> Line:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON: {error}; mend or delete the line") from None
    if not isinstance(line, dict) or not isinstance(line.get("source"), str):
        raise UserError(f'{where}: expected an object with "source", "ok" and "correction"')
    for name, kind, expected in (("ok", bool, "true or false"), ("correction", str, "text")):
        if not isinstance(line.get(name, kind()), kind):
            raise UserError(f'{where}: "{name}" is {json.dumps(line[name])[:40]}, expected {expected}')
    translation = line.get("translation")
    if line.get("ok") and not line.get("correction", "").strip() and not (isinstance(translation, str) and translation):
        raise UserError(f'{where}: "ok" is true, but there is no translation; fill in "correction"')
    return line
