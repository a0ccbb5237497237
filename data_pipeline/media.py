"""What is asked about, a part of a video or a picture, and the arrays that a model takes of it."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.pictures import read_picture
from data_pipeline.sampling import Part
from data_pipeline.videos import read_video


class Clip(NamedTuple):
    """The path of a video, and the seconds of it that a question is about."""

    path: str | Path
    part: Part | None = None


class Picture(NamedTuple):
    """The path of a picture."""

    path: str | Path


class Reading(NamedTuple):
    """How a model wants to have them: see `videos.read_video` and, for `fit`, `pictures.read_picture`."""

    num_frames: int
    image_size: int
    resize: str
    sampling: str
    fit: str


def read_media(reading: Reading, media: Clip | Picture) -> dict[str, np.ndarray]:
    """Reads a video as {"frames": (num_frames, S, S, 3) uint8, zeros behind the real ones; "num_frames": () int32}.

    A picture becomes {"pictures": (S, S, 3) uint8}. Raises UserError.
    """
    if not os.path.isfile(media.path):
        raise UserError(f"{media.path}: no such file")
    if isinstance(media, Picture):
        return {"pictures": read_picture(media.path, reading.image_size, reading.fit)}
    *settings, _ = reading._asdict().items()
    frames = read_video(media.path, **dict(settings), part=media.part).frames
    padded = np.zeros((reading.num_frames, *frames.shape[1:]), frames.dtype)
    padded[: len(frames)] = frames
    return {"frames": padded, "num_frames": np.int32(len(frames))}


def try_media(reading: Reading, media: Clip | Picture) -> dict[str, np.ndarray] | UserError:
    """The same, with the error as the result."""
    try:
        return read_media(reading, media)
    except UserError as error:
        return error


def lost_media(media: Clip | Picture, reason: str) -> UserError:
    """What stands for a file whose reading process was ended, by itself or by a time limit."""
    return UserError(f"{media.path}: the process that read it {reason}")
