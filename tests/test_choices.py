"""Replies to multiple choice, as they are written down in choice_replies.jsonl, and what the rules make of them."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from redvillm_jax.evaluation.choices import chosen

GROUPS = [json.loads(line) for line in Path(__file__).with_name("choice_replies.jsonl").read_text("utf-8").splitlines()]
ANIMALS = ("A. cat", "B. dog", "C. bird", "D. a red bird")


def outcomes(split: str) -> Counter:
    """How many choices are read, unread and misread, and how many replies without a choice get none or one."""
    counts = Counter()
    for group in GROUPS:
        for reply in group["replies"] * (group["split"] == split):
            found, reads = chosen(reply, group["choices"]), group["reads"]
            if reads is None:
                counts["none" if found is None else "invented"] += 1
            else:
                counts["read" if found == reads else "unread" if found is None else "misread"] += 1
    return counts


@pytest.mark.parametrize(
    ("split", "unread", "invented", "replies"), [("dev", 10, 0, 594), ("test", 14, 0, 583), ("fresh", 5, 1, 84)]
)
def test_replies_that_are_written_down(split, unread, invented, replies):
    counts = outcomes(split)
    assert counts.total() == replies
    assert counts["misread"] == 0 and counts["invented"] <= invented and counts["unread"] <= unread, counts


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("It is option (a).", "A"),
        ("My answer: b", "B"),
        ("The answer is clearly B", "B"),
        ("B. because A is not there", "B"),
        ("not A", None),
        ("The answer is A. No, B.", None),
        ("B. cat", None),
        ("A dog", "B"),
        ("\\boxed{B}", "B"),
        ("<think>The answer is A.", None),
        ('{"answer": ["A", "B"]}', None),
    ],
)
def test_readings(reply, label):
    assert chosen(reply, ANIMALS) == label


@pytest.mark.parametrize(
    "part", ["A, ", "A or B ", "(", "i think ", "the answer is the ", "dog ", "\\boxed{", "<think>"]
)
def test_a_long_reply_is_read_in_time(part):
    """What models write when they do not stop, 20,000 characters of it."""
    start = time.monotonic()
    chosen(part * (20_000 // len(part)), ANIMALS)
    assert time.monotonic() - start < 5
