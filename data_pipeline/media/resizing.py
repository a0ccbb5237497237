"""Makes a square of a frame or picture, without cropping or padding it, by the rule of its image LLM."""

import functools
import re
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.Image import Resampling

Resize = Callable[[np.ndarray, int], np.ndarray]  # (H, W, 3) uint8, S -> (S, S, 3) uint8
LONGEST_EDGE = 4096  # the largest N of "lanczos=N"
RULES = "nearest, bicubic, bilinear or lanczos=N (the longest side of the first of two steps)"


def resize_nearest(frame: np.ndarray, size: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 to (size, size, 3) by nearest neighbour, without keeping the aspect ratio.

    The source index is min(floor(i * in / out), in - 1) in fp32, the default of torch's `interpolate`, which
    Video-ChatGPT uses (load_video in its scripts/save_spatio_temporal_clip_features.py).
    """
    rows, cols = (
        np.minimum(np.arange(size, dtype=np.float32) * (np.float32(n) / np.float32(size)), n - 1).astype(int)
        for n in frame.shape[:2]
    )
    return frame[rows].take(cols, axis=1)


def resize_pil(frame: np.ndarray, size: int, *, resample: Resampling) -> np.ndarray:
    """Resizes (H, W, 3) uint8 to (size, size, 3) by a filter of PIL, without keeping the aspect ratio."""
    return np.asarray(Image.fromarray(frame).resize((size, size), resample))


def resize_lanczos(frame: np.ndarray, size: int, *, longest: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 so that its longest side is `longest`, then to (size, size, 3), both times by Lanczos.

    This is transformers' Idefics3ImageProcessor without image splitting.
    """
    large = Image.fromarray(frame).resize(longest_edge_size(*frame.shape[1::-1], longest), Resampling.LANCZOS)
    return np.asarray(large.resize((size, size), Resampling.LANCZOS))


def longest_edge_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Returns the size (width, height) of a picture whose longest side becomes `longest`; the other side is even.

    The ratio is rounded to float before it is used, as in Idefics3ImageProcessor, because it decides some sizes.
    """
    ratio = width / height
    short = int(longest / ratio) if width >= height else int(longest * ratio)
    short = max(short + short % 2, 1)
    return (longest, short) if width >= height else (short, longest)


RESIZE: dict[str, Resize] = {
    "nearest": resize_nearest,
    "bicubic": functools.partial(resize_pil, resample=Resampling.BICUBIC),
    "bilinear": functools.partial(resize_pil, resample=Resampling.BILINEAR),
}


def resizer(rule: str) -> Resize:
    """Returns the function of a rule: a key of `RESIZE`, or "lanczos=N". Raises ValueError for others."""
    match = re.fullmatch(r"lanczos=([1-9]\d{0,3})", rule)
    if match and int(match[1]) <= LONGEST_EDGE:
        return functools.partial(resize_lanczos, longest=int(match[1]))
    if rule not in RESIZE:
        raise ValueError(f"{rule!r:.80} is no rule, expected {RULES}; N is at most {LONGEST_EDGE}")
    return RESIZE[rule]


def resize_name(text: str) -> str:
    """Returns the name of a rule. Raises ValueError for others."""
    resizer(text)
    return text
