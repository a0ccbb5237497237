"""Writes trained projectors for PyTorch: safetensors under PyTorch's names, alone or in a complete folder.

python -m conversion.to_torch --model=RUN --out=EXPORT [--full]

The projector keeps the published names; a copy such as the temporal module has the same names under
`temporal_module.`, extra MLPs theirs under `extra_mlp_<stream>.`. redvillm.json has the settings that turn a video into
tokens, and the hashes of all files.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion.names import (
    Tensor,
    copy_small_files,
    is_extra,
    read_folder,
    read_json,
    refuse_foreign,
    whole_folder,
    write_safetensors,
    write_shards,
)
from data_pipeline.common import file_hashes
from data_pipeline.common.artefacts import EXPORT, read_object, with_checksum
from data_pipeline.common.cli import Parser, add_check_files, local_path
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.locks import locked
from redvillm_jax.model.base_folder import (
    BASE_MARK,
    EXPORT_MARK,
    EXTRA_PREFIX,
    PROJECTORS,
    Base,
    open_base,
    projector_names,
)
from redvillm_jax.model.run_config import as_trained
from redvillm_jax.model.settings import check_answering, model_settings
from redvillm_jax.runtime.chips import quiet_without_tpu
from redvillm_jax.video.contract import Representation, image_projector, load_video

IMAGE = "image"  # the group of the image LLM's projector in exports of a run that does not use it


def to_torch(model: Path, out: Path, full: bool = False) -> dict[str, Any]:
    """Exports a run or a base and returns its redvillm.json. An earlier export in `out` is replaced.

    Without `full`: projectors.safetensors, in fp32 for a run and in the published dtype for a base. With `full`: all
    tensors under their published names, the trained ones cast to their published dtypes. Raises UserError when `model`
    is neither a run nor a base, when `out` holds something else, and while another run exports to `out`.
    """
    with locked(out, beside=True):
        return export(model, out, full)


def export(model: Path, out: Path, full: bool) -> dict[str, Any]:
    """`to_torch` for a caller that holds the lock of `out`."""
    base, config, trained = open_source(model)
    refuse_foreign(out, EXPORT_MARK)
    tensors = read_folder(base.path)
    separate_vision = (base.path / "vision").is_dir()
    tower = read_folder(base.path / "vision") if any(base.path.glob("vision/*.safetensors")) else {}
    own = projector_names(base, None)
    new = {} if config is None else trained_tensors(base, model_settings(config).video, tensors, trained)
    if full:
        dtype = tensors[next(iter(own))].dtype
        rounded = {n: array.astype(tensors[n].dtype if n in tensors else dtype) for n, array in new.items()}
        tensors |= {name: in_memory(array) for name, array in rounded.items()}
    else:
        kept = {name: tensor for name, tensor in tensors.items() if name in own or is_extra(name)}
        tensors, tower = (kept if config is None else {}) | {n: in_memory(a) for n, a in new.items()}, {}
    meta = describe(base, config)

    num_bytes = sum(tensor.nbytes for tensor in (*tensors.values(), *tower.values()))
    with (
        whole_folder(out, num_bytes) as folder,
        tqdm(total=len(tensors) + len(tower), desc=out.name, unit="tensor") as bar,
    ):

        def watch(name: str, array: np.ndarray) -> None:
            bar.update()

        if full:
            copy_small_files(base.path, folder)
            write_shards(folder, tensors, watch)
            if separate_vision:
                (folder / "vision").mkdir()
                copy_small_files(base.path / "vision", folder / "vision")
                point_at_vision(folder / "config.json", base.module.VISION_FIELD)
            if tower:
                write_shards(folder / "vision", tower, watch)
        else:
            write_safetensors(folder / PROJECTORS, tensors, watch)
        meta = with_checksum(meta | {"files": file_hashes.hash_files(folder)})
        (folder / EXPORT_MARK).write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def open_source(model: Path) -> tuple[Base, dict[str, Any] | None, dict[str, Any]]:
    """A run as (its base, its config, its trained projectors), or a base as (the base, None, {})."""
    if (model / BASE_MARK).is_file():
        return open_base(model), None, {}
    if not (model / "checkpoints").is_dir():
        raise UserError(
            f"{model}: neither a base folder (base.json) nor a run (checkpoints/); "
            "give the --out of conversion.from_torch or the --workdir of redvillm_jax.train"
        )
    from redvillm_jax.training.checkpoint import load_trainables  # Orbax takes seconds to import, and only runs need it

    quiet_without_tpu()
    said, trained = load_trainables(model)
    config = as_trained(said, model / "config.json")
    check_answering(config, model)
    base = open_base(config["base"], config["base_fingerprint"])
    return base, config, trained


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts of arrays by dotted path."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def trained_tensors(
    base: Base, video: Representation, tensors: Mapping[str, Tensor], trained: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The projectors of a run in fp32 by their names in PyTorch. Untrained parts come from the base."""
    image = image_projector(video) or IMAGE
    arrays = {}
    for group, tree in ({image: {}} | dict(trained)).items():
        flat = flatten(tree)
        if group.startswith(EXTRA_PREFIX):
            arrays |= {f"{group}.{path}": np.asarray(array, np.float32) for path, array in flat.items()}
            continue
        copy = None if group == image else group
        names = zip(projector_names(base, copy).items(), projector_names(base, None), strict=True)
        for (name, leaf), published in names:
            path = ".".join(leaf.path)
            arrays[name] = np.asarray(flat[path] if path in flat else tensors[published].read(), np.float32)
    return arrays


def in_memory(array: np.ndarray) -> Tensor:
    """A `Tensor` of an array in memory."""
    return Tensor(array.shape, array.dtype, functools.partial(np.asarray, array))


def describe(base: Base, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """redvillm.json without "files": the use of the projectors. A base that is an export keeps its own settings."""
    if config is None and (base.path / EXPORT_MARK).is_file():
        return read_object(base.path / EXPORT_MARK, EXPORT)
    return {
        "family": base.family,
        "base_fingerprint": base.fingerprint,
        "trained": config is not None,
        "image_size": base.config.image_size,
        "resize": base.module.frame_fit(base.config),
        "mean": base.module.MEAN,
        "std": base.module.STD,
        "method": {name: config[name] for name in method_fields(config)} if config else {},
    }


def method_fields(config: Mapping[str, Any]) -> list[str]:
    """The fields of a run that are needed to rebuild its model, here or in PyTorch, and to answer as it does."""
    settings = model_settings(config)
    own = [*load_video(settings.representation).FIELDS, *settings.projector_options]
    return ["video", "num_frames", *own, "labels", "sampling", "dtype", "int8"]


def point_at_vision(file: Path, field: str) -> None:
    """Makes a config.json name the export's own vision folder in a field of it."""
    file.write_text(json.dumps(read_json(file) | {field: "vision"}, indent=2) + "\n")


def main(argv: list[str]) -> None:
    parser = Parser("python -m conversion.to_torch", __doc__, needed=("model", "out"))
    parser.add_argument("--model", type=local_path, metavar="DIR", help="run directory or base folder")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="the folder to write")
    parser.add_argument("--full", action="store_true", help="write a complete folder like the published one")
    add_check_files(parser)
    args = parser.parse_args(argv)
    meta = to_torch(args.model, args.out, args.full)
    files = sorted(str(file.relative_to(args.out)) for file in args.out.rglob("*.safetensors"))
    what = "trained projectors" if meta["trained"] else "an untrained base"
    print(f"{args.out}: {what} of the family {meta['family']} in {', '.join(files)}")


if __name__ == "__main__":
    run(main)
