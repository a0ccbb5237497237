"""A config, the base it names and the store it trains on, checked against each other before anything is loaded."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.media.sampling import UNIFORM
from data_pipeline.store import VideoStore
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import EXPORT_MARK, PARTS, Base, open_base, read_export
from redvillm_jax.model.build import config_fields
from redvillm_jax.model.config_bounds import check_fields


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError for a field that is missing, unknown or out of bounds, and for a config that trains nothing."""
    for name in ("family", "video"):
        if name not in config:
            raise UserError(f"config.{name} is missing: start from a file of configs/")
    family = config["family"]
    check_fields(config, config_fields(family, config["video"]), f"a config of the family {family}")
    temporal_trains = config["temporal_module"] and config["streams"] != "spatial"
    if not (config["train_spatial"] or temporal_trains or config["extra_mlp"]):
        raise UserError("config.train_spatial=False leaves nothing to train without a temporal module; leave it out")


def open_config_base(config: Mapping[str, Any]) -> Base:
    """Checks a config and opens the base folder that it names, which must be of the config's family."""
    check_config(config)
    family = config["family"]
    if not config["base"]:
        raise UserError(
            f"config.base is not set: download {load_family(family).PUBLISHED} (docs/real_weights.md), run python "
            f"-m conversion.from_torch --family={family} --source=FOLDER --out=BASE, then pass --config.base=BASE"
        )
    base = open_base(config["base"])
    if (base.path / EXPORT_MARK).is_file() and read_export(base.path / EXPORT_MARK)["trained"]:
        raise UserError(f"{base.path} is a trained export; give the base that it was trained on")
    return check_base(base, config)


def check_base(base: Base, config: Mapping[str, Any]) -> Base:
    """The base itself; raises UserError unless the config is for its family and fits its picture grid."""
    if base.family != config["family"]:
        raise UserError(
            f"{base.path} is a {base.family} base, this config is for {config['family']}: "
            "use the other config file or another base"
        )
    rows, cols = base.config.grid
    if any(side % config["spatial_pool"] for side in (rows, cols)):
        raise UserError(
            f"config.spatial_pool is {config['spatial_pool']}, the base's {rows}×{cols} grid needs a divisor"
        )
    return base


def needed_parts(store: VideoStore) -> tuple[str, ...]:
    """The parts of a model that work on a store: from frames all, from streams all but the encoder."""
    return PARTS if store.meta["kind"] == "frames" else ("projector", "llm")


def stream_settings(base: Base, config: Mapping[str, Any]) -> dict[str, Any]:
    """What stored streams depend on beyond their frames: the base's weights and the pooling."""
    return {"base": base.fingerprint, "video": config["video"], "spatial_pool": config["spatial_pool"]}


def check_store(store: VideoStore, base: Base, config: Mapping[str, Any]) -> None:
    """Raises UserError unless a store was made for this base, these frames and, if it holds streams, this pooling."""
    if not store.instructions:
        raise UserError(f"{store.path}: has no questions; prepare it with --instructions=FILE")
    wanted = {"image_size": base.config.image_size, "resize": base.module.RESIZE, "num_frames": config["num_frames"]}
    wanted["sampling"] = config["sampling"]
    if wanted["sampling"] != UNIFORM and config["short_video"] != "mask":
        raise UserError(
            f"config.sampling={wanted['sampling']} gives videos of different lengths, config.short_video="
            f"{config['short_video']} would fill them up with zeros: use short_video=mask, or sampling=uniform"
        )
    again = f"prepare it again with --base={base.path} --num_frames={config['num_frames']}"
    if wanted["sampling"] != store.meta["sampling"]:
        again += f" --sampling={wanted['sampling']}, or set config.sampling"
    if store.meta["kind"] == "streams":
        wanted |= stream_settings(base, config)
        again = "encode the frames again with this base and config (python -m redvillm_jax.encode --help)"
    for key, value in wanted.items():
        if store.meta[key] != value:
            raise UserError(f"{store.path} was made with {key}={store.meta[key]}, this model needs {value}: {again}")
