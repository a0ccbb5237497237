"""Training checkpoints: trainable weights, optimizer state and step; never a frozen weight.

`<run>/checkpoints/<step>/` is Orbax's, with two files of our own in it: run.json says what the weights belong to, and
SHA256SUMS (see `seal`) tells a damaged checkpoint before Orbax reads it, which would trust it or use up all memory.
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
DAMAGED = ".corrupt"  # stands behind the step in the name of a checkpoint that was set aside
UNSEALED = (METADATA, LAST_FILE)


def folder(run: str | Path) -> epath.Path:
    """Where a run's checkpoints are, on a disk or in a bucket."""
    return epath.Path(absolute(run)) / FOLDER


def open_checkpoints(run: str | Path, *, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints, `<run>/checkpoints/<step>/`; the newest `keep` stay on disk."""
    silence_log()
    return ocp.training.Checkpointer(
        folder(run),
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
    identity: Mapping[str, str],
) -> None:
    """Saves `state` = {"trainable": …, "optimizer": …} in the background; a step that exists is left as it is.

    identity: fingerprints of what the weights belong to, "base" and "data".
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
    """Adds the two files of our own, when all of Orbax's are written and before the folder gets its final name."""
    if is_first():
        where = folder_of_unfinished(directory, step)
        (where / DESCRIPTION).write_text(description)
        seal(where, leave_out=UNSEALED)


def saved_steps(run: str | Path) -> list[int]:
    """The steps of a run's checkpoints, the newest first; in a bucket an unfinished one lacks Orbax's last file.

    What has another name than Orbax gives a step, or is no folder, is none.
    """
    there = [p for p in entries(run) if re.fullmatch(STEP, p.name)]
    whole = (p for p in there if ((p / LAST_FILE).exists() if in_bucket(run) else p.is_dir()))
    return sorted((int(p.name) for p in whole), reverse=True)


def entries(run: str | Path) -> list[epath.Path]:
    """All that lies in the folder of a run's checkpoints."""
    where = folder(run)
    if where.is_file():
        raise UserError(f"{where}: is a file, expected a folder or nothing: move it away, then run this again")
    return list(where.iterdir()) if where.is_dir() else []


def restore(
    run: str | Path, state: Mapping[str, Any], *, identity: Callable[[Mapping[str, Any]], Mapping[str, str]]
) -> tuple[int, Mapping[str, Any]]:
    """The newest whole checkpoint as (step, state), shapes and shardings those of `state`; (0, state) without one.

    identity(config): the fingerprints that this run would have had with the config that a checkpoint was saved with.
    One that fits but is damaged is renamed to `<step>.corrupt`, with a line, and the one before is read. Every process
    must call this. Raises UserError when a checkpoint belongs to another base, to other questions or videos, or to
    other trainable weights, when a whole one cannot be read, and when there are but damaged ones.
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
    """Raises UserError for a run without a checkpoint that had some, all of which were set aside."""
    if aside := sorted(p.name for p in entries(run) if re.fullmatch(rf"\d+{DAMAGED}(\.\d+)?", p.name)):
        raise UserError(
            f"{folder(run)}: every checkpoint is damaged ({', '.join(aside[:3])}); put back a copy of one, or, "
            "to start over, delete this folder or give another --workdir"
        )


def unlisted(where: epath.Path) -> str:
    """Why Orbax cannot list what a checkpoint holds, which it does for all when it opens a run; "" if it can."""
    try:
        with alone():
            ocp.checkpointables_metadata(where)
        if not isinstance(json.loads((where / METADATA).read_text()), dict):
            raise TypeError(f"{METADATA} is no object")
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def load(where: epath.Path, abstract: Any) -> Any:
    """Reads the arrays of a whole checkpoint as `abstract` says; every process for itself."""
    try:
        with alone():
            return ocp.load_checkpointables(where, abstract)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{where}: is whole and cannot be read ({reason}); is the disk or the network well?") from error


def newest(checkpoints: ocp.training.Checkpointer) -> str:
    """The folder of the newest whole checkpoint, in words; waits for one that is being saved."""
    checkpoints.wait()
    return str(checkpoints.latest.path) if checkpoints.latest else "none"


def check_fits(
    where: epath.Path, wanted: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Mapping[str, str]]
) -> None:
    """Raises UserError unless what a checkpoint says of itself fits this run; `wanted` is the run's manifest."""
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
    """The keys whose values are not the same in both."""
    return sorted(key for key in a.keys() | b if a.get(key) != b.get(key))


def set_aside(where: epath.Path, problem: str) -> None:
    """Renames a damaged checkpoint, so that nobody takes it for a whole one and somebody can look at it."""
    if is_first():
        names = (f"{where.name}{DAMAGED}{suffix}" for suffix in ("", *(f".{i}" for i in range(2, 1000))))
        aside = next(path for name in names if not (path := where.parent / name).exists())
        where.rename(aside)
        print(f"note: checkpoint {where.name} is damaged ({problem}); set aside as {aside}", file=sys.stderr)
    wait_for_all(f"{where.name} set aside")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it Orbax waits for no other process, which would be for ever where one fails."""
    me, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
    with context:
        yield


def read_description(where: epath.Path) -> dict[str, Any]:
    """What a checkpoint says of itself: "config", "identity", "manifest"."""
    return read_object(where / DESCRIPTION, CHECKPOINT)


def load_trainables(run: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of a run and its trained projectors as nested dicts of numpy arrays, from the newest checkpoint.

    Returns (config, {"spatial": {…}, "temporal": {…}, …}); the config also says the checkpoint's "step" and the
    "base_fingerprint" that it was trained on. Raises UserError when the run has no checkpoint, or a damaged one.
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
    # The checkpoint's own word, which its hashes cover, goes before config.json's; folders may have moved since.
    config |= {key: said["config"][key] for key in (config.keys() & said["config"].keys()) - {"base", "data"}}
    return config | {"step": steps[0], "base_fingerprint": said["identity"]["base"]}, trained
