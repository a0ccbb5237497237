"""Paths on local disks and in buckets (gs://), and atomic writing of files."""

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from data_pipeline.common import gcs
from data_pipeline.common.errors import UserError, full_disk

CACHE = "REDVILLM_CACHE"  # the environment variable that names another folder for `cache_folder`


def as_path(path: str | Path) -> Path:
    """A path on a local disk, or in a bucket if it begins with gs://."""
    return epath.Path(path) if in_bucket(path) else Path(path)


def in_bucket(path: str | Path) -> bool:
    """Whether a path begins with gs://."""
    return str(path).startswith("gs://")


def absolute(path: str | Path) -> Path:
    """The absolute path. A path in a bucket is absolute already."""
    path = as_path(path)
    return path if in_bucket(path) else path.absolute()


def cache_folder() -> Path:
    """The folder for copies and remembered results: $REDVILLM_CACHE, or redvillm_jax in $XDG_CACHE_HOME."""
    if folder := os.environ.get(CACHE):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "redvillm_jax"


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turns an error about a path in a bucket into a UserError. Errors about local paths are raised as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError):
            problem = f"gs:// needs gcsfs ({reason}): pip install -e '.[tpu]'"
        elif isinstance(error, FileNotFoundError):
            problem = "no such bucket, or nothing of that name in it; see gcloud storage ls"
        elif reason.startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
            roles = "roles/storage.objectUser and roles/storage.legacyBucketReader"
            problem = f"no permission ({reason}): grant the machine's service account {roles}"
        else:
            problem = f"{type(error).__name__}: {reason}"
        raise UserError(f"{path}: {problem}") from error


def check_bucket(path: str | Path) -> None:
    """Raises UserError unless the bucket of a gs:// path exists and may be listed. Local paths pass."""
    if in_bucket(path):
        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        if not bucket:
            raise UserError(f"{path}: has no bucket, expected gs://BUCKET/FOLDER")
        with explained(path):
            gcs.list_one(bucket, name)


def make_folder(path: str | Path) -> None:
    """Makes a local folder and its parents. In a bucket, which has no folders, checks the permissions for writing.

    The bucket's own metadata must be readable, because Orbax reads it when it deletes or repairs checkpoints.
    """
    if in_bucket(path):
        check_bucket(path)
        with explained(path):
            gcs.read_metadata(str(path).split("/")[2])
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if full_disk(error):
            raise
        raise UserError(f"{path}: this folder cannot be made ({error.strerror}); choose another") from None


def file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of a folder's files, by name, from one listing. Files that vanish meanwhile are left out."""
    if in_bucket(folder):
        with explained(folder):
            found = gcs.bucket_files().ls(str(folder), detail=True)
        return {file["name"].rstrip("/").rpartition("/")[2]: file["size"] for file in found}
    sizes = {}
    for file in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            sizes[file.name] = file.stat().st_size
    return sizes


def temporary_name(path: Path) -> Path:
    """A temporary name beside `path`, unique to this process even on a disk that several hosts share."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary local name. When the block ends, the file is renamed to `path` or copied to its bucket."""
    if not in_bucket(path):
        temporary = temporary_name(path)
        try:
            yield temporary
            if path.is_dir():
                raise UserError(f"{path}: is a folder, expected a file or nothing: move it away, then run this again")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="redvillm_jax.") as folder:
        temporary = Path(folder, path.name)
        yield temporary
        with explained(path):
            gcs.bucket_files().put_file(str(temporary), str(path))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    if in_bucket(path):
        with explained(path):
            gcs.bucket_files().pipe_file(str(path), text.encode())
        return
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
