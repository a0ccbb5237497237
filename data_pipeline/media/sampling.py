"""Chooses the frames of a video that are kept, by their indices in presentation order."""

import re
from typing import Any

import numpy as np

UNIFORM = "uniform"
MICROSECOND = 1e-6  # times closer than this count as equal
Part = tuple[float, float]  # (start, end) in seconds from a video's first frame, without the end itself


def checked_part(part: Any) -> Part:
    """A part of a video as two floats. Raises ValueError unless it is two numbers, 0 <= start < end < 1e9."""
    pair = part if isinstance(part, tuple | list) and len(part) == 2 else (None, None)
    if not all(type(x) in (int, float) for x in pair) or not 0 <= pair[0] < pair[1] < 1e9:
        raise ValueError(f"{part!r:.80} is no part of a video, expected (start, end) in seconds, 0 <= start < end")
    return float(pair[0]), float(pair[1])


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Returns the indices (n,) int64 of n = min(total, num_frames) frames spread evenly over a video.

    This is Video-ChatGPT's rule (get_seq_frames in its scripts/save_spatio_temporal_clip_features.py).
    """
    n = min(total, num_frames)
    bounds = np.round((total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return (bounds[:-1] + bounds[1:]) // 2  # when total <= num_frames, one index comes twice and the last never


def sampling_name(text: str) -> str:
    """The canonical name of a rule: "uniform", "fps=F" (frames a second) or "every=N". Raises ValueError for others."""
    match = re.fullmatch(r"(fps|every)=(\d+\.?\d*|\.\d+)", text)
    if text == UNIFORM or match is None:
        if text != UNIFORM:
            raise ValueError(f"{text!r} is no rule, expected uniform, fps=F or every=N, e.g. fps=1, every=8")
        return text
    rule, value = match[1], float(match[2])
    if value == 0 or (rule == "every" and value % 1):
        raise ValueError(f"{text!r}: expected {'more than 0 frames a second' if rule == 'fps' else 'a whole number'}")
    return f"{rule}={value:g}"


def choose_frames(times: np.ndarray, sampling: str, num_frames: int, part: Part | None = None) -> np.ndarray:
    """Returns the indices (n,) int64, 1 <= n <= num_frames, ascending, of the frames that a rule keeps.

    times: (total,) seconds from the first frame, in presentation order; NaN is allowed without "fps=F" and `part`.
    "fps=F" keeps the frame that is shown at every 1/F s, "every=N" each N-th frame. When a rule gives more than
    num_frames, `uniform_indices` chooses num_frames of them. Raises ValueError when times are needed and unknown, or
    the part has no frame.
    """
    rule, _, value = sampling.partition("=")
    first, stop = 0, len(times)
    if part is not None or rule == "fps":
        if np.isnan(times).any():
            raise ValueError("has neither timestamps nor a frame rate")
        times = np.maximum.accumulate(times)  # a damaged file's may go back
    if part is not None:
        first, stop = frames_of_part(times, part)
    if rule == UNIFORM:
        return first + uniform_indices(stop - first, num_frames)
    if rule == "every":
        count, step = -(-(stop - first) // int(value)), int(value)
    else:
        begin, end = (times[0], times[-1]) if part is None else (part[0], min(part[1] - 2 * MICROSECOND, times[-1]))
        count = int((end - begin + MICROSECOND) * float(value)) + 1
    places = np.arange(count) if count <= num_frames else uniform_indices(count, num_frames)
    if rule == "every":
        return first + places * step
    shown = np.searchsorted(times, begin + places / float(value) + MICROSECOND, side="right") - 1
    return np.clip(shown, first, stop - 1)


def frames_of_part(times: np.ndarray, part: Part) -> tuple[int, int]:
    """Returns (first, stop), the range of the frames that are shown at some moment of the part.

    times: (total,) seconds, ascending. The last frame of the video is shown as long as the one before it. Raises
    ValueError when the video ends before the part.
    """
    start, end = part
    last_shown = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1)
    if start >= last_shown - MICROSECOND:
        raise ValueError(f"ends after {last_shown:.2f} s, before the part from {start:g} to {end:g} s")
    first = int(np.searchsorted(times, start + MICROSECOND, side="right")) - 1
    stop = int(np.searchsorted(times, end - MICROSECOND, side="left"))
    return max(first, 0), max(stop, first + 1)
