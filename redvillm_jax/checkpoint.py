"""Training checkpoints: trainable weights, optimizer state and step; never a frozen weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipeline.errors import UserError

FOLDER = "checkpoints"


def open_checkpoints(run: str | Path, *, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints, `<run>/checkpoints/<step>/`; the newest `keep` stay on disk."""
    return ocp.training.Checkpointer(
        Path(run).absolute() / FOLDER,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def manifest(state: Any) -> dict[str, list[int]]:
    """Shapes by dotted path, to compare a checkpoint with a run before anything is read."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}


def save(
    checkpoints: ocp.training.Checkpointer,
    step: int,
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    fingerprint: str,
) -> None:
    """Saves `state` = {"trainable": …, "optimizer": …} in the background; a step that exists is left as it is."""
    if any(known.step == step for known in checkpoints.checkpoints):
        return
    metadata = {"config": config, "base_fingerprint": fingerprint, "manifest": manifest(state)}
    checkpoints.save_checkpointables_async(step, dict(state), force=True, custom_metadata=metadata)


def restore(
    checkpoints: ocp.training.Checkpointer, state: Mapping[str, Any], *, fingerprint: str
) -> tuple[int, Mapping[str, Any]]:
    """The newest checkpoint as (step, state) with the shapes and shardings of `state`; (0, state) without one.

    Raises UserError when the checkpoint belongs to another base or to a run with other trainable weights.
    """
    if checkpoints.latest is None:
        return 0, state
    step = checkpoints.latest.step
    saved = checkpoints.checkpointables_metadata(step).custom_metadata
    where = f"{checkpoints.directory}/{step}"
    if saved["base_fingerprint"] != fingerprint:
        raise UserError(
            f"{where} was trained on base {saved['base_fingerprint'][:12]}, this run's base is {fingerprint[:12]}; "
            "use that base, or another --workdir"
        )
    wanted = manifest(state)
    if saved["manifest"] != wanted:
        differing = sorted(
            key for key in saved["manifest"].keys() | wanted if saved["manifest"].get(key) != wanted.get(key)
        )
        raise UserError(
            f"{where} holds other trainable weights than this config: {', '.join(differing[:5])} differ; "
            "use the config it was trained with, or another --workdir"
        )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(state))
    return step, checkpoints.load_checkpointables(step, abstract)


def load_trainables(run: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a run and its trained projectors as nested dicts of numpy arrays, from the newest checkpoint.

    Returns (config, {"spatial": {…}, "temporal": {…}, …}); the config also says the checkpoint's "step" and the
    "base_fingerprint" that it was trained on. Raises UserError when the run has no checkpoint.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: not a run directory (no config.json); give the --workdir of a training run")
    config = json.loads((run / "config.json").read_text())
    if not any((run / FOLDER).glob("[0-9]*")):
        raise UserError(f"{run}: no checkpoint yet; let redvillm_jax.train finish, then run this again")
    with ocp.training.Checkpointer(run.absolute() / FOLDER) as checkpoints:
        step = checkpoints.latest.step
        saved = checkpoints.checkpointables_metadata(step)
        config |= {"step": step, "base_fingerprint": saved.custom_metadata["base_fingerprint"]}
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved.metadata["trainable"])
        return config, checkpoints.load_checkpointables(step, {"trainable": abstract})["trainable"]
