"""Checks that all processes of a run see one folder, and that they can write, rename and delete in it."""

import contextlib
import secrets
from pathlib import Path

import jax
from etils import epath

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import make_folder
from redvillm_jax.runtime.consensus import Failed, gather, together


def require_shared(flag: str, folder: str | Path) -> None:
    """Raises UserError in every process unless all of them write to one and the same folder."""
    if jax.process_count() == 1:
        return
    try:
        check_folder(epath.Path(folder))
    except Failed as error:
        raise UserError(f"{flag}: {error}") from None


def check_folder(workdir: epath.Path) -> str:
    """Checks that every process can write, read, rename, list and delete below `workdir`, and sees all files."""
    folder = workdir / f"check-{gather(secrets.token_hex(4))[0]}"
    mine, count = jax.process_index(), jax.process_count()

    def write() -> None:
        make_folder(folder)
        temporary = folder / f"{mine}.tmp"
        temporary.write_text(f"{folder.name} {mine}")
        temporary.replace(folder / f"{mine}.txt")

    def read() -> None:
        listed = sorted(path.name for path in folder.iterdir())
        for process in range(count):
            if f"{process}.txt" not in listed:
                raise Failed(
                    f"{workdir} lacks the file of process {process}: it must be one folder that all processes see, "
                    "in a bucket (gs://) or on a disk that all machines mount"
                )
            if (folder / f"{process}.txt").read_text() != f"{folder.name} {process}":
                raise Failed(f"{folder}/{process}.txt reads back differently")
        if len(listed) != count:
            raise Failed(f"{folder} holds {', '.join(listed)}: renaming left something behind")

    def delete() -> None:
        (folder / f"{mine}.txt").unlink()
        if (folder / f"{mine}.txt").exists():
            raise Failed(f"{folder}/{mine}.txt is still there after deletion")

    try:
        for part in (write, read, delete):
            together(part)
    finally:
        with contextlib.suppress(Exception):  # the failure itself is reported already
            folder.rmtree(missing_ok=True)
    return f"{workdir}: {count} process(es) wrote, read, renamed, listed and deleted"
