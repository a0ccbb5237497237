"""A picture's tokens in Idefics3 and SmolVLM: tiles with their rows and columns in words, then the whole picture."""

import re
from typing import Any

from redvillm_jax.modules.picture_places import Places

AROUND = "<fake_token_around_image>"
SQUARE = "<image>"  # here: all visual tokens of one square


def split_picture_places(tokenizer: Any, tokens: int, grid: tuple[int, int]) -> Places:
    """Places the tokens of the tiles in raster order and of the whole picture, and the text around each.

    tokenizer: an HfTokenizer; tokens: of one square; grid: rows and columns of tiles, (0, 0) for a picture without.
    Source: transformers' Idefics3Processor.
    """
    placed, slot = [], 0
    for piece in re.split(f"({SQUARE})", picture_text(*grid)):
        if piece == SQUARE:
            placed += [(0, slot + i) for i in range(tokens)]
            slot += tokens
        else:
            placed += [(token, -1) for token in tokenizer.encode_behind(piece, plain=False)]
    return Places(placed)


def picture_text(rows: int, cols: int) -> str:
    """Returns the text of a picture of rows × cols tiles, with `SQUARE` in the place of each square's visual tokens."""
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{col}>{SQUARE}" for col in range(1, cols + 1)) for row in range(1, rows + 1)
    ]
    text = "".join(f"{line}\n" for line in lines) + ("\n" if lines else "")
    return f"{text}{AROUND}<global-img>{SQUARE}{AROUND}"
