"""The frames of a video file: which ones, how they are decoded, how they are resized."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_pipeline.errors import UserError


class VideoError(UserError):
    """A file that gives no frames; the message is its path and the reason."""


@dataclass(frozen=True)
class Video:
    """What is kept of one video file.

    frames: (n, S, S, 3) uint8 RGB. timestamps: (n,) float32, seconds from the first frame, NaN where the file
    has neither timestamps nor a frame rate. total_frames: how many the file really has. duration (seconds) and
    fps: the container's own, None where it has none. width, height: of the first frame, before resizing.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    total_frames: int
    duration: float | None
    fps: float | None
    width: int
    height: int


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Returns the indices (n,) int64 of n = min(total, num_frames) frames spread evenly over a video.

    Video-ChatGPT's rule: the middles of n equal segments whose bounds are rounded half to even. When
    `total <= num_frames` one index comes twice and the last frame never.
    """
    n = min(total, num_frames)
    bounds = np.round((total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return (bounds[:-1] + bounds[1:]) // 2


def resize_nearest(frame: np.ndarray, size: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 to (size, size, 3), nearest neighbour, aspect ratio not kept.

    The source index is min(floor(i * in / out), in - 1) in fp32: the default of torch's `interpolate`, which
    Video-ChatGPT uses.
    """
    rows, cols = (
        np.minimum(np.arange(size, dtype=np.float32) * (np.float32(n) / np.float32(size)), n - 1).astype(int)
        for n in frame.shape[:2]
    )
    return frame[rows[:, None], cols]


def resize_bicubic(frame: np.ndarray, size: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8 to (size, size, 3) as Qwen-VL does: PIL's bicubic, aspect ratio not kept."""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))


RESIZE: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "nearest": resize_nearest,
    "bicubic": resize_bicubic,
}


def read_video(path: str | Path, *, num_frames: int, image_size: int, resize: str, threads: int = 0) -> Video:
    """Decodes a file and keeps at most `num_frames` frames, chosen by `uniform_indices`, resized to a square.

    Frames are counted in presentation order while decoding, because a container's own count may be missing or
    wrong: when it is, the file is decoded a second time. Memory holds the kept frames only. `resize`: a key of
    `RESIZE`. `threads`: the decoder's, 0 = its own choice. Raises VideoError.
    """
    expected = 0
    for _ in range(2):
        frames, times, total = {}, {}, 0
        with _open(path, threads) as (container, stream):
            expected = expected or stream.frames  # 0 = the container does not say
            duration, fps = _duration(container, stream), stream.average_rate
            indices = uniform_indices(expected, num_frames).tolist() if expected else []
            wanted = set(indices)
            to_rgb = VideoReformatter()  # kept for the whole file: making one costs as much as a small frame
            for frame in container.decode(stream):
                if total == 0:
                    width, height, start = frame.width, frame.height, frame.time
                if total in wanted:
                    rgb = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                    frames[total] = RESIZE[resize](rgb, image_size)
                    times[total] = _seconds(frame, start, total, fps)
                total += 1
        if total == 0:
            raise VideoError(f"{path}: has no frame")
        if total == expected:
            break
        expected = total
    else:
        raise VideoError(f"{path}: gives another number of frames at each reading")
    return Video(
        frames=np.stack([frames[i] for i in indices]),
        timestamps=np.array([times[i] for i in indices], np.float32),
        total_frames=total,
        duration=duration,
        fps=float(fps) if fps else None,
        width=width,
        height=height,
    )


@contextlib.contextmanager
def _open(path: str | Path, threads: int) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its best video stream; whatever FFmpeg says against it becomes a VideoError."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise VideoError(f"{path}: has no video stream")
            if stream.codec_context is None:
                raise VideoError(f"{path}: its video codec is not supported")
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded: {error.strerror}") from error


def _seconds(frame: av.VideoFrame, start: float | None, index: int, fps: Fraction | None) -> float:
    """Seconds from the first frame, from the frame rate where the file has no timestamps."""
    if frame.time is not None and start is not None:
        return frame.time - start
    return float(index / fps) if fps else math.nan


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None
