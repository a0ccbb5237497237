"""Exact match and token F1 of short answers, English and Chinese."""

import re
import unicodedata
from collections import Counter

ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3400-\u9fff\uf900-\ufaff])\w)+(?:[.:]\d+)*")


def words(text: str) -> list[str]:
    """A text's words in lower case without punctuation; a Chinese character is a word, and so are 2.5 and 3:30."""
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("’", "")
    return _WORD.findall(text)


def tokens(text: str) -> list[str]:
    """The words without English articles. A text without other words is one token."""
    kept = [word for word in words(text) if word not in ARTICLES]
    return kept or [text.strip().lower()] * bool(text.strip())


def exact_match(prediction: str, answer: str) -> float:
    """1 when the tokens are the same in the same order, else 0."""
    return float(tokens(prediction) == tokens(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of the shares of common tokens, with repetitions, in both texts."""
    ours, theirs = Counter(tokens(prediction)), Counter(tokens(answer))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0
