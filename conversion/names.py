"""Shared by both directions: lazy readers of published files, checks of tensor names, atomic writing of folders."""

import contextlib
import dataclasses
import errno
import functools
import glob
import json
import math
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # registers "bfloat16" with numpy  # noqa: F401
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import temporary_name
from redvillm_jax.bases.contract import Family
from redvillm_jax.model.base_folder import ADDED, BASE_MARK, canonical_name
from redvillm_jax.model.weights import expected_tensors

SHARD_BYTES = 2_000_000_000
KEPT_SUFFIXES = (".json", ".model", ".tiktoken", ".txt", ".jinja")
KEPT_BYTES = 20_000_000
WEIGHT_SUFFIXES = (".safetensors", ".bin")
UNFINISHED = "redvillm_unfinished.txt"  # in a folder that may be removed when its run is gone

DTYPES = {  # by safetensors' names, all that its numpy reader knows
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype("bfloat16"),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES.values())
FLOATS = ("float64", "float32", "float16", "bfloat16")  # loadable by a base


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read lazily: `read()` returns all of it, bit for bit."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


# ---- files and links


def check_file(file: Path, remedy: str = "the folder must be complete, as published") -> None:
    """Raises UserError unless `file`, links followed, is a file that can be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file}: not a file, expected one; {remedy}")
        with open(file, "rb", buffering=0) as opened:
            opened.read(1)  # a broken disk shows only now
    except OSError as error:
        raise UserError(f"{file}: {what_is_wrong(file, error)}; {remedy}") from None


def check_folder(folder: Path, remedy: str) -> None:
    """Raises UserError unless `folder`, links followed, and the files in it that a base needs can be read.

    These files are weights, configs and the tokenizer's files.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: {what_is_wrong(folder, error)}; {remedy}") from None
    for file in files:
        if file.suffix in (*KEPT_SUFFIXES, *WEIGHT_SUFFIXES) and not file.is_dir():
            check_file(file)


def what_is_wrong(path: Path, error: OSError) -> str:
    """The problem with a path in words; a link without a target is named."""
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself"
    if path.is_symlink() and error.errno == errno.ENOENT:
        return f"a link to {os.readlink(path)}, which is not there"
    if error.errno == errno.ENOENT:
        return "not found"
    if error.errno == errno.ENOTDIR:
        return "not a folder"
    return f"cannot be read ({error.strerror})"


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError when the file is missing, broken or holds something else."""
    check_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}; copy it again")
    return content


# ---- reading published folders


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's tensors: the files of its index, else all weight files; safetensors before .bin.

    Raises UserError when there are none, or the index names one that is missing or lies elsewhere.
    """
    check_folder(folder, "download the published model and give its folder")
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).is_file():
            names = index_files(folder / index)
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder / index} names files that are missing: {listed(missing)}; download them")
            return [folder / name for name in names]
        if files := sorted(file for file in folder.glob(pattern) if file.is_file()):
            return files
    raise UserError(f"{folder}: no *.safetensors and no pytorch_model*.bin in it; download the model's weights")


def index_files(index: Path) -> list[str]:
    """The names of the files in an index. Raises UserError for a name that leads out of its folder."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map in it; download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).suffix not in WEIGHT_SUFFIXES or name != Path(name).name:
            kinds = " or ".join(WEIGHT_SUFFIXES)
            raise UserError(
                f"{index}: {tensor} is in {name!r}, expected the name of a {kinds} file beside the index; download "
                "the index again"
            )
    return sorted(set(weight_map.values()))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a published folder by name, in the order of its files. Nothing is read yet.

    A separate projector (mm_projector.bin) adds the tensors that the other files lack. Raises UserError for an
    unreadable file and for a name in two files.
    """
    tensors, file_of = {}, {}
    for file in weight_files(folder):
        found = read_file(file)
        if twice := sorted(found.keys() & tensors.keys()):
            where = f"{file_of[twice[0]].name} and {file.name}"
            raise UserError(f"{folder}: {twice[0]} is in both {where}; remove the file that is not the model's")
        tensors |= found
        file_of |= dict.fromkeys(found, file)
    if (folder / "mm_projector.bin").is_file():
        tensors = read_file(folder / "mm_projector.bin") | tensors
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file."""
    with open(file, "rb") as head:
        if head.read(20).startswith(b"version https://git"):
            raise UserError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` in that folder")
    return read_safetensors(file) if file.suffix == ".safetensors" else read_bin(file)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        handle = safe_open(file, framework="numpy")
    except Exception as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); download it again") from None
    tensors = {}
    for name in handle.keys():
        header = handle.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise UserError(f"{file}: {name} has dtype {header.get_dtype()}, expected one of {', '.join(DTYPES)}")
        read = functools.partial(handle.get_tensor, name)
        tensors[name] = Tensor(tuple(header.get_shape()), DTYPES[header.get_dtype()], read)
    return tensors


@functools.lru_cache(maxsize=1)  # one file at a time: a .bin of the old format cannot be mapped
def load_bin(file: Path) -> dict[str, Any]:
    """A torch state dict, memory-mapped where its format allows."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading .bin files takes PyTorch; pip install 'redvillm_jax[convert]'") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a readable PyTorch file ({reason}); download it again") from None
    of_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not of_tensors:
        raise UserError(f"{file}: not a state dict of tensors; give the model's weights, not a training checkpoint")
    return state


def read_bin(file: Path) -> dict[str, Tensor]:
    def read(name: str) -> np.ndarray:
        return as_numpy(load_bin(file)[name])

    tensors = {}
    for name, tensor in load_bin(file).items():
        form = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        if form != "strided":
            raise UserError(f"{file}: {name} is a {form} tensor, expected a dense one with its values; save it as such")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPE_NAMES:
            raise UserError(f"{file}: {name} has dtype {dtype}, expected one of {', '.join(DTYPE_NAMES)}")
        tensors[name] = Tensor(tuple(tensor.shape), np.dtype(dtype), functools.partial(read, name))
    return tensors


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy, through a view of its bits, because torch cannot give numpy a bfloat16."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return tensor.detach().contiguous().view(bits).numpy().view(dtype)


# ---- checking names and shapes


def listed(items: Iterable[str], limit: int = 20) -> str:
    """The first items, and the number of the others."""
    items = list(items)
    more = f", … and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def is_extra(name: str) -> bool:
    """Whether a tensor was added by an export of a trained run."""
    return ADDED.match(name) is not None


def find_names(base: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """Canonical name -> the published names that stand for it."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical_name(base, name), []).append(name)
    return found


def check_tensors(base: Family, config: Any, tensors: Tensors, where: Path, hint: str = "") -> dict[str, str]:
    """Compares published tensors with those that a base's config needs. Returns canonical name -> published name.


    Every tensor must be known: loaded by the base, unused by it on purpose, ignored, or added by an export. Raises one
    UserError that lists all missing, wrongly shaped, unknown and doubled tensors, and needed tensors that hold no
    floating-point numbers.
    """
    needed = {name: leaf.shape for name, leaf in expected_tensors(base, config).items()}
    shapes = needed | base.unused(config)
    found = find_names(base, tensors)
    missing = [name for name in needed if name not in found]
    wrong = [
        f"{published} {tensors[published].shape} should be {shapes[name]}"
        for name, spellings in found.items()
        for published in spellings
        if name in shapes and tensors[published].shape != shapes[name]
    ]
    unknown = [
        spellings[0]
        for name, spellings in found.items()
        if name not in shapes and not is_extra(name) and not any(re.search(p, name) for p in base.IGNORED)
    ]
    doubled = [" = ".join(spellings) for name, spellings in found.items() if len(spellings) > 1]
    loaded = [
        published for name, spellings in found.items() if name in shapes or is_extra(name) for published in spellings
    ]
    whole = [f"{name} {tensors[name].dtype.name}" for name in loaded if tensors[name].dtype.name not in FLOATS]
    groups = {
        "missing": missing,
        "wrong shape": wrong,
        "not floating point": whole,
        "unknown": unknown,
        "twice": doubled,
    }
    if any(groups.values()):
        report = " | ".join(f"{len(items)} {kind}: {listed(items)}" for kind, items in groups.items() if items)
        raise UserError(f"{where}: tensors do not fit its config.json: {report}{hint}")
    return {name: spellings[0] for name, spellings in found.items()}


# ---- writing


def write_safetensors(file: Path, tensors: Tensors, watch: Callable[[str, np.ndarray], None]) -> None:
    """Writes a safetensors file, with all its tensors in memory at once; `watch(name, array)` gets each of them."""
    arrays = {}
    for name, tensor in tensors.items():
        arrays[name] = np.asarray(tensor.read(), order="C")  # save_file writes the bytes as they lie in memory
        watch(name, arrays[name])
    save_file(arrays, file, metadata={"format": "pt"})


def write_shards(
    folder: Path,
    tensors: Tensors,
    watch: Callable[[str, np.ndarray], None] = lambda name, array: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors as Hugging Face does, a shard at a time: model.safetensors, or numbered shards with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], watch)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, watch)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_small_files(source: Path, target: Path) -> None:
    """Copies config.json, the tokenizer's files and other small files, but no weights, indices or code."""
    for file in sorted(source.iterdir()):
        kept = file.suffix in KEPT_SUFFIXES and file.name != BASE_MARK and not file.name.endswith(".index.json")
        if kept and file.is_file() and file.stat().st_size <= KEPT_BYTES:
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def whole_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yields a new folder, which becomes `out` when the block ends without an error.

    `out` is replaced; the caller holds its lock and has checked that it may be replaced. Until then the new folder lies
    beside it under another name, with a file that names `out`. This file identifies the leftover of a killed run, which
    is removed. Raises UserError when the disk has less than `num_bytes` free.
    """
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    mark = f"redvillm_jax writes {out} here; if no run does, this folder can be deleted\n"
    for left in out.parent.glob(f"{glob.escape(out.name)}.*.tmp/{UNFINISHED}"):
        if left.read_bytes() == mark.encode():
            shutil.rmtree(left.parent, ignore_errors=True)
    name = temporary_name(out)
    work = Path(tempfile.mkdtemp(prefix=f"{name.stem}.", suffix=name.suffix, dir=out.parent))
    try:
        (work / UNFINISHED).write_bytes(mark.encode())
        if (free := shutil.disk_usage(work).free) < num_bytes:
            raise UserError(f"{out}: needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        (work / "new").mkdir()
        yield work / "new"
        if out.exists():
            out.rename(work / "old")
        (work / "new").rename(out)
    finally:
        if (work / "old").exists() and not out.exists():
            (work / "old").rename(out)
        shutil.rmtree(work, ignore_errors=True)


def refuse_foreign(out: Path, mark: str | None = None) -> None:
    """Raises UserError when `out` holds anything but an export, whose file `mark` lists all of its files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; --out must be a folder, new or empty")
    there = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir() or not any(path.iterdir())}
    if not there:
        return
    if mark is None or not (out / mark).is_file() or (out / BASE_MARK).is_file():
        raise UserError(f"{out}: not empty, and not written by this command; choose another --out")
    if others := sorted(there - {mark, *(read_json(out / mark).get("files") or ())}):
        raise UserError(
            f"{out}: holds {others[0]} beside an earlier export, which is replaced as a whole; move that file away, or "
            "choose another --out"
        )
