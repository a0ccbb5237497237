"""Places a video's visual tokens in a prompt: their number, their slots, and the text between them."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.settings import ModelSettings
from redvillm_jax.model.weights import abstract_part
from redvillm_jax.video.contract import Layout, Representation, Stream


class VideoPlaces:
    """The positions of a video's visual tokens in a prompt, for each number of frames.

    most: the number of static slots of a video: the tokens of a video with all frames.
    """

    def __init__(self, base: Base, settings: ModelSettings):
        self.video, self.has_text = settings.video, has_text(settings.video)
        projector = abstract_projector(base, settings)
        self.blocks = functools.cache(functools.partial(blocks, self.video, projector, base.config.grid))
        self.most = num_slots(self.blocks(self.video.num_frames))

    def slots(self, num_frames: int) -> list[int]:
        """Returns the static slots that hold a video's visual tokens, in token order."""
        return [slot for block in self.blocks(num_frames) for slot in block.slots]

    def place(self, num_frames: int, seconds: Sequence[float] | None, encode: Callable) -> list[tuple[int, int]]:
        """Returns the video's part of a prompt: (token id, -1) for a text token, (0, slot) for a visual token.

        seconds: the times of the video's frames; only a representation with text needs them. encode: the tokenizer's.
        """
        if not self.has_text:
            return [(0, slot) for slot in self.slots(num_frames)]
        return place_blocks(self.video, self.blocks(num_frames), num_frames, seconds, encode)


def num_picture_tokens(base: Base, settings: ModelSettings) -> int:
    """Returns the number of visual tokens of a picture."""
    return math.prod(abstract_projector(base, settings).token_layout(base.config.grid))


def abstract_projector(base: Base, settings: ModelSettings) -> nnx.Module:
    """Returns a projector with shapes instead of weights."""
    return abstract_part(base.module, "projector", base.config, **settings.projector_options)


def token_layout(projector: nnx.Module, layout: Layout) -> Layout:
    """Returns the layout of the tokens that a projector makes of features in `layout`."""
    if len(layout) == 3:
        return (layout[0], *projector.token_layout(layout[1:]))
    return projector.token_layout(layout)


class Block(NamedTuple):
    """Adjacent tokens: of one frame of a stream, or of a whole stream, whose `frame` is None."""

    stream: str
    frame: int | None
    slots: range


def blocks(video: Representation, projector: nnx.Module, grid: tuple[int, int], num_frames: int) -> list[Block]:
    """Returns the blocks of a video of `num_frames` frames in token order, with the static token slots that they fill.

    projector: any projector of the base, of arrays or shapes; all make the same number of tokens. A stream has the
    slots of a video of T frames; a shorter video fills the first of them.
    """
    found, start = [], 0
    longest = video.order(grid, video.num_frames)
    for stream, long in zip(video.order(grid, num_frames), longest, strict=True):
        frames, count = stream.layout[0] if len(stream.layout) == 3 else 0, num_tokens(video, projector, stream)
        if frames and count % frames == 0:
            ends = range(start, start + count + 1, count // frames)
            found += [Block(stream.name, i, range(*pair)) for i, pair in enumerate(itertools.pairwise(ends))]
        elif count:  # no frames, or `merge` has made tokens that several frames share
            found.append(Block(stream.name, None, range(start, start + count)))
        start += num_tokens(video, projector, long)
    return found


def num_slots(found: list[Block]) -> int:
    """Counts the visual tokens of all blocks."""
    return sum(len(block.slots) for block in found)


def has_text(video: Representation) -> bool:
    """Returns whether a representation puts text between visual tokens; if so, it needs the times of the frames."""
    return type(video).text is not Representation.text


def place_blocks(
    video: Representation, found: list[Block], num_frames: int, seconds: Sequence[float], encode: Callable
) -> list[tuple[int, int]]:
    """Returns the video's part of a prompt: (token id, -1) for a text token, (0, slot) for a visual token.

    seconds: the times of the video's frames. encode: the tokenizer's, text to token ids.
    """
    placed = []
    for stream, frame, slots in found:
        at = None if frame is None else float(seconds[video.frame_of(stream, frame, num_frames)])
        text = video.text(stream, frame, None if at is None or math.isnan(at) else at)
        placed += [(token, -1) for token in encode(text)] if text else []
        placed += [(0, slot) for slot in slots]
    return placed


def num_tokens(video: Representation, projector: nnx.Module, stream: Stream) -> int:
    """Returns the number of a stream's tokens after its projector and `merge`."""
    layout = token_layout(projector, stream.layout)
    if not math.prod(layout):
        return 0
    tokens = jax.ShapeDtypeStruct((1, math.prod(layout), 8), jnp.float32)
    return jax.eval_shape(lambda x: video.merge(stream.name, x, layout), tokens).shape[1]
