"""A store of videos: a folder of ArrayRecord shards with one record a video, which TFDS can read as well.

    dataset_info.json  features.json  frames-train.array_record-0000i-of-0000n     TFDS's, split "train"
    videos.jsonl        one line a record, in record order
    instructions.jsonl  the questions on these videos
    report.json         the videos and questions that were found, used and left out
    store.json          the settings of the records and the contents of the shards; it is written last, so a folder
                        with it is whole
    parts/              the state for a restart: plan.json, and for each shard the lines of its videos and its hash

A record of kind "frames" (data_pipeline.prepare) is {"video": text, "frames": (n, S, S, 3) uint8, "timestamps": (n,)
float32 seconds from its file's first frame}; of kind "streams" (redvillm_jax.encode) {"video": text, and per stream
(m, D) features}.
"""

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers "bfloat16" with numpy
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from data_pipeline.common.artefacts import (
    PLAN,
    QUESTION,
    STORE,
    VIDEO,
    Form,
    parse_lines,
    read_bytes,
    read_object,
    with_checksum,
)
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import (
    as_path,
    check_bucket,
    explained,
    file_sizes,
    in_bucket,
    make_folder,
    write_text,
    written_whole,
)
from data_pipeline.common.locks import is_lock
from data_pipeline.shard_checks import check_shard, read_part, replaced_video, sha256

CHECKED = {"array_record": "0.8.6", "tensorflow-datasets": "4.9.10"}  # whose messages and inner parts were last seen
FORMATS = ("jpeg", "raw")
VIDEOS_PER_SHARD = 64
KINDS = ("videos", "left_out", "notes")  # the kinds of lines in a shard's entry of parts/

# {"video": id, "source": relative file, "bytes": its size, "changed": when, in ns, and of a part "start" and "end"}
Source = dict[str, Any]
# {"line": of videos.jsonl, "record": its arrays, "note": if any} or {"reason": why not, "sha256": of the file, if any}
Result = dict[str, Any]


class Shards(NamedTuple):
    """The contents of the existing shards.

    videos: lines of videos.jsonl. left_out: sources with "reason". notes: sources with "note". missing: the number of
    shards, of `total`, that are missing or broken. parts: the entries of parts/ for the other shards, by name.
    """

    videos: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    missing: int
    total: int
    parts: dict[str, dict[str, Any]]


class VideoStore:
    """A whole store: `store[i]` is record i. It is read lazily, and pickled as its path for Grain's workers."""

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        if not (self.path / "store.json").is_file():
            half = (self.path / "parts" / "plan.json").is_file()
            problem = "is not finished: run the command that makes it again" if half else "is not a store of videos"
            raise UserError(f"{self.path}: {problem} (python -m data_pipeline.prepare --help)")
        self.meta: dict[str, Any] = read_object(self.path / "store.json", STORE)
        self._known: dict[str, dict[str, int]] = self.meta.pop("shards", {})
        self._readers: dict[str, ArrayRecordReader] = {}

    def check(self) -> None:
        """Raises UserError unless all shards exist with their lengths, and the files of lines belong to the store.

        Reads no record; a damaged record is found when it is read.
        """
        there = file_sizes(self.path)
        for name in self._shards:
            if name not in there:
                raise UserError(f"{self.path}: {name} is missing; {STORE.remedy}")
            wanted = self._known.get(name, {}).get("bytes", there[name])
            if there[name] != wanted:
                raise UserError(f"{self.path / name}: has {there[name]} bytes, expected {wanted}; {STORE.remedy}")
        self.videos, videos = self._read("videos.jsonl", VIDEO)
        self.instructions, instructions = self._read("instructions.jsonl", QUESTION)
        settings = {name: value for name, value in self.meta.items() if name != "fingerprint"}
        if self.meta["fingerprint"] != _fingerprint(settings, videos, instructions):
            raise UserError(
                f"{self.path}: store.json, videos.jsonl and instructions.jsonl do not belong together; {STORE.remedy} "
                "(to change questions, change the files that it reads)"
            )

    @functools.cached_property
    def videos(self) -> list[dict[str, Any]]:
        """The lines of videos.jsonl, by record index."""
        return self._read("videos.jsonl", VIDEO)[0]

    @functools.cached_property
    def instructions(self) -> list[dict[str, Any]]:
        """The instructions, each about a video of the store."""
        return self._read("instructions.jsonl", QUESTION)[0]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns {"video": str, …} with the record's arrays, as listed in the module's docstring.

        Raises UserError for a record that cannot be read, or that belongs to another video, as in an exchanged shard.
        """
        video = self.videos[index]["video"]
        shard = bisect.bisect_right(self._ends, index)
        file, place = self.path / self._shards[shard], index - (self._ends[shard - 1] if shard else 0)
        where = f"{file}: record {place}, {video!r},"
        mend = "delete this shard, then run the command that made the store again: it makes what is missing"
        try:
            stored = self._reader(file.name).read([place])[0]
        except RuntimeError as error:
            damaged = re.search(r"Corrupted|Invalid|at least 64KB", str(error))
            raise UserError(
                f"{where} cannot be read ({_short(error)}); {mend if damaged else 'check the disk or the network'}"
            ) from None
        try:
            record = self._features.deserialize_example_np(stored)
            record = {name: x.decode() if name == "video" else np.asarray(x) for name, x in record.items()}
        except Exception as error:  # of many kinds: the message, its fields, their pictures
            raise UserError(f"{where} cannot be read ({_short(error)}); {mend}") from None
        if record["video"] != video:
            raise UserError(f"{where} is that of {record['video']!r}; {mend}")
        for name, (shape, _) in _shapes(self.meta).items():
            wanted = (self.videos[index]["num_frames"], *shape[1:]) if name == "frames" else shape
            if record[name].shape != wanted:
                raise UserError(f"{where} has {name} of shape {record[name].shape}, expected {wanted}; {mend}")
        return record

    def seconds(self, index: int) -> list[float]:
        """The times of a video's frames, from its first on, NaN where the file does not say.

        A store of streams has them where they were encoded for a representation with text between the visual tokens.
        """
        if self.meta["kind"] == "frames":
            return self[index]["timestamps"].tolist()
        if "seconds" not in self.videos[index]:
            raise UserError(f"{self.path}: does not say when frames are shown; encode the frames again")
        return [math.nan if at is None else at for at in self.videos[index]["seconds"]]

    def padded(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Reads records into arrays of static shape, filled with zeros after shorter records and for the index -1.

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

    @functools.cached_property
    def _features(self) -> tfds.features.FeaturesDict:
        return _features(self.meta)

    @functools.cached_property
    def _shards(self) -> list[str]:
        """The names of the shards, in record order."""
        parts = [] if self._known else self.path.glob("parts/*-of-*.json")  # store.json may be older than "shards"
        return sorted(self._known or (_shard(self.path, self.meta["kind"], part.stem).name for part in parts))

    @functools.cached_property
    def _ends(self) -> list[int]:
        """For each shard, one more than the index of its last record."""
        known = self._known
        counts = (known[n]["records"] if n in known else self._reader(n).num_records() for n in self._shards)
        ends = list(itertools.accumulate(counts))
        if ends[-1] != len(self.videos):
            raise UserError(f"{self.path}: has {ends[-1]} records, videos.jsonl {len(self.videos)}; {STORE.remedy}")
        return ends

    def _reader(self, name: str) -> ArrayRecordReader:
        """The reader of a shard, opened when it is first needed."""
        if name not in self._readers:
            options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}  # for any order
            self._readers[name] = ArrayRecordReader(str(self.path / name), **options)
        return self._readers[name]

    def _read(self, name: str, form: Form) -> tuple[list[dict[str, Any]], bytes]:
        """The objects in a file of lines, and the file's content."""
        content = read_bytes(self.path / name, form)
        return parse_lines(self.path / name, content, form), content


def open_store(path: str | Path) -> VideoStore:
    """Opens a store for reading, on a disk or in a bucket. Raises UserError when it is no store, or not whole."""
    check_bucket(path)
    with explained(path):
        store = VideoStore(path)
        store.check()
    return store


def encode_frames(frames: np.ndarray, format: str, quality: int | None) -> np.ndarray | list[bytes]:
    """Encodes (n, S, S, 3) uint8 for a record: one JPEG per frame (no chroma subsampling), or the array itself."""
    if format == "raw":
        return frames
    images = [io.BytesIO() for _ in frames]
    for frame, image in zip(frames, images, strict=True):
        Image.fromarray(frame).save(image, "JPEG", quality=quality, subsampling=0)
    return [image.getvalue() for image in images]


def check_plan(path: str | Path, settings: dict[str, Any], sources: list[Source]) -> list[Source]:
    """Returns the sources of the store at `path` as they were when the store was begun, [] without a store.

    The store may be whole or begun. Raises UserError when `path` holds something else, or a store of another plan.
    """
    path = as_path(path)
    if not path.exists():
        return []
    if not (path / "parts" / "plan.json").is_file():
        if path.is_dir() and {name for name in _names(path) if not is_lock(name)} <= {"parts"}:
            return []  # empty, or another run is about to write its plan, the same as ours
        raise UserError(f"{path}: exists and is not a store of videos; choose another --out")
    made = read_object(path / "parts" / "plan.json", PLAN)
    differs = [
        f"{name}={made['settings'].get(name)} (now {value})"
        for name, value in settings.items()
        if made["settings"].get(name) != value
    ]
    keys = ("video", "source", "start", "end")
    before, now = ({tuple(map(source.get, keys)) for source in plan} for plan in (made["sources"], sources))
    if changed := sorted({video for video, *_ in before ^ now}):
        differs.append(f"other videos ({len(changed)} added, removed or moved, the first: {changed[0]})")
    if differs:
        raise UserError(f"{path}: was made with {', '.join(differs)}; choose another --out or delete it")
    return made["sources"]


def write_shards(
    path: str | Path,
    settings: dict[str, Any],
    sources: list[Source],
    encode: Callable[[list[Source]], Iterable[Result]],
    *,
    shard: tuple[int, int] = (1, 1),
    digest: Callable[[Source], str | None] = lambda source: None,
) -> Shards:
    """Writes the missing and broken shards, and returns the contents of all existing shards.

    settings: "kind" and everything that the records depend on. sources: in record order; a video's place decides its
    shard. encode: called once with the sources of all shards to be written, yields their results in order. shard:
    (i, n) writes the i-th of every n shards only, as one of n runs that share the folder. digest: the SHA-256 of a
    source's file as it is today, or None when it cannot be read.
    A shard has its name only when it is whole, and then `parts/` has the lines of its videos. Raises UserError when a
    video's file has been replaced since it was decoded.
    """
    path, (number, count) = as_path(path), shard
    check_bucket(path)
    shards, names = _split(sources)
    planned, _ = _split(check_plan(path, settings, sources) or sources)
    files = [_shard(path, settings["kind"], name) for name in names]
    make_folder(path / "parts")
    if not (path / "parts" / "plan.json").exists():
        plan = [{key: value for key, value in source.items() if key != "changed"} for source in sources]
        write_text(path / "parts" / "plan.json", _json({"settings": settings, "sources": plan}))
    sizes, features, broken, replaced = file_sizes(path), _features(settings), {}, {}
    mine = range(number - 1, len(names), count)
    for i in mine:
        try:
            if files[i].name in sizes:
                part = read_part(files[i], _part(path, names[i]), shards[i], sizes)
                if not in_bucket(path):  # a bucket keeps checksums itself
                    check_shard(files[i], _part(path, names[i]), part, features)
                before = part.get("sources", planned[i])
                if video := replaced_video(before, shards[i], part, digest):
                    replaced[i] = video
                elif before != shards[i] and "sources" in part:  # only times differ: one comparison is enough
                    write_text(_part(path, names[i]), _json(with_checksum(part | {"sources": shards[i]})))
        except UserError as error:
            broken[i] = str(error)
    if replaced:
        first, video = next(iter(replaced.items()))
        more = f", and {len(replaced) - 1} more shards hold such videos" if len(replaced) > 1 else ""
        raise UserError(
            f"{files[first]}: the file of {video!r} is not the one whose frames are stored{more}: delete the shard to "
            "store the new file's frames, or choose another --out"
        )
    missing = [i for i in mine if i in broken or files[i].name not in sizes]
    if missing:
        (path / "store.json").unlink(missing_ok=True)  # an old one describes other shards
    for i, problem in broken.items():
        print(f"note: {problem}: this shard is made again", file=sys.stderr)
        if not files[i].is_dir():  # for a folder, writing the shard reports the problem
            files[i].unlink()
    results = iter(encode([source for i in missing for source in shards[i]]))
    for i in missing:
        pairs = zip(shards[i], itertools.islice(results, len(shards[i])), strict=True)
        _write_shard(files[i], _part(path, names[i]), features, shards[i], pairs)
    return read_shards(path, settings, sources)


def read_shards(path: str | Path, settings: dict[str, Any], sources: list[Source]) -> Shards:
    """The contents of the existing shards, from any run; the arguments are those of `write_shards`."""
    path, (shards, names) = as_path(path), _split(sources)
    sizes, parts = file_sizes(path), {}
    for name, own in zip(names, shards, strict=True):
        shard = _shard(path, settings["kind"], name)
        with contextlib.suppress(UserError):  # a broken shard counts as missing
            parts |= {name: read_part(shard, _part(path, name), own, sizes)} if shard.name in sizes else {}
    kinds = ([line for part in parts.values() for line in part.get(kind, [])] for kind in KINDS)
    return Shards(*kinds, missing=len(names) - len(parts), total=len(names), parts=parts)


def _split(sources: list[Source]) -> tuple[list[list[Source]], list[str]]:
    """The sources of each shard, and the shards' names."""
    shards = [sources[i : i + VIDEOS_PER_SHARD] for i in range(0, len(sources), VIDEOS_PER_SHARD)]
    return shards, [f"{i:05d}-of-{len(shards):05d}" for i in range(len(shards))]


def _write_shard(
    shard: Path, part_file: Path, features: Any, sources: list[Source], pairs: Iterable[tuple[Source, Result]]
) -> None:
    """Writes one shard and the lines of its videos, the lines first, so that no shard is seen without them."""
    part: dict[str, Any] = {**{kind: [] for kind in KINDS}, "num_bytes": 0, "sources": sources}
    with written_whole(shard) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1,zstd:1")
        for source, result in pairs:
            shown = {key: value for key, value in source.items() if key != "changed"}
            if "reason" in result:
                part["left_out"].append(shown | result)
                continue
            if "note" in result:
                part["notes"].append(shown | {"note": result["note"]})
            record = _serialize(features, {"video": source["video"], **result["record"]})
            writer.write(record)
            part["num_bytes"] += len(record)
            part["videos"].append(result["line"])
        writer.close()
        part |= {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
        write_text(part_file, _json(with_checksum(part)))


def finish_store(
    path: str | Path,
    settings: dict[str, Any],
    shards: Shards,
    instructions: list[dict[str, Any]],
    report: dict[str, Any],
) -> None:
    """Writes the files that describe the shards, store.json last. A second call repairs damaged files only.

    store.json holds the settings, a fingerprint of settings, videos and instructions, and each shard's size.
    """
    path = as_path(path)
    texts = _tfds_metadata(settings, shards.parts)
    texts |= {"videos.jsonl": _lines(shards.videos), "instructions.jsonl": _lines(instructions)}
    fingerprint = _fingerprint(settings, texts["videos.jsonl"].encode(), texts["instructions.jsonl"].encode())
    known = {
        _shard(path, settings["kind"], name).name: {"records": len(part["videos"])}
        | ({"bytes": part["bytes"]} if "bytes" in part else {})
        for name, part in shards.parts.items()
    }
    texts |= {"report.json": _json(report)}
    texts |= {"store.json": _json({**settings, "fingerprint": fingerprint, "shards": known})}
    for name, text in texts.items():
        write_text(path / name, text)
    if in_bucket(path):
        return
    for leftover in path.glob("*.array_record-*.tmp"):  # of runs that were killed: all shards are there
        leftover.unlink(missing_ok=True)


def _fingerprint(settings: dict[str, Any], videos: bytes, instructions: bytes) -> str:
    """A hash of a store's settings and of the contents of videos.jsonl and instructions.jsonl."""
    return hashlib.sha256(_json(settings).encode() + videos + instructions).hexdigest()


def _tfds_metadata(settings: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The files that TFDS needs beside the shards. TFDS writes them non-atomically, so into a temporary folder."""
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[len(part["videos"]) for part in parts.values()],
        num_bytes=sum(part["num_bytes"] for part in parts.values()),
    )
    with tempfile.TemporaryDirectory(prefix="redvillm_jax.") as folder:
        shards = [_shard(Path(folder), settings["kind"], name) for name in parts]
        for shard in shards:
            shard.touch()  # TFDS looks at the names
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


def _part(path: Path, name: str) -> Path:
    return path / "parts" / f"{name}.json"


def _shapes(settings: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The longest shape and the dtype of each array that a model reads from a record."""
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
    """TFDS's bytes of a record, with the fields in order: protobuf's own order changes from process to process."""
    serializer = ExampleSerializer(features.get_serialized_info())
    return serializer.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _lines(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in objects)


def _short(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:160]
