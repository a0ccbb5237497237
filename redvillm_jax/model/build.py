"""From a base folder and a run's switches to a video LLM on the devices."""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import Family, load_family
from redvillm_jax.model.base_folder import PARTS, Base, abstract_part, load_part
from redvillm_jax.model.config_bounds import FIELDS, Fields, one_of
from redvillm_jax.model.video_llm import ExtraMLP, VideoLLM
from redvillm_jax.runtime.sharding import weight_sharding


def known_videos() -> list[str]:
    """The video representations there are: the files of `redvillm_jax.video`."""
    return sorted(p.stem for p in (Path(__file__).parents[1] / "video").glob("*.py") if p.stem != "__init__")


def load_video_module(name: str) -> ModuleType:
    """Imports `redvillm_jax.video.<name>`; an unknown one is a UserError that lists the known ones."""
    known = known_videos()
    if name not in known:
        raise UserError(f"config.video is {name!r}, expected one of {', '.join(known)}")
    return importlib.import_module(f"redvillm_jax.video.{name}")


def make_video(config: Mapping[str, Any]) -> Any:
    """The video representation `config["video"]` of redvillm_jax.video with the config's switches."""
    module = load_video_module(config["video"])
    return module.Video(**{name: config[name] for name in module.OPTIONS})


def config_fields(family: str, video: str) -> Fields:
    """All fields of a config with their bounds: the common ones, its representation's and its base's."""
    options = load_video_module(video).OPTIONS | load_family(family).PROJECTOR_OPTIONS
    return FIELDS | {name: one_of(*values) for name, values in options.items()}


def projector_options(base: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The switches that this base's projector takes (Qwen-VL: qwen_align, temporal_positions)."""
    return {name: config[name] for name in base.PROJECTOR_OPTIONS}


def load_model(
    base: Base,
    config: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    *,
    dtype: jax.typing.DTypeLike,
    parts: Sequence[str] = PARTS,
) -> VideoLLM:
    """The untrained video LLM: frozen parts in `dtype`, projectors in fp32, the temporal module a copy.

    config: the video switches, temporal_init ("copy" | "random", Table 4 and its ablation), extra_mlp (Table 5),
    seed (of what is random), int8 (matrices of its layers in 8 bits), and the base's projector options. Each
    host reads only its own slices. parts: what is needed; the others' weights are not read (with stored streams the
    encoder's, to store them the rest's). A base without a folder gives shapes instead of arrays.
    """
    video = make_video(config)
    options = projector_options(base.module, config)
    place = weight_sharding(mesh, base.module.SHARDING)
    rngs = None if base.path is None else nnx.Rngs(config["seed"])
    projectors = {}
    for stream, projector in video.order() if "projector" in parts else ():
        if projector == "temporal" and config["temporal_init"] == "random":
            projectors[projector] = random_module(
                functools.partial(base.module.Projector, base.config, **options),
                functools.partial(place_prefixed, place, base.module.PREFIX["projector"]),
                rngs,
            )
        elif projector not in projectors:
            projectors[projector] = load_part(base, "projector", dtype=jnp.float32, sharding=place, **options)
        if config["extra_mlp"]:
            projectors[f"extra_mlp_{stream}"] = random_module(
                functools.partial(ExtraMLP, base.config.hidden_size),
                functools.partial(place_prefixed, weight_sharding(mesh, ExtraMLP.SHARDING), ""),
                rngs,
            )
    llm = {"dtype": dtype, "sharding": place, "int8": config["int8"]}
    return VideoLLM(
        base.module,
        base.config,
        video,
        encoder=load_part(base, "encoder", dtype=dtype, sharding=place) if "encoder" in parts else None,
        projectors=projectors,
        llm=load_part(base, "llm", **llm) if "llm" in parts else None,
    )


def place_prefixed(place: Callable, prefix: str, path: tuple, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Where a leaf of a module without stacked layers lies, by its path."""
    return place(prefix + ".".join(map(str, path)), shape, False)


def random_module(
    make: Callable[..., nnx.Module],
    place: Callable[[tuple, tuple[int, ...]], jax.sharding.Sharding],
    rngs: nnx.Rngs | None,
) -> nnx.Module:
    """A module with its own random weights where `place(path, shape)` says, or without `rngs` their shapes alone."""
    abstract = rngs is None
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))) if abstract else make(rngs=rngs))
    flat = {}
    for path, leaf in nnx.to_flat_state(state):
        at = place(path, leaf.shape)
        array = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at) if abstract else jax.device_put(leaf[...], at)
        flat[path] = leaf.replace(array)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def token_slots(base: Base, config: Mapping[str, Any]) -> Callable[[int], list[int]]:
    """For a number of frames, which of a video's static token slots hold tokens."""
    projector = abstract_projector(base, config)
    return functools.partial(make_video(config).token_slots, projector, base.config.grid, config["num_frames"])


def num_picture_tokens(base: Base, config: Mapping[str, Any]) -> int:
    """How many visual tokens a picture has."""
    return math.prod(abstract_projector(base, config).token_layout(base.config.grid))


def abstract_projector(base: Base, config: Mapping[str, Any]) -> nnx.Module:
    """A projector without weights."""
    return abstract_part(base.module, "projector", base.config, **projector_options(base.module, config))


def put_trained(model: VideoLLM, trained: Mapping[str, Any]) -> None:
    """Replaces the projectors' weights by trained ones (nested dicts of numpy arrays), where they lie on the mesh."""
    state = nnx.state(model.projectors)
    nnx.update(
        model.projectors,
        jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, nnx.to_pure_dict(state)),
    )
