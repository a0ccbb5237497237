"""Answers the questions of a frame store and counts exact matches.

python -m redvillm_jax.evaluate --model=RUN --data=FRAMES --out=DIR
python -m redvillm_jax.evaluate --model=BASE --config=configs/llava.py --data=FRAMES --out=DIR    (untrained)

Writes answers.jsonl, one line per question in the store's order, and summary.json, accuracy by question kind.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipeline.errors import UserError, run
from data_pipeline.store import open_store
from redvillm_jax.assemble import check_store, load_model, needed_parts, open_run, put_trained
from redvillm_jax.cli import parse, positive
from redvillm_jax.inference import answer
from redvillm_jax.sharding import make_mesh

OPTIONS = {
    "model": "A run directory, or a base folder (the untrained video LLM; give its --config too).",
    "data": "A store made by data_pipeline.prepare, or by redvillm_jax.encode.",
    "out": "Folder for answers.jsonl and summary.json.",
    "max_new_tokens": "Longest answer in tokens = 64",
    "batch_size": "Questions answered at once = 64",
}


def main(argv: list[str]) -> None:
    flags = parse(argv, __doc__, OPTIONS)
    for name in ("model", "data", "out"):
        if not flags[name]:
            raise UserError(f"--{name} is needed: {OPTIONS[name]}")
    max_new_tokens, batch_size = (positive(flags, name) for name in ("max_new_tokens", "batch_size"))
    config, base, trained = open_run(flags["model"], flags["config"])
    store = open_store(flags["data"])
    check_store(store, flags["data"], base, config)
    mesh = make_mesh(config["mesh"])
    out = Path(flags["out"])
    made_with = {
        "model": str(Path(flags["model"]).absolute()),
        "base": base.fingerprint,
        "data": store.meta["fingerprint"],
        "max_new_tokens": max_new_tokens,
        "config": dict(config),
    }
    if (summary := finished(out / "summary.json", made_with)) is not None:
        print(f"{out} is whole already")
        print(table(summary))
        return
    out.mkdir(parents=True, exist_ok=True)

    with jax.set_mesh(mesh):
        dtype = jnp.dtype(config["dtype"])
        model = load_model(base, config, mesh, dtype=dtype, parts=needed_parts(store))
        if trained is not None:
            put_trained(model, trained)
        predictions = answer(
            model, base, store, mesh, dtype=dtype, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
    answers = [row | {"prediction": text} for row, text in zip(store.instructions, predictions, strict=True)]
    write_lines(out / "answers.jsonl", answers)
    summary = {**score(answers), "made_with": made_with}
    write_lines(out / "summary.json", [summary])
    print(table(summary))


def finished(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary at `path` if it came from the same model, data and settings, so that nothing need be done."""
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    return summary if summary["made_with"] == made_with else None


def score(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact match (upper and lower case and white space at the ends apart) over all rows, by kind and by language."""
    hits = defaultdict(list)
    for row in answers:
        hit = row["prediction"].strip().lower() == row["answer"].strip().lower()
        for group in ("all", f"kind:{row.get('kind', '-')}", f"language:{row['language']}"):
            hits[group].append(hit)
    return {
        "questions": len(answers),
        "exact_match": {group: sum(values) / len(values) for group, values in sorted(hits.items())},
        "counts": {group: len(values) for group, values in sorted(hits.items())},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line per group."""
    lines = [f"{'exact match':<28} accuracy  questions"]
    for group, value in summary["exact_match"].items():
        lines.append(f"{group:<28} {value:8.3f}  {summary['counts'][group]:9d}")
    return "\n".join(lines)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines under a temporary name, then renames."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    run(main)
