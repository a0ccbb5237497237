"""The order of a picture's visual tokens in LLaVA-NeXT and LLaVA-OneVision: the whole picture, then its tiles by rows.

Source: `pack_image_features` in transformers' LlavaNextModel and LlavaOnevisionModel.
"""

import math

import numpy as np

from redvillm_jax.modules.picture_places import Places

REDUCED_ABOVE = 1.1  # times the side of the largest picture that keeps all its tokens
NEWLINE = 0  # the slot of `image_newline`


def any_resolution_places(
    features: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], most: int | None = None
) -> Places:
    """Places the tokens of the whole picture, then those of the tiles, row by row, each row with a newline token.

    The rows and columns of the tiles that show no picture are left out. features: rows and columns of one square's
    tokens; grid: rows and columns of tiles; size: height and width of the picture in pixels; most: above this number of
    squares, the tiles' tokens are reduced to about as many by bilinear interpolation (OneVision's anyres_max_9).
    """
    count = features[0] * features[1]
    whole = 1 + np.arange(count)
    tiles = 1 + np.arange(count, count * (1 + grid[0] * grid[1])).reshape(*grid, *features)
    tiles = unpadded(tiles.swapaxes(1, 2).reshape(grid[0] * features[0], grid[1] * features[1]), size)
    ratio = 0 if most is None else math.sqrt(tiles.size / (most * features[0] ** 2))
    if ratio <= REDUCED_ABOVE:
        rows = np.pad(tiles, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return Places([(0, int(slot)) for slot in (*whole, *rows.flat)])
    shape = tuple(int(length // ratio) for length in tiles.shape)
    (top, bottom, down), (left, right, across) = map(neighbours, tiles.shape, shape)
    corners = [tiles[np.ix_(row, col)] for row in (top, bottom) for col in (left, right)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    newlines = ((0, 0), (0, 1), (0, 0))
    sources = np.pad(np.stack(corners, -1), newlines, constant_values=NEWLINE).reshape(-1, 4)
    weights = np.pad(np.stack(shares, -1), newlines)
    weights[:, -1] = one_source(shape[0])
    sources = np.concatenate([np.repeat(whole[:, None], 4, 1), sources]).astype(np.int32)
    weights = np.concatenate([one_source(count), weights.reshape(-1, 4)]).astype(np.float32)
    return Places([(0, slot) for slot in range(len(sources))], sources, weights)


def one_source(count: int) -> np.ndarray:
    """The weights (count, 4) of tokens that are the first of their sources."""
    return np.tile(np.array([1, 0, 0, 0], np.float32), (count, 1))


def unpadded(tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Leaves out the rows or columns of (rows, cols) that show no part of a picture of a size (height, width).

    As many go on both sides; one more may stay, as in the original's `unpad_image`.
    """
    (height, width), (rows, cols) = size, tiles.shape
    if width / height > cols / rows:
        empty = (rows - int(round(height * (cols / width), 7))) // 2
        return tiles[empty : rows - empty]
    empty = (cols - int(round(width * (rows / height), 7))) // 2
    return tiles[:, empty : cols - empty]


def neighbours(length: int, shorter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two neighbours of each of `shorter` points on a line of `length`, and the second one's weight.

    Points are the middles of equal parts, as in torch's `interpolate` without `align_corners`; fp32, as torch computes.
    """
    step = np.float32(length) / np.float32(shorter)
    places = np.maximum(step * (np.arange(shorter, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    first = places.astype(int)
    return first, np.minimum(first + 1, length - 1), places - first
