"""Reads base folders: maps published tensors to weights and loads slices of them onto devices."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open

from data_pipeline.common.artefacts import BASE, EXPORT, Form, read_object
from data_pipeline.common.buckets import local_copy
from data_pipeline.common.errors import UserError
from data_pipeline.common.file_hashes import check_files
from redvillm_jax.bases.contract import Family, load_family
from redvillm_jax.model.weights import Leaf, abstract_part, fill, name_table
from redvillm_jax.modules.quantize import quantize, quantized_shapes

BASE_MARK, EXPORT_MARK = "base.json", "redvillm.json"  # the file that marks a folder as a base, or as an export
PROJECTORS = "projectors.safetensors"  # the weights of an export without the rest of the model
IMAGE_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
)  # the files that state how published code makes pixels
EXTRA_PREFIX = "extra_mlp_"  # + stream: the module behind that stream's projector, in checkpoints and exports
ADDED = re.compile(rf"\w+_module\.|{EXTRA_PREFIX}")  # the beginning of names that exports add to the published ones
REMEDY = BASE.remedy


def head_name(base: Family, config: Any) -> str:
    """Returns the canonical name of the weight that makes the logits."""
    llm = abstract_part(base, "llm", config)
    path = next(path for path, module in nnx.iter_modules(llm) if module is llm.head)
    return base.PREFIX["llm"] + ".".join(map(str, (*path, "weight")))


def canonical_name(base: Family, published: str) -> str:
    """Returns the canonical name of a published tensor, by the first rule of `base.CANONICAL` that matches."""
    for pattern, replacement in base.CANONICAL:
        name, count = re.subn(pattern, replacement, published, count=1)
        if count:
            return name
    return published


class TensorFolder:
    """The tensors in a folder's safetensors files, read lazily: index `folder[name]` to read a part as numpy.

    The folder has one file or several shards; the files of its `vision/` subfolder belong to it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = sorted(self.path.glob("*.safetensors")) + sorted((self.path / "vision").glob("*.safetensors"))
        if not files:
            raise UserError(f"{path}: no .safetensors file found; make a base folder with conversion.from_torch")
        self.files = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except Exception as error:
                raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None
            self.files |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> list[str]:
        """Returns all published names, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Any:
        """Returns a lazy tensor: index it to read only that part."""
        return self.files[name].get_slice(name)


@dataclasses.dataclass(frozen=True)
class Base:
    """An open base folder: the family's module, the config, the fingerprint and the tensors.

    A Base without a path has no weights; it serves to compute shapes.
    """

    path: Path | None
    family: str
    module: Family
    config: Any
    fingerprint: str
    tensors: TensorFolder | None
    published: Mapping[str, str]  # canonical name -> published name


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Reads a published JSON file. Raises UserError unless it is one JSON object; the base checks its fields."""
    return read_object(file, Form({}, remedy))


def read_export(file: Path) -> dict[str, Any]:
    """Reads the description of an export, redvillm.json."""
    return read_object(file, EXPORT)


def open_base(path: str | Path, fingerprint: str | None = None) -> Base:
    """Opens a folder that `conversion.from_torch` wrote; a folder in a bucket (gs://) is copied first.

    The first time, compares its files with their hashes in base.json (`data_pipeline.common.file_hashes`). fingerprint:
    of the base that a run was trained on. Raises UserError when the folder is missing, is not a base folder, has
    changed, or has another fingerprint.
    """
    path = local_copy(path)
    description = path / BASE_MARK
    if not description.is_file():
        hint = "python -m conversion.from_torch --source=FOLDER --out=BASE makes one"
        raise UserError(f"{path}: not a base folder (no base.json); {hint}")
    meta = read_object(description, BASE)
    if fingerprint is not None and meta["fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: is base {meta['fingerprint'][:12]}, the run was trained on {fingerprint[:12]}; put that base back"
        )
    check_files(path, meta.get("files"), REMEDY)
    return published_base(path, meta["family"], meta["fingerprint"])


def published_base(path: Path, family: str, fingerprint: str) -> Base:
    """Opens a local folder of published files as a base; the caller vouches for family and fingerprint."""
    module, tensors = load_family(family), TensorFolder(path)
    published = {canonical_name(module, name): name for name in tensors.names()}
    return Base(path, family, module, read_config(module, path), fingerprint, tensors, published)


def sized_base(family: str, size: str) -> Base:
    """Returns a base of a named size of the family, without weights. Raises UserError for an unknown size."""
    module = load_family(family)
    if size not in module.SIZES:
        raise UserError(f"unknown size {size!r} of {family}: expected one of {', '.join(module.SIZES)}")
    return Base(None, family, module, module.SIZES[size], "", None, {})


def read_config(base: Family, folder: Path, vision: Path | None = None, remedy: str = REMEDY) -> Any:
    """Reads the base's Config from a folder's config.json, the vision tower's, and the image processors' files.

    Only config.json must exist. remedy: the advice in messages about an unreadable file. Raises UserError for a field
    that the base does not compute.
    """
    vision = vision or folder / "vision"
    file, apart = folder / "config.json", {}
    if base.VISION_FIELD is not None:
        vision_file = vision / "config.json"
        apart["vision_config"] = read_json(vision_file, remedy) if vision_file.is_file() else None
        apart["vision_where"] = str(vision_file)
    config = base.Config.from_published(read_json(file, remedy), where=str(file), **apart)
    for file in (at / name for at in (folder, vision) for name in IMAGE_PROCESSORS):
        if file.is_file():
            config = base.read_image_processor(config, read_json(file, remedy), str(file))
    return config


def load_part(
    base: Base,
    part: str,
    *,
    dtype: jax.typing.DTypeLike,
    sharding: Callable[[str, tuple[int, ...], bool], jax.sharding.Sharding],
    int8: bool = False,
    **options: Any,
) -> nnx.Module:
    """Loads the encoder, projector or llm of a base, cast to `dtype`; each host reads only its own slices.

    sharding(canonical_name, shape, stacked): the sharding of a leaf. int8: holds the matrices of the llm's `Linear`
    layers, except its head, in 8 bits; each host then reads these matrices whole. A base without a folder gives shapes,
    dtypes and shardings instead of arrays. Raises UserError with a list of missing or wrongly shaped tensors.
    """
    module = abstract_part(base.module, part, base.config, **options)
    table = name_table(module, base.module.PREFIX[part])
    scales = quantized_shapes(module, wide=module.head) if int8 else {}
    if base.path is not None:
        check_tensors(base, table)
    layers_of: dict[tuple, list[str]] = {}
    for name, leaf in table.items():
        layers_of.setdefault(leaf.path, []).append(name)

    def read(path: tuple, index: tuple[slice, ...]) -> np.ndarray:
        names = layers_of[path]
        if table[names[0]].layer is None:
            return read_slice(base, names[0], index)
        return np.stack([read_slice(base, name, index[1:]) for name in names[index[0]]])

    def quantized(path: tuple) -> tuple[np.ndarray, ...]:
        """Returns int8 values and scales of all layers, from whole matrices, even if a device holds a part."""
        layers = [quantize(read_slice(base, name, ())) for name in layers_of[path]]
        return layers[0] if table[layers_of[path][0]].layer is None else tuple(map(np.stack, zip(*layers, strict=True)))

    def place(path: tuple, shape: tuple[int, ...], dtype: Any, callback: Callable) -> jax.Array | jax.ShapeDtypeStruct:
        name = layers_of[path][0]
        at = sharding(name, shape, table[name].layer is not None)
        if base.path is None:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=at)
        return jax.make_array_from_callback(shape, at, callback)

    numbers = {name: (path, i) for path, names in scales.items() for i, name in enumerate((path, *names))}
    in_8_bits = {path: functools.cache(functools.partial(quantized, path)) for path in scales}

    def value(path: tuple, leaf: nnx.Variable) -> jax.Array | jax.ShapeDtypeStruct:
        if path not in numbers:
            return place(path, leaf.shape, dtype, lambda index: read(path, index).astype(dtype))
        matrix, number = numbers[path]
        return place(matrix, leaf.shape, leaf.dtype, lambda index: in_8_bits[matrix]()[number][index])

    return fill(module, value)


def projector_names(base: Base, copy: str | None) -> dict[str, Leaf]:
    """Returns a projector's leaves by name in exports: published names, or for a copy names below `<copy>_module.`."""
    table = name_table(abstract_part(base.module, "projector", base.config), base.module.PREFIX["projector"])
    check_tensors(base, table)
    published = {base.published[name]: leaf for name, leaf in table.items()}
    if copy is None:
        return published
    shared = common_prefix(published)
    return {f"{copy}_module.{name.removeprefix(shared)}": leaf for name, leaf in published.items()}


def common_prefix(names: Iterable[str]) -> str:
    """Returns the dotted path that all names begin with, with its last dot: "a.b." of "a.b.c" and "a.b.d.e"."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, parts))


def read_slice(base: Base, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads one slice of a tensor, by the tensor's canonical name."""
    tensor = base.tensors[base.published[name]]
    return np.asarray(tensor[index] if index else tensor[:])


def check_tensors(base: Base, table: Mapping[str, Leaf]) -> None:
    """Raises UserError with the tensors of `table` that the folder lacks or has in another shape."""
    missing = [name for name in table if name not in base.published]
    wrong = []
    for name, leaf in table.items():
        found = base.tensors.shape(base.published[name]) if name in base.published else leaf.shape
        if found != leaf.shape:
            wrong.append(f"{name} {found}, expected {leaf.shape}")
    problems = [f"missing: {name}" for name in missing] + [f"wrong shape: {text}" for text in wrong]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{base.path}: tensors do not fit its config.json: {'; '.join(problems[:8])}{more}; {REMEDY}")
