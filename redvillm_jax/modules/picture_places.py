"""What stands in a prompt for a picture: visual tokens, and the text between them."""

from typing import Any, NamedTuple

import numpy as np

Placed = list[tuple[int, int]]  # (token id, -1) for a text token, (0, slot) for a visual token


class Places(NamedTuple):
    """A picture's part of a prompt.

    placed: its tokens in order. A slot counts in the table of the picture's tokens: the language model's
    `image_newline`, where it has one, and then the tokens of each square. sources, weights: (slots, 4) int32 and
    float32, or None. Where they are given, a slot counts in them, and its token is the weighted sum of the table's
    tokens `sources`.
    """

    placed: Placed
    sources: np.ndarray | None = None
    weights: np.ndarray | None = None


def whole_picture(
    tokenizer: Any, config: Any, tokens: int, grid: tuple[int, int] | None, size: tuple[int, int] | None
) -> Places:
    """The places of a picture that is one square: its tokens in their own order."""
    return Places([(0, slot) for slot in range(tokens)])
