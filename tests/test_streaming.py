"""Text in pieces: characters that span tokens, white space at the ends."""

import pytest
from conftest import EVERY_FAMILY

from redvillm_jax.bases.contract import load_family
from redvillm_jax.inference.streaming import pieces

TEXTS = ["  A dog runs. \n", "一只狗🐕在奔跑。", "naïve café — 你好 ", "", " \n "]


def by_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text):
    shown = list(pieces(by_bytes, text.encode()))
    assert "".join(shown) == text.strip()
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    assert all(shown)
    assert not text.strip() or len(shown) > 5  # it does come in pieces


def test_bytes_that_are_no_text_are_shown_at_the_end():
    broken = "狗".encode()[:2]
    assert "".join(pieces(by_bytes, b"a" + broken)) == by_bytes(b"a" + broken)
    assert "".join(pieces(by_bytes, b"a" + broken + b"b")) == by_bytes(b"a" + broken + b"b")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_bases_tokenizers_stream(family, bases):
    tokenizer = load_family(family).Tokenizer(bases[family])
    text = "The dog runs 🐕 to the left. 龘"
    ids = tokenizer.encode(text)
    shown = list(pieces(tokenizer.decode, ids))
    assert "".join(shown) == tokenizer.decode(ids).strip()
    assert len(shown) > 5
