"""Writes trained projectors for PyTorch: safetensors under PyTorch's names, alone or in a complete folder.

python -m conversion.to_torch --model=RUN --out=EXPORT [--full]

The projector keeps the published names; the temporal module has the same names under `temporal_module.`, extra
MLPs theirs under `extra_mlp_<stream>.`. redvillm.json says how a video becomes tokens with them, and has the hashes of
all files.
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
from redvillm_jax.runtime.chips import quiet_without_tpu

METHOD = (  # the run's switches that are needed to rebuild the model, here or in PyTorch, and to answer as it does
    "video",
    "num_frames",
    "streams",
    "stream_order",
    "temporal_module",
    "temporal_init",
    "train_spatial",
    "extra_mlp",
    "spatial_pool",
    "short_video",
    "qwen_align",
    "temporal_positions",
    "labels",
    "sampling",
    "dtype",
    "int8",
)


def to_torch(model: Path, out: Path, full: bool = False) -> dict[str, Any]:
    """Exports a run or a base and returns its redvillm.json; an earlier export in `out` is replaced.

    Without `full`: projectors.safetensors, fp32 for a run, the published dtype for a base. With it: all tensors
    under their published names and dtypes, the trained ones cast to them. Raises UserError when `model` is
    neither a run nor a base, or `out` holds something else, and while another run exports to `out`.
    """
    with locked(out, beside=True):
        return export(model, out, full)


def export(model: Path, out: Path, full: bool) -> dict[str, Any]:
    """`to_torch` for who alone may write `out`."""
    base, config, trained = open_source(model)
    refuse_foreign(out, EXPORT_MARK)
    tensors = read_folder(base.path)
    separate_vision = (base.path / "vision").is_dir()
    tower = read_folder(base.path / "vision") if any(base.path.glob("vision/*.safetensors")) else {}
    own = projector_names(base, "spatial")
    new = trained_tensors(base, tensors, trained)
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
                point_at_vision(folder / "config.json")
            if tower:
                write_shards(folder / "vision", tower, watch)
        else:
            write_safetensors(folder / PROJECTORS, tensors, watch)
        meta = with_checksum(meta | {"files": file_hashes.hash_files(folder)})
        (folder / EXPORT_MARK).write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def open_source(model: Path) -> tuple[Base, dict[str, Any] | None, dict[str, Any]]:
    """A run as (its base, its config, its trained projectors), or a base as (it, None, nothing)."""
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
    base = open_base(config["base"], config["base_fingerprint"])
    return base, config, trained


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts of arrays by dotted path."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def trained_tensors(base: Base, tensors: Mapping[str, Tensor], trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The projectors of a run in fp32 by their names in PyTorch; what it did not train is the base's."""
    arrays = {}
    for group, tree in ({"spatial": {}} | dict(trained) if trained else {}).items():
        flat = flatten(tree)
        if group.startswith(EXTRA_PREFIX):
            arrays |= {f"{group}.{path}": np.asarray(array, np.float32) for path, array in flat.items()}
            continue
        names = zip(projector_names(base, group).items(), projector_names(base, "spatial"), strict=True)
        for (name, leaf), published in names:
            path = ".".join(leaf.path)
            arrays[name] = np.asarray(flat[path] if path in flat else tensors[published].read(), np.float32)
    return arrays


def in_memory(array: np.ndarray) -> Tensor:
    """An array as a tensor to write."""
    return Tensor(array.shape, array.dtype, functools.partial(np.asarray, array))


def describe(base: Base, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """redvillm.json but for its "files": how the projectors are used. A base that is an export keeps what it says."""
    if config is None and (base.path / EXPORT_MARK).is_file():
        return read_object(base.path / EXPORT_MARK, EXPORT)
    return {
        "family": base.family,
        "base_fingerprint": base.fingerprint,
        "trained": config is not None,
        "image_size": base.config.image_size,
        "resize": base.module.RESIZE,
        "mean": base.module.MEAN,
        "std": base.module.STD,
        "method": {name: config[name] for name in METHOD if name in config} if config else {},
    }


def point_at_vision(file: Path) -> None:
    """Makes a config.json name the export's own vision folder."""
    file.write_text(json.dumps(read_json(file) | {"mm_vision_tower": "vision"}, indent=2) + "\n")


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
