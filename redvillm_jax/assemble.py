"""From a base folder and a run's switches to a video LLM on the devices."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipeline.errors import UserError
from data_pipeline.store import FrameStore
from redvillm_jax.checkpoint import load_trainables
from redvillm_jax.model import ExtraMLP, VideoLLM
from redvillm_jax.sharding import replicated, weight_sharding
from redvillm_jax.weights import Base, load_part, open_base

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
    base: Base, config: Mapping[str, Any], mesh: jax.sharding.Mesh, *, dtype: jax.typing.DTypeLike
) -> VideoLLM:
    """The untrained video LLM: frozen parts in `dtype`, projectors in fp32, the temporal module a copy.

    config: the video switches, temporal_init ("copy" | "random", Table 4 and its ablation), extra_mlp (Table 5),
    seed (of what is random), and the base's projector options. Each host reads only its own slices.
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
    for stream, projector in video.order():
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
        encoder=load_part(base, "encoder", dtype=dtype, sharding=place),
        projectors=projectors,
        llm=load_part(base, "llm", dtype=dtype, sharding=place),
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


def check_store(store: FrameStore, path: str | Path, base: Base, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the frames were prepared for this base and this number of frames."""
    wanted = {"image_size": base.config.image_size, "resize": base.module.RESIZE, "num_frames": config["num_frames"]}
    for key, value in wanted.items():
        if store.meta[key] != value:
            raise UserError(
                f"{path} was prepared with {key}={store.meta[key]}, this model needs {value}: prepare it again with "
                f"--base={base.path} --num_frames={config['num_frames']}"
            )


def put_trained(model: VideoLLM, trained: Mapping[str, Any]) -> None:
    """Replaces the projectors' weights by trained ones (nested dicts of numpy arrays), where they lie on the mesh."""
    state = nnx.state(model.projectors)
    nnx.update(
        model.projectors,
        jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), trained, nnx.to_pure_dict(state)),
    )
