"""A store of videos: a folder of ArrayRecord shards, one record a video, that TFDS reads as well.

    dataset_info.json  features.json  frames-train.array_record-0000i-of-0000n     TFDS's, split "train"
    videos.jsonl        one line a record, in record order
    instructions.jsonl  the questions on these videos
    report.json         what was found, used and left out
    store.json          how the records were made; written last, so that a folder with it is whole
    parts/              what a restart needs: plan.json, and per shard the lines of its videos

A record of kind "frames" (data_pipeline.prepare) is {"video": text, "frames": (n, S, S, 3) uint8, "timestamps": (n,)
float32 seconds from its file's first frame}; of kind "streams" (redvillm_jax.encode) {"video": text, and per stream
(m, D) features}.
"""

import functools
import hashlib
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from data_pipeline.errors import UserError
from data_pipeline.files import as_path, check_bucket, explained, in_bucket, make_folder, write_text, written_whole
from data_pipeline.locks import is_lock

FORMATS = ("jpeg", "raw")
VIDEOS_PER_SHARD = 64

Source = dict[str, Any]  # {"video": id, "source": relative file, "bytes": its size, and of a part "start", "end"}
Result = dict[str, Any]  # {"line": of videos.jsonl, "record": its arrays, "note": if any} or {"reason": why not}


class Shards(NamedTuple):
    """What the shards that are there hold.

    videos: lines of videos.jsonl. left_out: sources with "reason". notes: sources with "note". missing: how many shards
    of `total` are not there.
    """

    videos: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    missing: int
    total: int


class VideoStore:
    """A whole store: `store[i]` is record i. Opened lazily and pickled as its path, for Grain's workers."""

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        if not (self.path / "store.json").is_file():
            half = (self.path / "parts" / "plan.json").is_file()
            problem = "is not finished: run the command that makes it again" if half else "is not a store of videos"
            raise UserError(f"{self.path}: {problem} (python -m data_pipeline.prepare --help)")
        self.meta: dict[str, Any] = _read_json(self.path / "store.json")
        shards = {_shard(self.path, self.meta["kind"], part.stem).name for part in self.path.glob("parts/*-of-*.json")}
        if missing := sorted(shards - _names(self.path)):
            raise UserError(f"{self.path}: {missing[0]} is missing; run the command that makes the store again")

    @functools.cached_property
    def videos(self) -> list[dict[str, Any]]:
        """The lines of videos.jsonl, by record index."""
        return _read_lines(self.path / "videos.jsonl")

    @functools.cached_property
    def instructions(self) -> list[dict[str, Any]]:
        """The questions, each on a video of the store."""
        return _read_lines(self.path / "instructions.jsonl")

    @functools.cached_property
    def _records(self):
        logging.getLogger("absl").addFilter(lambda record: "OpenCV" not in str(record.msg))  # PIL will do
        return tfds.builder_from_directory(self.path).as_data_source("train")

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"video": str, …}: the record's arrays as the module's docstring lists them."""
        record = self._records[index]
        return {name: value.decode() if name == "video" else np.asarray(value) for name, value in record.items()}

    def padded(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads records into arrays of static shape, zeros where a record is shorter or the index is -1.

        Returns num_frames: (n,) int32, 0 = no video, and frames: (n, T, S, S, 3) uint8, or the streams,
        (n, M, D) each.
        """
        shapes = _shapes(self.meta)
        out = {name: np.zeros((len(indices), *shape), dtype) for name, (shape, dtype) in shapes.items()}
        out["num_frames"] = np.zeros(len(indices), np.int32)
        for i, index in enumerate(indices):
            if index < 0:
                continue
            record = self[index]
            for name in shapes:
                out[name][i, : len(record[name])] = record[name]
            out["num_frames"][i] = self.videos[index]["num_frames"]
        return out

    def __reduce__(self):
        return VideoStore, (self.path,)


def open_store(path: str | Path) -> VideoStore:
    """Opens a store for reading, on a disk or in a bucket. Raises UserError for what is none, or not finished."""
    check_bucket(path)
    with explained(path):
        return VideoStore(path)


def encode_frames(frames: np.ndarray, format: str, quality: int | None) -> np.ndarray | list[bytes]:
    """Turns (n, S, S, 3) uint8 into what a record holds: a JPEG per frame (no chroma subsampling), or itself."""
    if format == "raw":
        return frames
    images = [io.BytesIO() for _ in frames]
    for frame, image in zip(frames, images, strict=True):
        Image.fromarray(frame).save(image, "JPEG", quality=quality, subsampling=0)
    return [image.getvalue() for image in images]


def check_plan(path: str | Path, settings: dict[str, Any], sources: list[Source]) -> None:
    """Raises UserError unless `path` is absent, empty, or a store (whole or begun) of just this plan."""
    path = as_path(path)
    if not path.exists():
        return
    if not (path / "parts" / "plan.json").is_file():
        if path.is_dir() and {name for name in _names(path) if not is_lock(name)} <= {"parts"}:
            return  # empty, or another run is about to write its plan, the same as ours
        raise UserError(f"{path}: exists and is not a store of videos; choose another --out")
    made = _read_json(path / "parts" / "plan.json")
    differs = [
        f"{name}={made['settings'].get(name)} (now {value})"
        for name, value in settings.items()
        if made["settings"].get(name) != value
    ]
    before, now = ({tuple(source.values()) for source in plan} for plan in (made["sources"], sources))
    if changed := sorted({video for video, *_ in before ^ now}):
        differs.append(f"other videos ({len(changed)} added, removed or changed, the first: {changed[0]})")
    if differs:
        raise UserError(f"{path}: was made with {', '.join(differs)}; choose another --out or delete it")


def write_shards(
    path: str | Path,
    settings: dict[str, Any],
    sources: list[Source],
    encode: Callable[[list[Source]], Iterable[Result]],
    *,
    shard: tuple[int, int] = (1, 1),
) -> Shards:
    """Writes the shards that are missing and returns what is then there.

    settings: "kind" and all that the records depend on. sources: in record order; a video's place decides its
    shard. encode: called once with the sources of all shards to be written, yields their results in order. shard:
    (i, n) writes the i-th of every n shards only, as one of n runs that share the folder.
    A shard has its name only when it is whole, and then `parts/` has the lines of its videos.
    """
    path, (number, count) = as_path(path), shard
    check_bucket(path)
    check_plan(path, settings, sources)
    shards, names = _split(sources)
    files = [_shard(path, settings["kind"], name) for name in names]
    make_folder(path / "parts")
    write_text(path / "parts" / "plan.json", _json({"settings": settings, "sources": sources}))
    there = _names(path)
    missing = [i for i, file in enumerate(files) if file.name not in there and i % count == number - 1]
    if missing:
        (path / "store.json").unlink(missing_ok=True)  # one that is there describes shards that were deleted
    results = iter(encode([source for i in missing for source in shards[i]]))
    features = _features(settings)
    for i in missing:
        pairs = zip(shards[i], itertools.islice(results, len(shards[i])), strict=True)
        _write_shard(files[i], path / "parts" / f"{names[i]}.json", features, pairs)
    return read_shards(path, settings, sources)


def read_shards(path: str | Path, settings: dict[str, Any], sources: list[Source]) -> Shards:
    """What the shards that are there hold, whoever wrote them; the arguments are those of `write_shards`."""
    path, (_, names) = as_path(path), _split(sources)
    there = _names(path)
    whole = [name for name in names if _shard(path, settings["kind"], name).name in there]
    parts = [_read_json(path / "parts" / f"{name}.json") for name in whole]
    kinds = ([line for part in parts for line in part.get(kind, [])] for kind in ("videos", "left_out", "notes"))
    return Shards(*kinds, missing=len(names) - len(whole), total=len(names))


def _split(sources: list[Source]) -> tuple[list[list[Source]], list[str]]:
    """The sources of each shard, and the shards' names."""
    shards = [sources[i : i + VIDEOS_PER_SHARD] for i in range(0, len(sources), VIDEOS_PER_SHARD)]
    return shards, [f"{i:05d}-of-{len(shards):05d}" for i in range(len(shards))]


def _write_shard(shard: Path, part_file: Path, features: Any, pairs: Iterable[tuple[Source, Result]]) -> None:
    """Writes one shard and the lines of its videos, the lines first: whoever sees the shard finds them."""
    part: dict[str, Any] = {"videos": [], "left_out": [], "notes": [], "num_bytes": 0}
    with written_whole(shard) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for source, result in pairs:
            if "reason" in result:
                part["left_out"].append({**source, "reason": result["reason"]})
                continue
            if "note" in result:
                part["notes"].append({**source, "note": result["note"]})
            record = _serialize(features, {"video": source["video"], **result["record"]})
            writer.write(record)
            part["num_bytes"] += len(record)
            part["videos"].append(result["line"])
        writer.close()
        write_text(part_file, _json(part))


def finish_store(
    path: str | Path,
    settings: dict[str, Any],
    videos: list[dict[str, Any]],
    instructions: list[dict[str, Any]],
    report: dict[str, Any],
) -> None:
    """Writes what describes the shards, store.json last; running it again changes nothing.

    store.json holds the settings and a fingerprint of settings, videos and instructions.
    """
    path = as_path(path)
    if not (path / "store.json").is_file():
        for name, text in _tfds_metadata(path, settings).items():
            write_text(path / name, text)
    texts = {"videos.jsonl": _lines(videos), "instructions.jsonl": _lines(instructions)}
    described = _json(settings) + "".join(texts.values())
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    texts |= {"report.json": _json(report), "store.json": _json({**settings, "fingerprint": fingerprint})}
    for name, text in texts.items():
        write_text(path / name, text)
    if in_bucket(path):
        return
    for leftover in path.glob("*.array_record-*.tmp"):  # of runs that were killed: all shards are there
        leftover.unlink(missing_ok=True)


def _tfds_metadata(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The files that TFDS wants beside the shards, made elsewhere: it would not write them whole or not at all."""
    parts = {file.stem: _read_json(file) for file in sorted(path.glob("parts/*-of-*.json"))}
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(part["videos"]) for part in parts.values()],
        num_bytes=sum(part["num_bytes"] for part in parts.values()),
    )
    with tempfile.TemporaryDirectory(prefix="redvillm_jax.") as folder:
        shards = [_shard(Path(folder), settings["kind"], name) for name in parts]
        for shard in shards:
            shard.touch()  # it looks at their names
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=_features(settings), split_infos=[split], check_data=False
        )
        written = sorted(set(Path(folder).iterdir()) - set(shards))
        return {file.name: file.read_text(encoding="utf-8") for file in written}


def _names(path: Path) -> set[str]:
    """The names in a folder, by one listing."""
    return {file.name for file in path.iterdir()}


def _shard(path: Path, kind: str, name: str) -> Path:
    return path / f"{kind}-train.array_record-{name}"


def _shapes(settings: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The longest shape and the dtype of what a model reads from a record."""
    if settings["kind"] == "streams":
        dtype = np.dtype(settings["dtype"])
        return {name: (tuple(shape), dtype) for name, shape in settings["streams"].items()}
    size = settings["image_size"]
    return {"frames": ((settings["num_frames"], size, size, 3), np.dtype(np.uint8))}


def _features(settings: dict[str, Any]) -> tfds.features.FeaturesDict:
    if settings["kind"] == "streams":
        arrays = {
            name: tfds.features.Tensor(shape=(None, shape[-1]), dtype=dtype, encoding="bytes")
            for name, (shape, dtype) in _shapes(settings).items()
        }
        return tfds.features.FeaturesDict({"video": tfds.features.Text(), **arrays})
    shape = (settings["image_size"], settings["image_size"], 3)
    if settings["format"] == "raw":
        frames = tfds.features.Tensor(shape=(None, *shape), dtype=np.uint8, encoding="bytes")
    else:
        frames = tfds.features.Sequence(tfds.features.Image(shape=shape, encoding_format="jpeg"))
    timestamps = tfds.features.Tensor(shape=(None,), dtype=np.float32)
    return tfds.features.FeaturesDict({"video": tfds.features.Text(), "frames": frames, "timestamps": timestamps})


def _serialize(features: tfds.features.FeaturesDict, record: dict[str, Any]) -> bytes:
    """TFDS's own bytes of a record with the fields in order: protobuf's own order changes from process to process."""
    serializer = ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; delete the store and make it again") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
