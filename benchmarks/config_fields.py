"""Writes docs/config_fields.md, the effect of every field of config.json on each base, from the code's own tables.

python -m benchmarks.config_fields
"""

from pathlib import Path

from redvillm_jax.bases.contract import known_families, load_family
from redvillm_jax.modules.config_fields import COMMON, FIXED, NOTHING, READ, Fields

FILE = Path(__file__).parents[1] / "docs" / "config_fields.md"

HEAD = """# Fields of a published config.json

The config.json of a published checkpoint describes its computation. Each base checks every field of the file against a
table, when a checkpoint is converted and again when a base folder is opened:

* **read**: the base computes with the value;
* **must be**: the base supports one value, and refuses any other;
* **changes nothing**: the field has no effect on the computation.

A field that no table has is refused, because it may change the computation. Report such a field, or remove it from the
file if you know that it changes nothing. A field that the file omits has the default of transformers' class; Qwen-VL's
fields are required.

No field of LLaVA-OneVision's files tells whether a checkpoint is of the single-image stage (`-si` in its name) or the
later stage that trained on videos (`-ov`). Both convert; only the first was never trained on videos.

`python -m benchmarks.config_fields` writes this page from the tables in `redvillm_jax/modules/*_fields.py` and
`redvillm_jax/bases/`.
"""


def table(title: str, fields: Fields) -> str:
    """One table: a line for each field that has an effect, and one line with the fields that change nothing."""
    rows = [f"### {title}", "", "| field | | value |", "|---|---|---|"]
    for effect in (READ, FIXED):
        found = {name: field for name, field in fields.items() if field.effect == effect}
        rows += [f"| `{name}` | {effect} | {field.values} |" for name, field in found.items()]
    if ignored := sorted(name for name, field in fields.items() if field.effect == NOTHING):
        rows += ["", "Changes nothing: " + ", ".join(f"`{name}`" for name in ignored) + "."]
    return "\n".join(rows)


def tables() -> str:
    """The table of fields that any file may have, then the tables of each base."""
    parts = [table("In every file that transformers writes", COMMON)]
    for family in known_families():
        parts.append(f"## --family={family}")
        for title, fields in load_family(family).FIELDS.items():
            own = {name: field for name, field in fields.items() if COMMON.get(name) != field}
            parts.append(table(title, own))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(HEAD + "\n" + tables(), encoding="utf-8")
