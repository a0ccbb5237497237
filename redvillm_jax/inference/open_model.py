"""Opens a model that can answer: a run, a base folder or an export."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from data_pipeline.common.artefacts import EXPORT, RUN, Form, read_object
from data_pipeline.common.buckets import local_copy
from data_pipeline.common.errors import UserError
from data_pipeline.common.file_hashes import check_files
from data_pipeline.common.files import as_path, check_bucket
from redvillm_jax.model.base_folder import (
    BASE_MARK,
    EXPORT_MARK,
    EXTRA_PREFIX,
    PROJECTORS,
    Base,
    TensorFolder,
    head_name,
    open_base,
    projector_names,
    published_base,
    read_export,
)
from redvillm_jax.model.run_config import ADDED_TO_EXPORTS, as_trained
from redvillm_jax.model.settings import ModelSettings, check_answering, check_base, check_config, model_settings
from redvillm_jax.model.weights import name_table
from redvillm_jax.modules.quantize import SCHEME
from redvillm_jax.training.checkpoint import load_trainables
from redvillm_jax.video.contract import export_name, fields_with, has_random_start, pooling_fields


class OpenedModel(NamedTuple):
    """A model that can answer, opened but without its frozen weights in memory.

    config: its config. settings: the fields that decide the model. trained: its projectors as nested dicts of fp32
    numpy arrays, None for an untrained video LLM (as `load_model` makes it). name: of its folder. fingerprint: see
    `model_fingerprint`.
    """

    config: Mapping[str, Any]
    settings: ModelSettings
    base: Base
    trained: dict[str, Any] | None
    name: str
    fingerprint: str


def open_model(model: str | Path, config: Mapping[str, Any] | None = None, base: str | None = None) -> OpenedModel:
    """Opens a run, a base folder or an export of conversion.to_torch, on a disk or in a bucket.

    config: required for an untrained model, refused for a trained one, which has its own. base: the base folder;
    required for projectors exported alone, optional for a run whose base has moved, refused otherwise. Raises
    UserError.
    """
    check_bucket(model)
    there = as_path(model)
    export = read_export(there / EXPORT_MARK) if (there / EXPORT_MARK).is_file() else None
    is_run = export is None and not (there / BASE_MARK).is_file()
    if is_run:
        check_run(there)
    untrained = not is_run and not (export and export["trained"])
    if untrained and config is None:
        raise UserError(f"{model} is untrained: give its switches with --config, a file of configs/ for its family")
    if not untrained and config is not None:
        raise UserError(f"--config is for an untrained model, {model} brings its own config: leave it out")
    if is_run:
        said, trained = load_trainables(model)
        said = as_trained(said, there / "config.json")
        opened = open_base_of_run(said, base)
    else:
        folder = local_copy(model)
        if export and not (folder / BASE_MARK).is_file():
            check_files(folder, export.get("files"), EXPORT.remedy)
        opened = open_base_of_folder(folder, export, base)
        method = {} if untrained else export["method"] | {"family": export["family"]}
        said, trained = config if untrained else as_trained(method, folder / EXPORT_MARK, ADDED_TO_EXPORTS), None
    if untrained:
        check_config(said)
        check_base(opened, model_settings(said))
    else:
        check_answering(said, model)
    settings = model_settings(said)
    if not (untrained or is_run):
        trained = read_trained(folder, opened, settings)
    digest = model_fingerprint(opened, settings, trained)
    return OpenedModel(said, settings, opened, trained, os.path.basename(os.path.abspath(str(model))), digest)


def check_run(folder: Path) -> None:
    """Raises UserError unless a folder is a run; it is known to be neither a base nor an export."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: not a run directory (config.json), a base folder ({BASE_MARK}) or an export ({EXPORT_MARK}); "
            "give one of these"
        )
    if "base" not in read_object(folder / "config.json", Form({}, RUN.remedy)):
        raise UserError(f"{folder}: published files: make a base folder of them with conversion.from_torch")


def open_base_of_run(config: Mapping[str, Any], base: str | None) -> Base:
    """Opens the base that a run was trained on, at `base` or else at the path in the run's config."""
    try:
        return open_base(base or config["base"], config["base_fingerprint"])
    except UserError as error:
        if base:
            raise
        raise UserError(f"{error}; if that base lies elsewhere, say where with --base=BASE") from None


def open_base_of_folder(folder: Path, export: Mapping[str, Any] | None, base: str | None) -> Base:
    """Opens a local folder as a base; for projectors exported alone, opens their base at `base`.

    A whole export has the frozen weights of its base, and therefore the fingerprint of that base.
    """
    alone = export is not None and (folder / PROJECTORS).is_file()
    if alone and base is None:
        raise UserError(f"{folder} holds projectors alone: give the base that they belong to with --base=BASE")
    if base is not None and not alone:
        raise UserError(f"--base is for a run or for projectors alone, {folder} is a whole model: leave it out")
    if alone:
        return open_base(base, export["base_fingerprint"])
    if export is None:
        return open_base(folder)
    return published_base(folder, export["family"], export["base_fingerprint"])


def read_trained(folder: Path, base: Base, settings: ModelSettings) -> dict[str, Any]:
    """Reads the projectors of an export in fp32, in the form in which `load_trainables` returns them."""
    tensors, tables = TensorFolder(folder), {}
    video = settings.video
    for stream in video.order(base.config.grid, video.num_frames):
        tables[stream.projector] = projector_names(base, export_name(video, stream.projector))
        if make := video.extra(stream.name):
            extra = f"{EXTRA_PREFIX}{stream.name}"
            module = nnx.eval_shape(lambda make=make: make(base.config.hidden_size, rngs=nnx.Rngs(0)))
            tables[extra] = name_table(module, f"{extra}.")
    wanted = {name: leaf.shape for table in tables.values() for name, leaf in table.items()}
    if missing := sorted(wanted.keys() - set(tensors.names())):
        raise UserError(f"{folder}: lacks {len(missing)} tensors, {', '.join(missing[:4])}; {EXPORT.remedy}")
    if wrong := [name for name, shape in wanted.items() if tensors.shape(name) != shape]:
        found = f"{wrong[0]} {tensors.shape(wrong[0])}, expected {wanted[wrong[0]]}"
        raise UserError(f"{folder}: {len(wrong)} tensors of another shape, {found}; {EXPORT.remedy}")
    return {
        group: unflatten_dict({leaf.path: np.asarray(tensors[name][:], np.float32) for name, leaf in table.items()})
        for group, table in tables.items()
    }


def model_fingerprint(base: Base, settings: ModelSettings, trained: Mapping[str, Any] | None) -> str:
    """Returns 64 hexadecimal digits of a model's base, trained weights and the switches that decide its answers.

    They are the same for a run and its exports if the trained weights are fp32; `dtype` is not part of them.
    """
    name, video = settings.representation, settings.video
    switches = {"num_frames": video.num_frames, "sampling": settings.sampling, "int8": settings.int8}
    switches |= pooling_fields(name, video) | fields_with(name, video, "tokens") | dict(settings.projector_options)
    if trained is None:
        switches |= fields_with(name, video, "start")
        if has_random_start(video, base.config.grid):
            switches["seed"] = settings.seed
    if settings.int8:
        switches["int8"] = [SCHEME, f"^{re.escape(head_name(base.module, base.config))}$"]
    digest = hashlib.sha256(json.dumps([base.fingerprint, switches], sort_keys=True).encode())
    for path, array in jax.tree_util.tree_flatten_with_path(trained)[0]:  # dicts by their sorted keys
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
