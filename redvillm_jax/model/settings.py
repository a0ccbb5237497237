"""Checks a config, its base and its store against each other, before any weights are loaded."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from data_pipeline.common.errors import UserError
from data_pipeline.store import VideoStore
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import EXPORT_MARK, Base, open_base, read_export
from redvillm_jax.model.config_bounds import DECAY, FIELDS, RATE, Fields, check_fields
from redvillm_jax.model.weights import PARTS
from redvillm_jax.modules.bounds import one_of
from redvillm_jax.video.contract import Representation, load_video, make_video, pooling_fields

ANSWERING = ("video", "num_frames", "sampling", "dtype", "int8", "seed")  # and fields of the video and base modules


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The config fields that decide the video LLM.

    representation: the name of `video`. sampling: the rule that chooses frames. dtype: of frozen weights and
    activations. int8: the matrices of the language model's layers have 8 bits. seed: of random starts.
    projector_options: the options of the base's projector.
    """

    family: str
    representation: str
    video: Representation
    sampling: str
    dtype: str
    int8: bool
    seed: int
    projector_options: Mapping[str, Any]


def model_settings(config: Mapping[str, Any]) -> ModelSettings:
    """Reads the settings of a model from a config that passed `check_config` or `check_answering`."""
    options = load_family(config["family"]).PROJECTOR_OPTIONS
    return ModelSettings(
        family=config["family"],
        representation=config["video"],
        video=make_video(config["video"], config),
        sampling=config["sampling"],
        dtype=config["dtype"],
        int8=config["int8"],
        seed=config["seed"],
        projector_options=MappingProxyType({name: config[name] for name in options}),
    )


def config_fields(family: str, video: str) -> Fields:
    """Returns the bounds of all fields: the common ones, the representation's and the base's."""
    module = load_video(video)
    fields = {name: field.bound for name, field in module.FIELDS.items()}
    rates = {
        name: dict.fromkeys(module.GROUPS, bound)
        for name, bound in (("learning_rate_scale", RATE), ("weight_decay", DECAY))
    }
    options = {name: one_of(*values) for name, values in load_family(family).PROJECTOR_OPTIONS.items()}
    return FIELDS | fields | rates | options


def complete(config: ConfigDict) -> ConfigDict:
    """Adds the unset fields of the config's representation and base, with their defaults."""
    if not all(isinstance(config.get(name), str) and config[name] for name in ("family", "video")):
        return config
    video, base = load_video(config.video), load_family(config.family)
    defaults = {name: field.default for name, field in video.FIELDS.items()}
    defaults |= {name: values[0] for name, values in base.PROJECTOR_OPTIONS.items()}
    rates = {"learning_rate_scale": dict.fromkeys(video.GROUPS, 1.0), "weight_decay": dict.fromkeys(video.GROUPS, 0.0)}
    with config.unlocked():
        for name, value in defaults.items():
            if name not in config:
                config[name] = value
        for name, groups in rates.items():
            said = dict(config.get(name, {}))
            config[name] = ConfigDict(groups | said)
    return config


def plain_config(config: ConfigDict) -> dict[str, Any]:
    """Returns a complete copy of a config as nested dicts of numbers and texts."""
    return json.loads(complete(ConfigDict(config.to_dict())).to_json())


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError for a field that is missing, unknown or out of bounds, and for fields that contradict others."""
    for name in ("family", "video"):
        if name not in config:
            raise UserError(f"config.{name} is missing: start from a file of configs/")
    family = config["family"]
    check_fields(config, config_fields(family, config["video"]), f"a config of the family {family}")
    if problem := make_video(config["video"], config).problem(config["sampling"], None):
        raise UserError(problem)


def check_answering(config: Mapping[str, Any], model: str | Path) -> None:
    """Raises UserError unless a trained model's config has all fields that decide its answers, within bounds."""
    try:
        fields = config_fields(config["family"], config["video"])
        names = [
            name for name in fields if name in ANSWERING or name not in (*FIELDS, "learning_rate_scale", "weight_decay")
        ]
        check_fields({name: config[name] for name in names}, {name: fields[name] for name in names})
    except KeyError as error:
        raise UserError(f"{model}: its config does not say {error.args[0]}; is it damaged?") from None
    except UserError as error:
        raise UserError(f"{model}: {error}") from None


def open_config_base(config: Mapping[str, Any]) -> Base:
    """Checks a config and opens its base folder. Raises UserError, also for a base of another family."""
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
    return check_base(base, model_settings(config))


def check_base(base: Base, settings: ModelSettings) -> Base:
    """Returns the base. Raises UserError unless the settings are for its family and its grid."""
    if base.family != settings.family:
        raise UserError(
            f"{base.path} is a {base.family} base, this config is for {settings.family}: "
            "use the other config file or another base"
        )
    if problem := settings.video.problem(settings.sampling, base.config.grid):
        raise UserError(problem)
    return base


def needed_parts(store: VideoStore) -> tuple[str, ...]:
    """Returns the parts of a model that a store needs: all for frames, all but the encoder for streams."""
    return PARTS if store.meta["kind"] == "frames" else ("projector", "llm")


def stream_settings(base: Base, settings: ModelSettings) -> dict[str, Any]:
    """Returns all that decides stored streams besides their frames: the base's weights and the pooling."""
    return {"base": base.fingerprint, **pooling_fields(settings.representation, settings.video)}


def check_store(store: VideoStore, base: Base, settings: ModelSettings) -> None:
    """Raises UserError unless a store was made for this base, these frames and, if it holds streams, this pooling."""
    if not store.instructions:
        raise UserError(f"{store.path}: has no questions; prepare it with --instructions=FILE")
    num_frames = settings.video.num_frames
    wanted = {"image_size": base.config.image_size, "resize": base.module.frame_fit(base.config)}
    wanted |= {"num_frames": num_frames, "sampling": settings.sampling}
    again = f"prepare it again with --base={base.path} --num_frames={num_frames}"
    if wanted["sampling"] != store.meta["sampling"]:
        again += f" --sampling={wanted['sampling']}, or set config.sampling"
    if store.meta["kind"] == "streams":
        wanted |= stream_settings(base, settings)
        again = "encode the frames again with this base and config (python -m redvillm_jax.encode --help)"
    for key, value in wanted.items():
        if (made := store.meta.get(key)) != value:
            raise UserError(f"{store.path} was made with {key}={made}, this model needs {value}: {again}")
