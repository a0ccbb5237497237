"""From a base folder and a run's switches to a video LLM on the devices."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.errors import UserError
from data_pipeline.store import VideoStore
from redvillm_jax.checkpoint import load_trainables
from redvillm_jax.model import ExtraMLP, VideoLLM
from redvillm_jax.sharding import replicated, weight_sharding
from redvillm_jax.weights import PARTS, Base, load_part, open_base

VIDEO_SWITCHES = ("streams", "stream_order", "temporal_module", "spatial_pool", "short_video")


def make_video(config: Mapping[str, Any]) -> Any:
    """The video representation `config["video"]` of redvillm_jax.video with the config's switches."""
    known = sorted(p.stem for p in (Path(__file__).parent / "video").glob("*.py") if p.stem != "__init__")
    if config["video"] not in known:
        raise UserError(f"config.video is {config['video']!r}, expected one of {', '.join(known)}")
    module = importlib.import_module(f"redvillm_jax.video.{config['video']}")
    try:
        return module.Video(**{name: config[name] for name in VIDEO_SWITCHES})
    except ValueError as error:
        raise UserError(f"config.{error}") from None


def projector_options(base: ModuleType, config: Mapping[str, Any]) -> dict[str, Any]:
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
    seed (of what is random), and the base's projector options. Each host reads only its own slices. parts:
    what is needed; the others' weights are not read (with stored streams the encoder's, to store them the rest's).
    """
    video = make_video(config)
    options = projector_options(base.module, config)
    place = weight_sharding(mesh, base.module.SHARDING)
    if config["temporal_init"] not in ("copy", "random"):
        raise UserError(f"config.temporal_init is {config['temporal_init']!r}, expected 'copy' or 'random'")
    rngs = nnx.Rngs(config["seed"])

    def on_mesh(module: nnx.Module) -> nnx.Module:
        graphdef, state = nnx.split(module)
        return nnx.merge(graphdef, jax.tree.map(lambda x: jax.device_put(x, replicated(mesh)), state))

    projectors = {}
    for stream, projector in video.order() if "projector" in parts else ():
        if projector == "temporal" and config["temporal_init"] == "random":
            projectors[projector] = on_mesh(base.module.Projector(base.config, rngs=rngs, **options))
        elif projector not in projectors:
            projectors[projector] = load_part(base, "projector", dtype=jnp.float32, sharding=place, **options)
        if config["extra_mlp"]:
            projectors[f"extra_mlp_{stream}"] = on_mesh(ExtraMLP(base.config.hidden_size, rngs=rngs))
    return VideoLLM(
        base.module,
        base.config,
        video,
        encoder=load_part(base, "encoder", dtype=dtype, sharding=place) if "encoder" in parts else None,
        projectors=projectors,
        llm=load_part(base, "llm", dtype=dtype, sharding=place) if "llm" in parts else None,
    )


def open_run(
    model: str | Path, config: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Base, dict[str, Any] | None]:
    """A run directory or a base folder as (config, base, trained projectors or None).

    A run brings its own config; a base needs one. Raises UserError when neither is there.
    """
    if (Path(model) / "base.json").is_file():
        if config is None:
            raise UserError(f"{model} is a base folder: give its switches with --config=configs/llava.py (or qwen.py)")
        base = open_base(model)
        if base.family != config["family"]:
            raise UserError(f"{model} is a {base.family} base, --config is for {config['family']}")
        return config, base, None
    config, trained = load_trainables(model)
    return config, open_base(config["base"], config["base_fingerprint"]), trained


def needed_parts(store: VideoStore) -> tuple[str, ...]:
    """The parts of a model that work on a store: from frames all, from streams all but the encoder."""
    return PARTS if store.meta["kind"] == "frames" else ("projector", "llm")


def stream_settings(base: Base, config: Mapping[str, Any]) -> dict[str, Any]:
    """What stored streams depend on beyond their frames: the base's weights and the pooling."""
    return {"base": base.fingerprint, "video": config["video"], "spatial_pool": config["spatial_pool"]}


def check_store(store: VideoStore, path: str | Path, base: Base, config: Mapping[str, Any]) -> None:
    """Raises UserError unless a store was made for this base, these frames and, if it holds streams, this pooling."""
    wanted = {"image_size": base.config.image_size, "resize": base.module.RESIZE, "num_frames": config["num_frames"]}
    again = f"prepare it again with --base={base.path} --num_frames={config['num_frames']}"
    if store.meta["kind"] == "streams":
        wanted |= stream_settings(base, config)
        again = "encode the frames again with this base and config (python -m redvillm_jax.encode --help)"
    for key, value in wanted.items():
        if store.meta[key] != value:
            raise UserError(f"{path} was made with {key}={store.meta[key]}, this model needs {value}: {again}")


def put_trained(model: VideoLLM, trained: Mapping[str, Any]) -> None:
    """Replaces the projectors' weights by trained ones (nested dicts of numpy arrays), where they lie on the mesh."""
    state = nnx.state(model.projectors)
    nnx.update(
        model.projectors,
        jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, nnx.to_pure_dict(state)),
    )
