"""Google Cloud Storage: fsspec's file system, and the requests that it has no method for.

Those go through gcsfs' own `call`, which sends a request of the storage API and is not documented.
"""

import os

import fsspec
from etils import epath

CHECKED = {"gcsfs": "2026.10.1", "etils": "1.15.0"}  # the versions that this file was last run with

# A listing is never remembered: other hosts, and Orbax by its own client, write into the same folders.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
# gcsfs would ask by gRPC what kind of bucket it is, a minute each time where that is blocked; only zonal ones need it.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def bucket_files() -> fsspec.AbstractFileSystem:
    """The file system of gs:// paths."""
    return epath.backend.fsspec_backend.fs("gs://")


def list_one(bucket: str, prefix: str) -> None:
    """Lists at most one object; raises what gcsfs raises where the bucket is missing or may not be listed."""
    bucket_files().call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1)


def read_metadata(bucket: str) -> None:
    """Asks for the bucket itself; raises what gcsfs raises where that is not allowed."""
    bucket_files().call("GET", "b/{}", bucket)


def write_over(bucket: str, name: str, content: bytes, generation: int) -> int | None:
    """Writes an object if it still has this generation (0: if there is none); its new generation, else None."""
    files = bucket_files()
    try:
        made = files.call(
            "POST",
            f"{files._location}/upload/storage/v1/b/{{}}/o",
            bucket,
            uploadType="media",
            name=name,
            ifGenerationMatch=generation,
            data=content,
            json_out=True,
        )
    except FileExistsError:  # what gcsfs makes of a precondition that does not hold
        return None
    return int(made["generation"])


def read_object(bucket: str, name: str) -> tuple[bytes, int] | None:
    """An object's content and its generation, None if there is no such object."""
    try:
        headers, content = bucket_files().call("GET", "b/{}/o/{}", bucket, name, alt="media")
    except FileNotFoundError:
        return None
    return bytes(content), int(headers["X-Goog-Generation"])


def delete_object(bucket: str, name: str, generation: int) -> None:
    """Removes an object that has this generation."""
    bucket_files().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)
