"""Answers the questions of a frame store and counts exact matches.

python -m redvillm_jax.evaluate --model=RUN --data=FRAMES --out=DIR
python -m redvillm_jax.evaluate --model=BASE --config=configs/llava.py --data=FRAMES --out=DIR    (untrained)

Writes answers.jsonl, one line per question in the store's order, and summary.json, accuracy by question kind.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipeline.errors import UserError
from data_pipeline.files import write_text
from data_pipeline.store import open_store
from redvillm_jax.assemble import load_model, put_trained, token_slots
from redvillm_jax.cli import parse, positive
from redvillm_jax.distributed import command
from redvillm_jax.inference import answer
from redvillm_jax.inputs import check_store, needed_parts, open_model
from redvillm_jax.sharding import make_mesh

OPTIONS = {
    "model": (None, "A run directory, or a base folder (the untrained video LLM; give its --config too)."),
    "data": (None, "A store made by data_pipeline.prepare, or by redvillm_jax.encode."),
    "out": (None, "Folder for answers.jsonl and summary.json."),
    "max_new_tokens": ("64", "Longest answer in tokens."),
    "batch_size": ("64", "Questions answered at once."),
    "video_batch_size": ("8", "Videos encoded at once."),
}


def main(argv: list[str]) -> None:
    flags = parse(argv, __doc__, OPTIONS)
    for name in ("model", "data", "out"):
        if not flags[name]:
            raise UserError(f"--{name} is needed: {OPTIONS[name][1]}")
    if jax.process_count() > 1:
        raise UserError("evaluate runs in one process: run it on one machine with --model=RUN")
    sizes = {name: positive(flags, name) for name in ("max_new_tokens", "batch_size", "video_batch_size")}
    config, base, trained, *_ = open_model(flags["model"], flags["config"])
    store = open_store(flags["data"])
    check_store(store, base, config)
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})  # a run's own mesh may need other machines
    out = Path(flags["out"])
    made_with = {
        "model": str(Path(flags["model"]).absolute()),
        "base": base.fingerprint,
        "data": store.meta["fingerprint"],
        "max_new_tokens": sizes["max_new_tokens"],
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
        slots = token_slots(base, config)
        predictions = answer(model, base, store, slots, mesh, dtype=dtype, **sizes)
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
    """Writes JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    command(main)
