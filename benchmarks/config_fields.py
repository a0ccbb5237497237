"""Writes docs/config_fields.md: what each base does with every field of config.json, from the code's own tables.

python -m benchmarks.config_fields
"""

from pathlib import Path

from redvillm_jax.bases.contract import known_families, load_family
from redvillm_jax.modules.config_fields import COMMON, FIXED, NOTHING, READ, Fields

FILE = Path(__file__).parents[1] / "docs" / "config_fields.md"

HEAD = """# What a base does with each field of config.json

A published checkpoint says in its config.json what has to be computed. Each base goes through the file with a table:
a field is **read** and computed with, **must be** what the base computes (another value is refused), or **changes
nothing**. A field that no table knows is refused, because it may change the computation: report it, or remove it from
the file if you know that it changes nothing. All of this happens when a checkpoint is converted and again when a base
folder is opened. A field that a file omits has the value of transformers' class (LLaVA) or must be there (Qwen-VL).

`python -m benchmarks.config_fields` writes this page from the tables in `redvillm_jax/modules/config_fields.py`,
`redvillm_jax/modules/clip_fields.py`, `redvillm_jax/modules/llama_fields.py` and `redvillm_jax/bases/`.
"""


def table(title: str, fields: Fields) -> str:
    """One table: a row per field that matters, and one line of those that change nothing."""
    rows = [f"### {title}", "", "| field | | value |", "|---|---|---|"]
    for effect in (READ, FIXED):
        found = {name: field for name, field in fields.items() if field.effect == effect}
        rows += [f"| `{name}` | {effect} | {field.values} |" for name, field in found.items()]
    if ignored := sorted(name for name, field in fields.items() if field.effect == NOTHING):
        rows += ["", "Changes nothing: " + ", ".join(f"`{name}`" for name in ignored) + "."]
    return "\n".join(rows)


def tables() -> str:
    """The table of what every file may hold, then each base's own."""
    parts = [table("In every file that transformers writes", COMMON)]
    for family in known_families():
        parts.append(f"## --family={family}")
        for title, fields in load_family(family).FIELDS.items():
            own = {name: field for name, field in fields.items() if COMMON.get(name) != field}
            parts.append(table(title, own))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(HEAD + "\n" + tables(), encoding="utf-8")
