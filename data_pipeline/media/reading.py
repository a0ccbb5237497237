"""A video, a part of a video or a picture that a question is about, read into the arrays of a model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.media.decode import read_video
from data_pipeline.media.pictures import read_picture, read_tiles
from data_pipeline.media.sampling import Part, checked_part
from data_pipeline.media.tiles import Cut


@dataclass(frozen=True)
class Clip:
    """The path of a video, and optionally the seconds of it that a question is about. Raises UserError for others."""

    path: str | Path
    part: Part | None = None

    def __post_init__(self):
        check_path(self.path, "a video")
        if self.part is not None:
            try:
                object.__setattr__(self, "part", checked_part(self.part))
            except ValueError as error:
                raise UserError(f"{self.path}: {error}") from None


@dataclass(frozen=True)
class Picture:
    """The path of a picture. Raises UserError for anything else."""

    path: str | Path

    def __post_init__(self):
        check_path(self.path, "a picture")


def check_path(path: str | Path, what: str) -> None:
    """Raises UserError unless `path` can be the path of a file."""
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"{path!r:.200}: expected the path of {what}")


class Reading(NamedTuple):
    """How a model needs its media: see `decode.read_video` and, for `fit`, `pictures.read_picture` and `read_tiles`."""

    num_frames: int
    image_size: int
    resize: str
    sampling: str
    fit: str | Cut


def read_media(reading: Reading, media: Clip | Picture) -> dict[str, np.ndarray]:
    """Reads a video as {"frames": (num_frames, S, S, 3) uint8, zeros after the real frames; "num_frames": () int32;
    "seconds": (n,) float32, the times of the real frames}.

    A picture becomes {"pictures": (S, S, 3) uint8}, or the arrays of `pictures.read_tiles`. Raises UserError.
    """
    if not os.path.isfile(media.path):
        raise UserError(f"{media.path}: no such file")
    if isinstance(media, Picture):
        if isinstance(reading.fit, str):
            return {"pictures": read_picture(media.path, reading.image_size, reading.fit)}
        return read_tiles(media.path, reading.image_size, reading.fit)
    *settings, _ = reading._asdict().items()
    video = read_video(media.path, **dict(settings), part=media.part)
    frames = video.frames
    padded = np.zeros((reading.num_frames, *frames.shape[1:]), frames.dtype)
    padded[: len(frames)] = frames
    return {"frames": padded, "num_frames": np.int32(len(frames)), "seconds": video.timestamps}


def try_media(reading: Reading, media: Clip | Picture) -> dict[str, np.ndarray] | UserError:
    """Calls `read_media` and returns its error instead of raising it."""
    try:
        return read_media(reading, media)
    except UserError as error:
        return error


def lost_media(media: Clip | Picture, reason: str) -> UserError:
    """The result for a file whose reading process crashed or reached a time limit."""
    return UserError(f"{media.path}: the process that read it {reason}")
