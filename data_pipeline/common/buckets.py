"""Local copies of folders in buckets (gs://), for readers that need a disk."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from tqdm import tqdm

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import (
    as_path,
    cache_folder,
    check_bucket,
    explained,
    in_bucket,
    temporary_name,
)
from data_pipeline.common.gcs import bucket_files

DOWNLOADS = 8  # at once


def local_copy(path: str | Path) -> Path:
    """Returns a local path unchanged, and copies a folder in a bucket to this host's cache.

    A file in the cache is not read again as long as the bucket holds the same generation of it. Files that the bucket
    no longer holds are deleted. Processes of one host wait for the first of them. Raises UserError for a missing bucket
    or folder.
    """
    if not in_bucket(path):
        return as_path(path)
    check_bucket(path)
    name = str(path).removeprefix("gs://").rstrip("/")
    cache = cache_folder()
    folder = cache / name
    with explained(path), locked(cache):
        objects = bucket_files().find(name, detail=True)
        files = {
            folder / Path(key).relative_to(name): found
            for key, found in objects.items()
            if key != name and not key.endswith("/")  # the empty objects that some tools make for folders
        }
        if not files:
            raise UserError(f"{path}: nothing is there; see gcloud storage ls {path}")
        missing = {file: found for file, found in files.items() if not same(file, found)}
        download(missing, f"copy {path}")
        for file in folder.rglob("*"):
            if file.is_file() and file not in files:
                file.unlink()
    return folder


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Lets one process of this host at a time change the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def nanoseconds(found: dict[str, Any]) -> int:
    """The modification time of an object's copy: its generation, which counts microseconds."""
    return int(found["generation"]) * 1000


def same(file: Path, found: dict[str, Any]) -> bool:
    """Whether a local file is a whole copy of an object's present generation."""
    return file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (found["size"], nanoseconds(found))


class Progress(Callback):
    """Moves a progress bar by the received bytes."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def relative_update(self, inc: int = 1) -> None:
        self.bar.update(inc)


def download(files: dict[Path, dict[str, Any]], title: str) -> None:
    """Downloads objects, several at once; a file has its name only when it is whole."""

    def fetch(file: Path) -> None:
        found, temporary = files[file], temporary_name(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        generation = found["generation"]  # not a later one that may have replaced it since the listing
        bucket_files().get_file(found["name"], str(temporary), callback=Progress(bar), generation=generation)
        if temporary.stat().st_size != found["size"]:
            raise OSError(f"{found['name']}: {temporary.stat().st_size} of {found['size']} bytes came")
        os.utime(temporary, ns=(nanoseconds(found), nanoseconds(found)))
        os.replace(temporary, file)

    total = sum(found["size"] for found in files.values())
    options = {"unit": "B", "unit_scale": True, "disable": not files, "dynamic_ncols": True}
    with tqdm(total=total, desc=title, **options) as bar, ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(fetch, files):
            pass
