"""The contract of a video representation, and the loader that finds one by name.

A representation is a module with three names: FIELDS, its fields of the config; GROUPS, its optimizer groups, each with
a learning rate of its own; and Video, a frozen subclass of `Representation` with these fields. `config.video` is the
name of a module in this folder, or the dotted path of a module of your own.
"""

import dataclasses
import hashlib
import importlib
import math
import re
from collections.abc import Mapping
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
EXTRA_GROUP = "extra_mlp"  # the optimizer group of all extra modules
TAKEN = (  # names of other arrays of stores and batches
    *("frames", "num_frames", "video", "videos", "timestamps", "seconds", "pictures"),
    *("token_ids", "position_ids", "group_ids", "question_ids", "video_tokens"),
    *("target_slots", "target_ids", "target_weights", "target_questions"),
)

Layout = tuple[int, ...]


class Field(NamedTuple):
    """A config field of a representation.

    effect: the part of the model that the field changes. "streams": the pooled features, which encode stores, and the
    answers. "tokens": the visual tokens made of them, and the answers. "start": the weights at the start of training.
    "training": the choice of weights that train.
    """

    default: Any
    bound: Bound
    effect: str


class Stream(NamedTuple):
    """A stream of pooled features on its way to the language model.

    name: a key of the dict that `pool` returns. projector: a key of `projectors`. layout: the shape in which its
    features lie, in raster order: (length,) for a sequence, (rows, cols) for a picture, (frames, rows, cols) when the
    projector is applied to each frame alone.
    """

    name: str
    projector: str
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Representation:
    """The contract: from the frames of a video to its visual tokens. Every method is a pure function.

    num_frames: the largest number of frames of a video (`config.num_frames`). In shapes: B videos, T = num_frames
    frames, P pictures for the encoder, (rows, cols) the grid of features of a picture, D their width, K the width of a
    token.
    """

    num_frames: int

    # ---- methods that every representation defines

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        """Pools features of pictures to streams, without parameters; `redvillm_jax.encode` stores the streams.

        features: (B, P, rows, cols, D); num_frames: (B,) int32, the number of real frames among the T (0: no video).
        Returns {name: (B, M, D)}; M is for a video of T frames, a shorter video has its features first.
        """
        raise NotImplementedError

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        """Returns the streams in token order, with their layouts for a video of `num_frames` frames.

        Names and projectors must be the same for every number of frames from 0 to T. grid: (rows, cols) of a picture.
        """
        raise NotImplementedError

    def projectors(self) -> dict[str, str]:
        """Returns the start of each projector, by the projector's name.

        "image": the image LLM's projector; at most one projector starts so, and pictures go through it. "copy": a copy
        of it. "random": the same module with random weights. The name is also the projector's name in checkpoints and
        its optimizer group. If the stream of the image projector's name has an extra module, pictures go through it,
        too.
        """
        raise NotImplementedError

    # ---- methods with a default

    def arrange(self, frames: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Turns frames (B, T, H, W, 3) uint8 into the pictures that the encoder sees, (B, P, H, W, 3) uint8."""
        return frames

    def merge(self, name: str, tokens: jax.Array, layout: Layout) -> jax.Array:
        """Pools the tokens (B, N, K) that a stream's projector returns to fewer tokens (B, N', K).

        layout: the shape in which the tokens of a video of T frames lie: (length,), (rows, cols) or (frames, rows,
        cols). The tokens of a shorter video must come first and depend on its own frames alone.
        """
        return tokens

    def text(self, name: str, frame: int | None, seconds: float | None) -> str:
        """Returns the text before a stream's tokens, or, for a layout with frames, before the tokens of each frame.

        frame: counted from 0 within the stream; None for a stream without frames, or whose tokens frames share.
        seconds: the time of the frame `frame_of(name, frame, …)`, counted from the video's first frame; None if the
        file has no times, or `frame` is None.
        """
        return ""

    def frame_of(self, name: str, frame: int, num_frames: int) -> int:
        """Returns the index, among the video's `num_frames` frames, of a stream's frame; `text` gets its time."""
        return frame

    def trained(self) -> tuple[str, ...]:
        """Returns the projectors that train; the others keep their first weights."""
        return tuple(self.projectors())

    def extra(self, name: str) -> type[nnx.Module] | None:
        """Returns the class of a module with random weights behind a stream's projector, or None.

        It is built with (features, rngs=) and maps width K to K. Its attribute SHARDING lays its weights on the mesh.
        It always trains, in the optimizer group "extra_mlp".
        """
        return None

    def problem(self, sampling: str, grid: tuple[int, int] | None) -> str:
        """Returns the reason why the fields contradict each other, the sampling rule or the base's grid, or "".

        grid: None while the base is not known.
        """
        return ""


# ---- choosing frames


def spread(num_frames: jax.Array, count: int, *, repeat: bool = False) -> jax.Array:
    """Returns the indices (B, count) int32 of frames at equal distances: floor(i n / count) for i = 0, 1, …

    num_frames: n, (B,) int32. If n < count, every frame comes once, in the first places; with `repeat` some come twice.
    """
    index, n = jnp.arange(count), num_frames[:, None]
    among = count if repeat else jnp.clip(n, 1, count)
    return jnp.clip(index * n // among, 0, jnp.maximum(n - 1, 0)).astype(jnp.int32)


def take_frames(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Takes frames or their features (B, T, ...) at indices `numbers` (B, count): (B, count, ...)."""
    return jnp.take_along_axis(x, numbers.reshape(*numbers.shape, *[1] * (x.ndim - 2)), axis=1)


# ---- derived from the contract


def stream_shapes(video: Representation, grid: tuple[int, int], width: int, image_size: int) -> dict[str, tuple]:
    """Returns the shape (M, D) of each pooled stream of a video, for features of `width` on a `grid`."""
    frames = jax.ShapeDtypeStruct((1, video.num_frames, image_size, image_size, 3), jnp.uint8)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    pictures = jax.eval_shape(video.arrange, frames, count).shape[1]
    features = jax.ShapeDtypeStruct((1, pictures, *grid, width), jnp.float32)
    return {name: x.shape[1:] for name, x in jax.eval_shape(video.pool, features, count).items()}


def contradiction(
    video: Representation, groups: tuple[str, ...], grid: tuple[int, int], shapes: Mapping[str, tuple]
) -> str:
    """Returns how a representation contradicts itself on a grid, or "".

    groups: the module's GROUPS. shapes: of `stream_shapes`.
    """
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
        if video.extra(name) and EXTRA_GROUP not in groups:
            return f"stream {name} has an extra module, but GROUPS lacks {EXTRA_GROUP}"
    if unknown := set(video.projectors().values()) - set(STARTS):
        return f"a projector starts from {min(unknown)!r}, expected one of {', '.join(STARTS)}"
    if list(video.projectors().values()).count("image") > 1:
        return "several projectors start from the image LLM's own, one may; let the others be copies"
    if ungrouped := sorted(set(video.projectors()) - set(groups)):
        return f"GROUPS lacks the projector {ungrouped[0]}"
    return ""


def image_projector(video: Representation) -> str | None:
    """Returns the name of the projector that starts as the image LLM's, or None."""
    return next((name for name, start in video.projectors().items() if start == "image"), None)


def export_name(video: Representation, projector: str) -> str | None:
    """Returns a projector's name in exports; None for the image LLM's own, which keeps its published names."""
    return None if video.projectors()[projector] == "image" else projector


def has_random_start(video: Representation, grid: tuple[int, int]) -> bool:
    """Returns whether some weights start random, and so depend on a seed."""
    extras = [video.extra(stream.name) for stream in video.order(grid, video.num_frames)]
    return "random" in video.projectors().values() or any(extras)


def num_features(video: Representation, grid: tuple[int, int], index: int) -> list[int]:
    """Returns the number of features of stream `index` in a video of 0, 1, … T frames."""
    return [math.prod(video.order(grid, n)[index].layout) for n in range(video.num_frames + 1)]


# ---- finding a representation


def known_videos() -> list[str]:
    """Returns the names of the representations in this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "contract"))


def load_video(name: str) -> ModuleType:
    """Imports the module of a representation, by its name in this folder or its dotted path.

    Raises UserError for an unknown name, a module that cannot be imported, and a module that breaks the contract.
    """
    known = known_videos()
    if name not in known and not (isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)+", name)):
        near = did_you_mean(str(name), known)
        raise UserError(
            f"config.video is {name!r}, expected one of {', '.join(known)}, or the dotted path of a module{near}"
        )
    try:
        module = importlib.import_module(f"redvillm_jax.video.{name}" if name in known else name)
    except Exception as error:  # a user's module may raise anything
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"config.video={name}: cannot be imported ({type(error).__name__}: {said}); its folder must be the "
            "current one or in PYTHONPATH"
        ) from error
    if missing := unmet_requirement(module):
        raise UserError(f"config.video={name}: {missing} (redvillm_jax/video/contract.py has the contract)")
    return module


def unmet_requirement(module: ModuleType) -> str:
    """Returns the first requirement of the contract that a module breaks, or ""."""
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
    """Returns the names that a class has beyond `Representation`: its own and of classes in between."""
    return {name for one in kind.__mro__ if one not in (Representation, object) for name in vars(one)}


def make_video(name: str, config: Mapping[str, Any]) -> Representation:
    """Makes the representation `name` from its fields of a config and `config["num_frames"]`."""
    module = load_video(name)
    return module.Video(**{field: config[field] for field in ("num_frames", *module.FIELDS)})


def fields_with(name: str, video: Representation, *effects: str) -> dict[str, Any]:
    """Returns the fields of the representation `name` that have one of these effects, with their values."""
    return {key: getattr(video, key) for key, field in load_video(name).FIELDS.items() if field.effect in effects}


def pooling_fields(name: str, video: Representation) -> dict[str, Any]:
    """Returns all that decides the pooled streams: name, fields of effect "streams", hash of an outside module."""
    module, found = load_video(name), {"video": name} | fields_with(name, video, "streams")
    if name not in known_videos():
        found["video_code"] = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    return found
