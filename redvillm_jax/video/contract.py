"""What a video representation is, and how one is found.

A representation is a module with three names: FIELDS, the fields of the config that belong to it; GROUPS, the optimizer
groups that have a learning rate of their own; and Video, a frozen dataclass below `Representation` with these fields.
The module lies in this folder or anywhere else: `config.video` may be the dotted path of a module of your own.
"""

import dataclasses
import hashlib
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.common.errors import UserError, did_you_mean
from redvillm_jax.modules.bounds import Bound

EFFECTS = ("streams", "tokens", "start", "training")
STARTS = ("image", "copy", "random")
TAKEN = (  # names of other arrays of stores and batches
    *("frames", "num_frames", "video", "videos", "timestamps", "seconds", "pictures"),
    *("token_ids", "position_ids", "group_ids", "question_ids", "video_tokens"),
    *("target_slots", "target_ids", "target_weights", "target_questions"),
)

Layout = tuple[int, ...]


class Field(NamedTuple):
    """A field of the config that belongs to a representation.

    effect: what the field decides. "streams": the pooled features, which are stored, and so the answers. "tokens": what
    is made of them, and so the answers. "start": the weights that training starts from. "training": what trains.
    """

    default: Any
    bound: Bound
    effect: str


class Stream(NamedTuple):
    """A stream of pooled features on its way to the language model.

    name: one of those that `pool` returns. projector: a name of `projectors`. layout: how its features lie, in raster
    order: (length,) of a sequence, (rows, cols) of a picture, (frames, rows, cols) where the projector is applied to
    each frame alone.
    """

    name: str
    projector: str
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Representation:
    """The contract: from the frames of a video to its visual tokens. Every method of it is a pure function.

    num_frames: how many frames a video has at most (`config.num_frames`). B videos, T = num_frames frames, P pictures
    that the encoder sees, a grid of (rows, cols) features of width D for each, tokens of width K.
    """

    num_frames: int

    # ---- what every representation says

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        """Features of pictures -> streams by name, without parameters: this is what `redvillm_jax.encode` stores.

        features: (B, P, rows, cols, D); num_frames: (B,) int32, how many of the T frames are real (0: no video).
        Returns {name: (B, M, D)}, M for a video of T frames; a shorter one has its features first.
        """
        raise NotImplementedError

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        """The streams in token order, with their layouts for a video of `num_frames` frames.

        Names and projectors are the same for every number of frames from 0 to T. grid: (rows, cols) of a picture.
        """
        raise NotImplementedError

    def projectors(self) -> dict[str, str]:
        """What each projector starts from, by name.

        "image": the projector of the image LLM, of which there is one at most; pictures go through it. "copy": a copy
        of it. "random": the same module with random weights. A projector has the same name in checkpoints, and is the
        optimizer group of that name. An extra module of the stream with the image projector's name serves pictures,
        too.
        """
        raise NotImplementedError

    # ---- what a representation may say

    def arrange(self, frames: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Frames (B, T, H, W, 3) uint8 -> the pictures that the encoder sees, (B, P, H, W, 3) uint8."""
        return frames

    def merge(self, name: str, tokens: jax.Array, layout: Layout) -> jax.Array:
        """Tokens (B, N, K) of a stream behind its projector -> fewer tokens (B, N', K).

        layout: how the tokens lie: (length,), (rows, cols) or (frames, rows, cols), for a video of T frames. The tokens
        that a shorter video has must come first and depend on its own frames alone.
        """
        return tokens

    def text(self, name: str, frame: int | None, seconds: float | None) -> str:
        """The text that stands before a stream's tokens, or, for a layout with frames, before those of each frame.

        frame: counted from 0 within the stream, None for a stream without frames. seconds: when the frame is shown that
        `frame_of` names, from the first frame on; None where the file does not say, or for a stream without frames.
        """
        return ""

    def frame_of(self, name: str, frame: int, num_frames: int) -> int:
        """Which of a video's `num_frames` frames is frame number `frame` of a stream; its time is given to `text`."""
        return frame

    def trained(self) -> tuple[str, ...]:
        """The projectors that train; the others stay as they start."""
        return tuple(self.projectors())

    def extra(self, name: str) -> type[nnx.Module] | None:
        """A module with random weights behind the projector of a stream: built with (features, rngs=), it maps K to K.

        Its attribute SHARDING says how its weights lie on the mesh. It always trains, in the optimizer group
        "extra_mlp".
        """
        return None

    def problem(self, sampling: str, grid: tuple[int, int] | None) -> str:
        """Why the fields do not go together with each other, the sampling rule or the base's grid; "" if they do.

        grid: None where the base is not known yet.
        """
        return ""


# ---- choosing frames


def spread(num_frames: jax.Array, count: int, *, repeat: bool = False) -> jax.Array:
    """Numbers (B, count) int32 of frames at equal distances: floor(i n / count) for i = 0, 1, …

    num_frames: (B,) int32. Of n < count frames each comes once and stands first, or with `repeat` some come twice.
    """
    index, n = jnp.arange(count), num_frames[:, None]
    among = count if repeat else jnp.clip(n, 1, count)
    return jnp.clip(index * n // among, 0, jnp.maximum(n - 1, 0)).astype(jnp.int32)


def take_frames(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Frames or their features (B, T, ...) by their numbers (B, count) -> (B, count, ...)."""
    return jnp.take_along_axis(x, numbers.reshape(*numbers.shape, *[1] * (x.ndim - 2)), axis=1)


# ---- what follows from the contract


def stream_shapes(video: Representation, grid: tuple[int, int], width: int, image_size: int) -> dict[str, tuple]:
    """The shape (M, D) of each pooled stream of a video, for features of `width` on a `grid`."""
    frames = jax.ShapeDtypeStruct((1, video.num_frames, image_size, image_size, 3), jnp.uint8)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    pictures = jax.eval_shape(video.arrange, frames, count).shape[1]
    features = jax.ShapeDtypeStruct((1, pictures, *grid, width), jnp.float32)
    return {name: x.shape[1:] for name, x in jax.eval_shape(video.pool, features, count).items()}


def what_does_not_fit(video: Representation, grid: tuple[int, int], shapes: Mapping[str, tuple]) -> str:
    """Why a representation contradicts itself on this grid; "" if it does not. shapes: those of `stream_shapes`."""
    longest = video.order(grid, video.num_frames)
    for n in (0, 1):
        if [stream[:2] for stream in video.order(grid, n)] != [stream[:2] for stream in longest]:
            return f"order gives other streams or projectors for {n} frames than for {video.num_frames}"
    for name, projector, layout in longest:
        if name in TAKEN:
            return f"a stream is called {name}, as is another array of a batch; choose another name"
        if projector not in video.projectors():
            return f"stream {name} goes through {projector!r}, projectors has {', '.join(video.projectors())}"
        if name not in shapes:
            return f"order has the stream {name}, pool gives {', '.join(shapes)}"
        if shapes[name][0] != math.prod(layout):
            return (
                f"pool gives the stream {name} {shapes[name][0]} features, its layout {layout} has {math.prod(layout)}"
            )
    if unknown := set(video.projectors().values()) - set(STARTS):
        return f"a projector starts from {min(unknown)!r}, expected one of {', '.join(STARTS)}"
    return ""


def image_projector(video: Representation) -> str | None:
    """The name of the projector that is the image LLM's own."""
    return next((name for name, start in video.projectors().items() if start == "image"), None)


def export_name(video: Representation, projector: str) -> str | None:
    """The name of a projector in exports; None for the image LLM's own, which keeps its published names."""
    return None if video.projectors()[projector] == "image" else projector


def has_random_start(video: Representation, grid: tuple[int, int]) -> bool:
    """Whether some weights start random, so that a seed decides them."""
    extras = [video.extra(stream.name) for stream in video.order(grid, video.num_frames)]
    return "random" in video.projectors().values() or any(extras)


def num_features(video: Representation, grid: tuple[int, int], index: int) -> list[int]:
    """How many features stream number `index` has in a video of 0, 1, … T frames."""
    return [math.prod(video.order(grid, n)[index].layout) for n in range(video.num_frames + 1)]


def token_layout(projector: nnx.Module, layout: Layout) -> Layout:
    """How the tokens lie that a projector makes of features in `layout`."""
    if len(layout) == 3:
        return (layout[0], *projector.token_layout(layout[1:]))
    return projector.token_layout(layout)


class Block(NamedTuple):
    """Tokens that stand together: those of a stream, or of one frame of it. frame: None for a stream without frames."""

    stream: str
    frame: int | None
    slots: range


def blocks(video: Representation, projector: nnx.Module, grid: tuple[int, int], num_frames: int) -> list[Block]:
    """Which of a video's static token slots hold its tokens, when it has `num_frames` frames, in token order.

    projector: one of the base, arrays or shapes, all of which make as many tokens. A stream's slots are those of a
    video of T frames; the tokens of a shorter one stand first in them.
    """
    found, start = [], 0
    longest = video.order(grid, video.num_frames)
    for stream, long in zip(video.order(grid, num_frames), longest, strict=True):
        parts = stream.layout[0] if len(stream.layout) == 3 else 1
        count = num_tokens(video, projector, stream)
        size = count // max(parts, 1)
        for part in range(parts):
            at = start + part * size
            if size:
                found.append(Block(stream.name, part if len(stream.layout) == 3 else None, range(at, at + size)))
        start += num_tokens(video, projector, long)
    return found


def num_slots(found: list[Block]) -> int:
    """How many visual tokens blocks have together."""
    return sum(len(block.slots) for block in found)


def has_text(video: Representation) -> bool:
    """Whether text may stand between the visual tokens, which then needs the times of frames."""
    return type(video).text is not Representation.text


def place_blocks(
    video: Representation, found: list[Block], num_frames: int, seconds: Sequence[float], encode: Callable
) -> list[tuple[int, int]]:
    """What stands in a prompt where the video stands: (token id, -1) for text, (0, slot) for a visual token.

    seconds: the times of the video's frames; encode: text -> token ids.
    """
    placed = []
    for stream, frame, slots in found:
        at = None if frame is None else float(seconds[video.frame_of(stream, frame, num_frames)])
        text = video.text(stream, frame, None if at is None or math.isnan(at) else at)
        placed += [(token, -1) for token in encode(text)] if text else []
        placed += [(0, slot) for slot in slots]
    return placed


def num_tokens(video: Representation, projector: nnx.Module, stream: Stream) -> int:
    """How many tokens a stream has behind its projector and `merge`."""
    layout = token_layout(projector, stream.layout)
    if not math.prod(layout):
        return 0
    tokens = jax.ShapeDtypeStruct((1, math.prod(layout), 8), jnp.float32)
    return jax.eval_shape(lambda x: video.merge(stream.name, x, layout), tokens).shape[1]


# ---- finding one


def known_videos() -> list[str]:
    """The representations of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "contract"))


def load_video(name: str) -> ModuleType:
    """The module of a representation: a name of this folder, or a dotted path.

    Raises UserError for a name that is not known, a module that cannot be imported, and one that lacks something.
    """
    known = known_videos()
    if name not in known and not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)+", name)):
        near = did_you_mean(str(name), known)
        raise UserError(
            f"config.video is {name!r}, expected one of {', '.join(known)}, or the dotted path of a module{near}"
        )
    try:
        module = importlib.import_module(f"redvillm_jax.video.{name}" if name in known else name)
    except Exception as error:
        raise UserError(
            f"config.video={name}: cannot be imported ({type(error).__name__}: {error}); the folder that holds it must "
            "be in PYTHONPATH or be the current one"
        ) from error
    if missing := what_is_wrong(module):
        raise UserError(f"config.video={name}: {missing} (redvillm_jax/video/contract.py says what is needed)")
    return module


def what_is_wrong(module: ModuleType) -> str:
    """Why a module is no representation; "" if it is one."""
    fields, kind = getattr(module, "FIELDS", None), getattr(module, "Video", None)
    if not isinstance(fields, Mapping) or not all(isinstance(field, Field) for field in fields.values()):
        return "has no FIELDS, a dict of names and contract.Field"
    if not isinstance(getattr(module, "GROUPS", None), tuple):
        return "has no GROUPS, a tuple with the names of its optimizer groups"
    if not (isinstance(kind, type) and issubclass(kind, Representation) and dataclasses.is_dataclass(kind)):
        return "has no dataclass Video below contract.Representation"
    if unlike := {field.name for field in dataclasses.fields(kind)} ^ {"num_frames", *fields}:
        return f"only one of FIELDS and its Video has the field {min(unlike)}"
    if lacking := [name for name in ("pool", "order", "projectors") if name not in dir_of(kind)]:
        return f"its Video lacks the method {lacking[0]}"
    for name, field in fields.items():
        if field.effect not in EFFECTS:
            return f"field {name} has the effect {field.effect!r}, expected one of {', '.join(EFFECTS)}"
        if expected := field.bound(field.default):
            return f"field {name} has the default {field.default!r}, expected {expected}"
    return ""


def dir_of(kind: type) -> set[str]:
    """The names that a class below `Representation` defines itself, or inherits from another one below it."""
    return {name for one in kind.__mro__ if one not in (Representation, object) for name in vars(one)}


def make_video(name: str, config: Mapping[str, Any]) -> Representation:
    """The representation `name` with its fields of a config, and `config["num_frames"]`."""
    module = load_video(name)
    return module.Video(**{field: config[field] for field in ("num_frames", *module.FIELDS)})


def fields_with(name: str, video: Representation, *effects: str) -> dict[str, Any]:
    """The fields of the representation `name` with one of these effects, and their values."""
    return {key: getattr(video, key) for key, field in load_video(name).FIELDS.items() if field.effect in effects}


def pooling_fields(name: str, video: Representation) -> dict[str, Any]:
    """What the pooled streams depend on: the representation, its fields about them, and, from outside, its code."""
    module, found = load_video(name), {"video": name} | fields_with(name, video, "streams")
    if name not in known_videos():
        found["video_code"] = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return found
