"""Checks whether an existing shard is whole, so that the command that makes a store can make broken shards again.

The shards of a store may be hundreds of gigabytes, so not every byte is read every time. Each check reads the shard's
lines in parts/, its length, the number of its records, and the video of the first record. A shard that was changed
after its lines were written (a copy may look so) is read to its end and compared with its hash, once. Other damage is
found when a record is read, by ArrayRecord's own checksums and the video's id in the record.

A video's file counts as unchanged as long as its size and the time of its last change (ctime, which a copy cannot
keep) are the same, or its hash is the same.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from data_pipeline.common.artefacts import PART, read_object
from data_pipeline.common.errors import UserError


def read_part(
    shard: Path, part_file: Path, sources: Sequence[Mapping[str, Any]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Reads a shard's entry in parts/. sizes: bytes of the store's files by name.

    Raises UserError unless the entry is undamaged, is about these sources, and has the shard's length.
    """
    part = read_object(part_file, PART)
    told = sorted(entry["video"] for entry in (*part["videos"], *part["left_out"]))
    ids = [source["video"] for source in sources]
    if told != sorted(ids) or [source["video"] for source in part.get("sources", sources)] != ids:
        raise UserError(f"{part_file}: is about other videos")
    if sizes[shard.name] != part.get("bytes", sizes[shard.name]):
        raise UserError(f"{shard}: has {sizes[shard.name]} bytes, expected {part['bytes']}")
    return part


def check_shard(shard: Path, part_file: Path, part: Mapping[str, Any], features: tfds.features.FeaturesDict) -> None:
    """Raises UserError when a local shard does not fit its entry `part`, as far as the checks above go."""
    if "sha256" in part and shard.stat().st_mtime_ns >= part_file.stat().st_mtime_ns:
        if sha256(shard) != part["sha256"]:
            raise UserError(f"{shard}: was changed after it was written")
        os.utime(part_file)
    try:
        reader = ArrayRecordReader(str(shard))
        count = reader.num_records()
        record = features.deserialize_example_np(reader.read([0])[0]) if count else {"video": b""}
    except Exception as error:  # of many kinds, as when a store is read
        raise UserError(f"{shard}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    first = part["videos"][0]["video"] if part["videos"] else ""
    if (count, record["video"].decode()) != (len(part["videos"]), first):
        raise UserError(f"{shard}: holds other videos than {part_file} says")


def replaced_video(
    before: Sequence[Mapping[str, Any]],
    now: Sequence[Mapping[str, Any]],
    part: Mapping[str, Any],
    digest: Callable[[Mapping[str, Any]], str | None],
) -> str | None:
    """The first video whose file was replaced after it was decoded, None when no replacement can be seen.

    before, now: the shard's sources when it was written, and today's. digest: the SHA-256 of a source's file today,
    or None when it cannot be read.
    """
    hashes = {entry["video"]: entry.get("sha256") for entry in (*part["videos"], *part["left_out"])}
    for old, new in zip(before, now, strict=True):
        if new.get("changed") == 0 or (
            old["bytes"] == new["bytes"] and old.get("changed") in (None, new.get("changed"))
        ):
            continue
        known = hashes[new["video"]]
        if old["bytes"] != new["bytes"] or (known is not None and digest(new) not in (known, None)):
            return new["video"]
    return None


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
