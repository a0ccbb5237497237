"""The project's knowledge of Orbax beyond its interface: the names of its files, and its log."""

import logging

from etils import epath

CHECKED = {"orbax-checkpoint": "0.12.8"}  # the version whose files were checked last
METADATA = "_CHECKPOINT_METADATA"  # a JSON object in every checkpoint
LAST_FILE = "commit_success.txt"  # in a bucket, written after all other files
STEP = "0|[1-9][0-9]*"  # a regex: the name of a finished checkpoint's folder


def folder_of_unfinished(directory: epath.Path, step: int) -> epath.Path:
    """Returns the folder of a checkpoint being saved: a temporary name on a disk, the final name in a bucket."""
    found = list(directory.glob(f"{step}.orbax-checkpoint-tmp*"))
    return found[0] if found else directory / str(step)


def silence_log() -> None:
    """Drops Orbax's log, which repeats the errors that the next call raises."""
    logging.getLogger("absl").addFilter(without_orbax)


def without_orbax(record: logging.LogRecord) -> bool:
    """Returns whether a log record is from another library than Orbax."""
    return "orbax" not in record.pathname
