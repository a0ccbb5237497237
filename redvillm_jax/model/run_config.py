"""Reads the config of an older run or export, and says which fields may change when a run continues.

A new field of `configs/` needs a line in ADDED; `tests/run_configs/` holds configs without the field.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import known_families
from redvillm_jax.model.config_bounds import FIELDS
from redvillm_jax.model.settings import config_fields
from redvillm_jax.video.contract import known_videos

ADDED = {  # field that the first runs lack -> its value in their code
    "sampling": "uniform",
    "language": "",
    "int8": False,
    "attention": "auto",
}
ADDED_TO_EXPORTS = ADDED | {"dtype": "bfloat16", "seed": 0}  # runs always had these two, exports did not
BESIDE = {"step", "base_fingerprint"}  # `checkpoint.load_trainables` adds them to a run's config

FREE = {
    "base",
    "data",
    "mesh",
    "remat",
    "attention",
    "num_workers",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
}
ROWS = {"seed", "language", "labels", "pack", "row_length", "batch_questions"}
STEPS = {"learning_rate", "learning_rate_scale", "weight_decay", "warmup_ratio", "clip_norm", "dtype", "int8"}


def as_trained(said: Mapping[str, Any], where: Path | str, added: Mapping[str, Any] = ADDED) -> dict[str, Any]:
    """Completes a config with the fields that it is too old to have; their values keep the behaviour of its time.

    Raises UserError for an unknown field: a newer version wrote it, and its effect is not known here.
    """
    families, videos = {*known_families(), said.get("family")}, {*known_videos(), said.get("video")}
    options = [config_fields(family, video) for family in families - {None} for video in videos - {None}]
    known = set(FIELDS).union(BESIDE, *options)
    if unknown := sorted(said.keys() - known):
        raise UserError(
            f"{where}: {unknown[0]}={said[unknown[0]]!r:.80} is no field that this version knows, so a newer one wrote "
            "it: use that version of redvillm_jax"
        )
    return dict(added) | dict(said)


def check_continues(run: Path, known: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UserError unless a run that was started with the config `known` can continue with `config`.

    The FREE fields and num_epochs may change. All other fields decided the steps that are done.
    """
    names = [name for name in known.keys() | config if name not in FREE | {"num_epochs"} | BESIDE]
    changed = sorted(name for name in names if name not in known or known[name] != config.get(name))
    if not changed:
        return
    name = changed[0]
    if name not in known:
        raise UserError(f"{run}/config.json: does not say {name}, as every run does; is it damaged?")
    why = "which rows a step has" if name in ROWS else "the steps already done" if name in STEPS else "the model"
    raise UserError(
        f"{run} is a run with {name}={known[name]!r}, this command says {config.get(name)!r} "
        f"({', '.join(changed)} differ): it decides {why}, and the trained weights belong to it; continue with the "
        f"same config (but for {', '.join(sorted(FREE))}; num_epochs may grow), or use another --workdir"
    )
