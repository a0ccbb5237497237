"""Builds a video LLM on the devices from a base folder and the settings of a model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.common.errors import UserError
from redvillm_jax.model.base_folder import EXTRA_PREFIX, Base, load_part
from redvillm_jax.model.settings import ModelSettings
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.model.weights import PARTS, fill
from redvillm_jax.runtime.sharding import weight_sharding
from redvillm_jax.video.contract import contradiction, load_video, stream_shapes


def load_model(
    base: Base,
    settings: ModelSettings,
    mesh: jax.sharding.Mesh,
    *,
    dtype: jax.typing.DTypeLike,
    parts: Sequence[str] = PARTS,
) -> VideoLLM:
    """Loads the untrained video LLM: frozen parts in `dtype`, projectors in fp32 with the start of the representation.

    Each host reads only its own slices. parts: the parts to load; stored streams need no encoder, and storing them
    needs the encoder alone. A base without a folder gives shapes instead of arrays. Raises UserError when the
    representation contradicts itself on the base's grid.
    """
    video, options = settings.video, settings.projector_options
    groups = load_video(settings.representation).GROUPS
    if problem := contradiction(video, groups, base.config.grid, shapes_of_streams(base, settings)):
        raise UserError(f"config.video={settings.representation}: {problem} (redvillm_jax/video/contract.py)")
    place = weight_sharding(mesh, base.module.SHARDING)
    rngs = None if base.path is None else nnx.Rngs(settings.seed)
    starts, projectors = video.projectors(), {}
    for stream in video.order(base.config.grid, video.num_frames) if "projector" in parts else ():
        name = stream.projector
        if name not in projectors and starts[name] == "random":
            projectors[name] = random_module(
                functools.partial(base.module.Projector, base.config, **options),
                functools.partial(place_prefixed, place, base.module.PREFIX["projector"]),
                rngs,
            )
        elif name not in projectors:
            projectors[name] = load_part(base, "projector", dtype=jnp.float32, sharding=place, **options)
        if extra := video.extra(stream.name):
            projectors[f"{EXTRA_PREFIX}{stream.name}"] = random_module(
                functools.partial(extra, base.config.hidden_size),
                functools.partial(place_prefixed, weight_sharding(mesh, extra.SHARDING), ""),
                rngs,
            )
    llm = {"dtype": dtype, "sharding": place, "int8": settings.int8}
    return VideoLLM(
        base.module,
        base.config,
        video,
        encoder=load_part(base, "encoder", dtype=dtype, sharding=place) if "encoder" in parts else None,
        projectors=projectors,
        llm=load_part(base, "llm", **llm) if "llm" in parts else None,
    )


def place_prefixed(place: Callable, prefix: str, path: tuple, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Returns the sharding of a leaf, by its path, in a module without stacked layers."""
    return place(prefix + ".".join(map(str, path)), shape, False)


def random_module(
    make: Callable[..., nnx.Module],
    place: Callable[[tuple, tuple[int, ...]], jax.sharding.Sharding],
    rngs: nnx.Rngs | None,
) -> nnx.Module:
    """Makes a module with random weights, sharded as `place(path, shape)`; without `rngs` it has shapes alone."""
    if rngs is not None:
        return fill(make(rngs=rngs), lambda path, leaf: jax.device_put(leaf[...], place(path, leaf.shape)))

    def shape(path: tuple, leaf: nnx.Variable) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf.shape))

    return fill(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), shape)


def shapes_of_streams(base: Base, settings: ModelSettings) -> dict[str, tuple[int, int]]:
    """Returns the shape (M, D) of each pooled stream of a video, by name."""
    c = base.config
    return stream_shapes(settings.video, c.grid, c.feature_size, c.image_size)


def put_trained(model: VideoLLM, trained: Mapping[str, Any]) -> None:
    """Replaces the projectors' weights by trained ones, nested dicts of numpy arrays; their shardings stay."""
    state = nnx.state(model.projectors)
    nnx.update(
        model.projectors,
        jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, nnx.to_pure_dict(state)),
    )
