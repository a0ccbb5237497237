"""Saves and restores training checkpoints: trainable weights, optimizer state and step, but no frozen weights.

Orbax writes `<run>/checkpoints/<step>/`; this module adds two files. run.json names the base and the data of the
weights. SHA256SUMS (see `checksums.seal`) shows damage before Orbax reads a checkpoint; Orbax would trust it or use up
all memory.
"""

import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from data_pipeline.common.artefacts import CHECKPOINT, RUN, read_object
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import absolute, as_path, check_bucket, in_bucket
from redvillm_jax.runtime.distributed import is_first, true_everywhere, wait_for_all
from redvillm_jax.training.checksums import SUMS, damaged, seal
from redvillm_jax.training.orbax_files import LAST_FILE, METADATA, STEP, folder_of_unfinished, silence_log

FOLDER = "checkpoints"
DESCRIPTION = "run.json"
DAMAGED = ".corrupt"  # the ending of the name of a checkpoint that was set aside
UNSEALED = (METADATA, LAST_FILE)


def folder(run: str | Path) -> epath.Path:
    """Returns the folder of a run's checkpoints, on a disk or in a bucket."""
    return epath.Path(absolute(run)) / FOLDER


def open_checkpoints(run: str | Path, *, keep: int) -> ocp.training.Checkpointer:
    """Opens a run's checkpoints for saving; the newest `keep` stay on disk."""
    silence_log()
    return ocp.training.Checkpointer(
        folder(run),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def manifest(state: Any) -> dict[str, list[int]]:
    """Returns the shapes of a state by dotted path, to compare a checkpoint with a run before arrays are read."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}


def save(
    checkpoints: ocp.training.Checkpointer,
    step: int,
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    identity: Mapping[str, str],
) -> None:
    """Saves `state` = {"trainable": …, "optimizer": …} in the background; does nothing if the step exists.

    identity: the fingerprints "base" and "data" of the run.
    """
    if any(known.step == step for known in checkpoints.checkpoints):
        return
    description = {"config": config, "identity": identity, "manifest": manifest(state)}
    context = ocp.Context()
    context.asynchronous.post_finalization_callback = functools.partial(
        describe_and_seal, checkpoints.directory, step, json.dumps(description, indent=1) + "\n"
    )
    with context:
        checkpoints.save_checkpointables_async(step, dict(state), force=True)


def describe_and_seal(directory: epath.Path, step: int, description: str) -> None:
    """Adds run.json and SHA256SUMS, after Orbax's files are written and before the folder gets its final name."""
    if is_first():
        where = folder_of_unfinished(directory, step)
        (where / DESCRIPTION).write_text(description)
        seal(where, leave_out=UNSEALED)


def saved_steps(run: str | Path) -> list[int]:
    """Returns the steps of a run's finished checkpoints, the newest first.

    Files, and folders whose names are no steps, are ignored. In a bucket an unfinished checkpoint lacks Orbax's last
    file.
    """
    there = [p for p in entries(run) if re.fullmatch(STEP, p.name)]
    whole = (p for p in there if ((p / LAST_FILE).exists() if in_bucket(run) else p.is_dir()))
    return sorted((int(p.name) for p in whole), reverse=True)


def entries(run: str | Path) -> list[epath.Path]:
    """Lists the folder of a run's checkpoints. Raises UserError when it is a file."""
    where = folder(run)
    if where.is_file():
        raise UserError(f"{where}: is a file, expected a folder or nothing: move it away, then run this again")
    return list(where.iterdir()) if where.is_dir() else []


def restore(
    run: str | Path, state: Mapping[str, Any], *, identity: Callable[[Mapping[str, Any]], Mapping[str, str]]
) -> tuple[int, Mapping[str, Any]]:
    """Reads the newest intact checkpoint as (step, state), with the shapes and shardings of `state`; or (0, state).

    Every process must call it. identity(config): this run's fingerprints under the config of a checkpoint. A damaged
    checkpoint of this run is renamed to `<step>.corrupt`, with a line on stderr, and the one before is read. Raises
    UserError when a checkpoint belongs to another base, to other questions or videos, or to other trainable weights;
    when an intact checkpoint cannot be read; and when all are damaged.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(state))
    found = None
    for step in saved_steps(run):
        where = folder(run) / str(step)
        bad = damaged(where, UNSEALED) if is_first() and found is None else []
        if found is None and true_everywhere(not {SUMS, DESCRIPTION} & set(bad)):
            check_fits(where, manifest(state), identity)
        problem = f"{', '.join(bad[:3])} changed since it was saved" if bad else unlisted(where) if is_first() else ""
        if not true_everywhere(not problem):
            set_aside(where, problem)
        elif found is None:
            found = step, load(where, abstract)
    if found is None:
        refuse_damaged(run)
    return found or (0, state)


def refuse_damaged(run: str | Path) -> None:
    """Raises UserError for a run without checkpoints if damaged ones were set aside."""
    if aside := sorted(p.name for p in entries(run) if re.fullmatch(rf"\d+{DAMAGED}(\.\d+)?", p.name)):
        raise UserError(
            f"{folder(run)}: every checkpoint is damaged ({', '.join(aside[:3])}); put back a copy of one, or, "
            "to start over, delete this folder or give another --workdir"
        )


def unlisted(where: epath.Path) -> str:
    """Returns the reason why Orbax cannot list a checkpoint, or ""; Orbax lists all of them when it opens a run."""
    try:
        with alone():
            ocp.checkpointables_metadata(where)
        if not isinstance(json.loads((where / METADATA).read_text()), dict):
            raise TypeError(f"{METADATA} is no object")
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def load(where: epath.Path, abstract: Any) -> Any:
    """Reads the arrays of an intact checkpoint in the shapes and shardings of `abstract`; each process on its own."""
    try:
        with alone():
            return ocp.load_checkpointables(where, abstract)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{where}: is whole and cannot be read ({reason}); is the disk or the network well?") from error


def newest(checkpoints: ocp.training.Checkpointer) -> str:
    """Returns the folder of the newest checkpoint as text, or "none"; waits for a save in progress."""
    checkpoints.wait()
    return str(checkpoints.latest.path) if checkpoints.latest else "none"


def check_fits(
    where: epath.Path, wanted: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Mapping[str, str]]
) -> None:
    """Raises UserError unless a checkpoint's run.json fits this run. wanted: the run's manifest."""
    saved = read_description(where)
    ours = identity(saved["config"])
    for name, meaning in (("base", "base"), ("data", "data (questions, videos or their order)")):
        if saved["identity"][name] != ours[name]:
            raise UserError(
                f"{where} was trained on {meaning} {saved['identity'][name][:12]}, this command's is "
                f"{ours[name][:12]}; use that {name}, or another --workdir"
            )
    if other := differing(saved["manifest"], wanted):
        raise UserError(
            f"{where} holds other trainable weights than this config: {', '.join(other[:5])} differ; "
            "use the config it was trained with, or another --workdir"
        )


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values differ."""
    return sorted(key for key in a.keys() | b if a.get(key) != b.get(key))


def set_aside(where: epath.Path, problem: str) -> None:
    """Renames a damaged checkpoint: it is then not restored, and can be examined."""
    if is_first():
        names = (f"{where.name}{DAMAGED}{suffix}" for suffix in ("", *(f".{i}" for i in range(2, 1000))))
        aside = next(path for name in names if not (path := where.parent / name).exists())
        where.rename(aside)
        print(f"note: checkpoint {where.name} is damaged ({problem}); set aside as {aside}", file=sys.stderr)
    wait_for_all(f"{where.name} set aside")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which Orbax waits for no other process; if one failed, it would wait for ever."""
    me, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    with context:
        yield


def read_description(where: epath.Path) -> dict[str, Any]:
    """Reads a checkpoint's run.json: "config", "identity", "manifest"."""
    return read_object(where / DESCRIPTION, CHECKPOINT)


def load_trainables(run: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a run's config and, from the newest checkpoint, its trained projectors as nested dicts of numpy arrays.

    Returns (config, {"spatial": {…}, "temporal": {…}, …}); the config also has the checkpoint's "step" and the
    "base_fingerprint" of its base. Raises UserError when the run has no checkpoint, or the newest is damaged.
    """
    run = as_path(run)
    check_bucket(run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: not a run directory (no config.json); give the --workdir of a training run")
    config = read_object(run / "config.json", RUN)
    steps = saved_steps(run)
    if not steps:
        refuse_damaged(run)
        raise UserError(f"{run}: no checkpoint yet; let redvillm_jax.train finish, then run this again")
    where = folder(run) / str(steps[0])
    if bad := damaged(where, UNSEALED):
        raise UserError(f"{where} is damaged ({bad[0]}); the same training command again mends the run")
    saved = ocp.checkpointables_metadata(where).metadata["trainable"]
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
    trained = load(where, {"trainable": abstract})["trainable"]
    said = read_description(where)
    # The checkpoint's config overrides config.json, because hashes cover it; but folders may have moved since.
    config |= {key: said["config"][key] for key in (config.keys() & said["config"].keys()) - {"base", "data"}}
    return config | {"step": steps[0], "base_fingerprint": said["identity"]["base"]}, trained
