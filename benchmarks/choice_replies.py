"""Counts the replies of tests/choice_replies.jsonl that are read rightly, wrongly and not at all.

  python benchmarks/choice_replies.py --show=dev

Tune the rules on "dev" alone; "test" is for reporting, and --show never prints it.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from data_pipeline.common.cli import Parser
from data_pipeline.common.tables import text_table
from redvillm_jax.evaluation.choices import chosen

FILE = Path(__file__).parents[1] / "tests" / "choice_replies.jsonl"
COUNTS = ("read", "unread", "misread", "none", "invented")


def outcome(reads: str | None, found: str | None) -> str:
    """What became of a reply: a choice that is read, unread or misread; none, which stays none or is invented."""
    if reads is None:
        return "none" if found is None else "invented"
    return "read" if found == reads else "unread" if found is None else "misread"


def main() -> None:
    parser = Parser("python benchmarks/choice_replies.py", __doc__)
    parser.add_argument("--show", choices=("dev",), help="print the replies that are not read rightly")
    show = parser.parse_args(sys.argv[1:]).show
    counts: dict[str, Counter] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        group = json.loads(line)
        for reply in group["replies"]:
            found = chosen(reply, group["choices"])
            what = outcome(group["reads"], found)
            for name in (group["split"], f"{group['split']}: {group['form']}"):
                counts.setdefault(name, Counter())[what] += 1
            if group["split"] == show and what not in ("read", "none"):
                print(f"{what:9}{group['form']}: {reply!r} is {group['reads']}, found {found}; {group['choices']}")
    rows = [(name, *(found[what] for what in COUNTS), found.total()) for name, found in sorted(counts.items())]
    print("\n".join(text_table(("", *COUNTS, "of"), rows, ("<48", *[">10"] * (len(COUNTS) + 1)))))


if __name__ == "__main__":
    main()
