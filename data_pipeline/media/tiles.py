"""Cuts a picture into tiles, as image LLMs do that see a large picture as several squares."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from data_pipeline.media.resizing import longest_edge_size


class AnyResolution(NamedTuple):
    """LLaVA-NeXT's and OneVision's cut: the whole picture, squashed, then tiles of the picture in its best resolution.

    resolutions: (height, width) in pixels, multiples of the tiles' side. The picture keeps its ratio, and black fills
    the rest. Source: transformers' LlavaNextImageProcessor.
    """

    resolutions: tuple[tuple[int, int], ...]


class LongestSide(NamedTuple):
    """Idefics3's and SmolVLM's cut: tiles of the picture with its longest side enlarged, then the whole, squashed.

    longest: in pixels. Both sides become multiples of the tiles' side. Source: transformers' Idefics3ImageProcessor.
    """

    longest: int


class Tiles(NamedTuple):
    """The squares of one picture.

    squares: (n, S, S, 3) uint8, the whole picture among them. grid: rows and columns of the others, (0, 0) without
    others.
    """

    squares: np.ndarray
    grid: tuple[int, int]


Cut = AnyResolution | LongestSide


def cut_picture(picture: Image.Image, side: int, cut: Cut) -> Tiles:
    """Cuts a picture into tiles of `side` pixels."""
    return any_resolution(picture, side, cut) if isinstance(cut, AnyResolution) else longest_side(picture, side, cut)


def most_squares(side: int, cut: Cut) -> int:
    """Returns the largest number of squares of any picture."""
    if isinstance(cut, AnyResolution):
        return 1 + max(height * width for height, width in cut.resolutions) // side**2
    most = math.ceil((cut.longest + cut.longest % 2) / side) ** 2  # the shorter side may be rounded to one more pixel
    return 1 if most == 1 else 1 + most


def tile_grid(height: int, width: int, side: int, cut: Cut) -> tuple[int, int]:
    """Returns the rows and columns of the tiles of a picture of a size in pixels, (0, 0) without tiles."""
    if isinstance(cut, AnyResolution):
        high, wide = best_resolution(height, width, cut.resolutions)
        return high // side, wide // side
    wide, high = tiled_size(*longest_edge_size(width, height, cut.longest), side)
    return (0, 0) if high == wide == side else (high // side, wide // side)


def any_resolution(picture: Image.Image, side: int, cut: AnyResolution) -> Tiles:
    """See `AnyResolution`; the whole picture comes first."""
    width, height = picture.size
    grid = tile_grid(height, width, side, cut)
    high, wide = grid[0] * side, grid[1] * side
    if wide / width < high / height:
        fitted = (wide, min(math.ceil(height * (wide / width)), high))
    else:
        fitted = (min(math.ceil(width * (high / height)), wide), high)
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(picture.resize(fitted, Resampling.BICUBIC), ((wide - fitted[0]) // 2, (high - fitted[1]) // 2))
    whole = picture.resize((side, side), Resampling.BICUBIC)
    return Tiles(np.stack([np.asarray(whole), *split(np.asarray(canvas), side)]), grid)


def best_resolution(height: int, width: int, resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Returns the resolution that keeps most pixels of a picture, of several the smallest, then the first."""

    def kept_and_empty(resolution: tuple[int, int]) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - high * wide

    return max(resolutions, key=kept_and_empty)


def longest_side(picture: Image.Image, side: int, cut: LongestSide) -> Tiles:
    """See `LongestSide`; the whole picture comes last. It is the only square when it fits one."""
    large = picture.resize(longest_edge_size(*picture.size, cut.longest), Resampling.LANCZOS)
    large = large.resize(tiled_size(*large.size, side), Resampling.LANCZOS)
    whole = np.asarray(large.resize((side, side), Resampling.LANCZOS))
    grid = tile_grid(*picture.size[::-1], side, cut)
    tiles = split(np.asarray(large), side) if grid != (0, 0) else ()
    return Tiles(np.stack([*tiles, whole]), grid)


def tiled_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns the size (width, height) of a picture whose sides are rounded up to multiples of `side`.

    The longer side is rounded first, and decides the shorter one by the ratio.
    """
    ratio = width / height
    if width >= height:
        wide = math.ceil(width / side) * side
        return wide, math.ceil(int(wide / ratio) / side) * side
    high = math.ceil(height / side) * side
    return math.ceil(int(high * ratio) / side) * side, high


def split(pixels: np.ndarray, side: int) -> np.ndarray:
    """Splits (rows * side, cols * side, 3) into tiles (rows * cols, side, side, 3) in raster order."""
    rows, cols = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(rows * cols, side, side, 3)
