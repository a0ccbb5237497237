"""What the project knows of Orbax beyond its interface: the names of its files, and what it logs."""

import logging

from etils import epath

CHECKED = {"orbax-checkpoint": "0.12.8"}  # the version whose files were last looked at
METADATA = "_CHECKPOINT_METADATA"  # a JSON object in every checkpoint
LAST_FILE = "commit_success.txt"  # in a bucket, written when the rest is whole
STEP = "0|[1-9][0-9]*"  # a regex: the name of a whole checkpoint's folder


def folder_of_unfinished(directory: epath.Path, step: int) -> epath.Path:
    """Where a checkpoint is being written: under another name on a disk, in a bucket under its own from the start."""
    found = list(directory.glob(f"{step}.orbax-checkpoint-tmp*"))
    return found[0] if found else directory / str(step)


def silence_log() -> None:
    """Drops Orbax's log, which says many times what the next call raises."""
    logging.getLogger("absl").addFilter(without_orbax)


def without_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of the log is not Orbax's."""
    return "orbax" not in record.pathname
