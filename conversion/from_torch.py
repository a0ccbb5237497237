"""Makes a base folder from a published image LLM: safetensors or PyTorch's .bin files, one or many.

A base folder keeps the published tensor names and dtypes, one tensor per layer, in safetensors files, beside
config.json, the tokenizer's files and base.json, which says that the folder is whole.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion.names import (
    Tensors,
    check_tensors,
    copy_small_files,
    find_names,
    read_folder,
    read_json,
    refuse_foreign,
    whole_folder,
    write_shards,
)
from data_pipeline.artefacts import CONVERTED, read_object
from data_pipeline.errors import Parser, UserError, run
from redvillm_jax.weights import (
    BASE_MARK,
    canonical_name,
    expected_tensors,
    known_families,
    load_base_module,
    read_config,
)


def from_torch(family: str, source: Path, out: Path, vision: Path | None = None) -> dict[str, Any]:
    """Writes a base folder and returns its base.json; a folder that is there already is left as it is.

    vision: the CLIP folder of a model that is published without its vision tower; by default config.json's
    mm_vision_tower, when that names a folder. Raises UserError for everything that does not fit.
    """
    base = load_base_module(family)
    refuse_delta(source)
    asked = {"family": family, "source": str(source.resolve())}
    if (out / BASE_MARK).is_file():
        meta = read_object(out / BASE_MARK, CONVERTED)
        if any(meta.get(key) != value for key, value in asked.items()):
            raise UserError(f"{out}: holds a {meta['family']} base made from {meta['source']}; choose another --out")
        print(f"{out}: already whole, nothing to do (delete it to convert again)")
        return meta
    refuse_foreign(out)

    tensors = read_folder(source)
    vision = find_vision(source, vision)
    config = parse_config(base, family, source, vision)
    refuse_other_family(base, family, config, source, tensors)
    has_tower = any(canonical_name(base, name).startswith(base.PREFIX["encoder"]) for name in tensors)
    tower: Tensors = {}
    hint = ""
    if vision:
        check_vision_size(source, vision)
        # A tower that the model brings along may be fine-tuned: it goes before the separate one.
        tower = {} if has_tower else read_folder(vision)
    elif not has_tower:
        named = read_json(source / "config.json").get("mm_vision_tower", "its CLIP")
        hint = f" | there is no vision tower: when it is published apart, download {named} and pass it with --vision"
    both = {**tensors, **tower}
    if len(both) < len(tensors) + len(tower):
        shared = sorted(tensors.keys() & tower.keys())
        raise UserError(f"{source} and {vision} both hold {shared[0]}; --vision takes a CLIP folder")
    published = check_tensors(base, config, both, source, hint)

    digests: dict[str, str] = {}
    num_bytes = sum(tensor.nbytes for tensor in both.values())
    with whole_folder(out, num_bytes) as folder, tqdm(total=len(both), desc=out.name, unit="tensor") as bar:

        def watch(name: str, array: np.ndarray) -> None:
            digests[name] = digest(array)
            bar.update()

        copy_small_files(source, folder)
        write_shards(folder, tensors, watch)
        if vision:
            (folder / "vision").mkdir(exist_ok=True)
            copy_small_files(vision, folder / "vision")
        if tower:
            write_shards(folder / "vision", tower, watch)
        meta = describe(base, config, both, published, digests) | asked
        meta["vision_source"] = str(vision.resolve()) if vision else None
        (folder / BASE_MARK).write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def digest(array: np.ndarray) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def describe(
    base: ModuleType, config: Any, tensors: Tensors, published: dict[str, str], digests: dict[str, str]
) -> dict[str, Any]:
    """What base.json says of the model; the fingerprint depends on what the base loads, not on its files.

    fingerprint: SHA-256 over the base's Config and, by canonical name, dtype, shape and bytes of every loaded
    tensor. parameters: the published model's, those that a base never runs included.
    """
    loaded = sorted(expected_tensors(base, config))
    lines = [json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)]
    for name in loaded:
        tensor = tensors[published[name]]
        lines.append(f"{name} {tensor.dtype.name} {tensor.shape} {digests[published[name]]}")
    own = [name for name in published if name in base.unused(config)] + loaded
    return {
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "image_size": config.image_size,
        "resize": base.RESIZE,
        "parameters": sum(int(np.prod(tensors[published[name]].shape)) for name in own),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "tensors": len(tensors),
        "tensors_not_loaded": len(tensors) - len(loaded),
        "dtypes": dict(collections.Counter(tensor.dtype.name for tensor in tensors.values())),
    }


# ---- what may be wrong with a source


def refuse_delta(source: Path) -> None:
    """Raises UserError for delta weights, known by the name of their folder or of their hub repository.

    config.json's _name_or_path says nothing: merging writes the delta's name into the merged copy.
    """
    for part in source.resolve().parts[-3:]:  # a hub cache has <repository>/snapshots/<revision>
        if re.search(r"(^|[-_.])delta([-_.]|$)", part, re.IGNORECASE):
            raise UserError(
                f"{source}: {part} holds delta weights, differences to LLaMA that answer nothing by themselves; merge "
                "them with LLaVA's apply_delta, or take a merged copy such as mmaaz60/LLaVA-7B-Lightening-v1-1 "
                "(a merged folder must not have 'delta' in its name)"
            )


def find_vision(source: Path, vision: Path | None) -> Path | None:
    """The separate CLIP folder: the one given, else config.json's mm_vision_tower, else `vision`, when a folder."""
    tower = read_json(source / "config.json").get("mm_vision_tower")
    if vision is None:
        vision = next((source / name for name in (tower, "vision") if name and (source / name).is_dir()), None)
    if vision is not None and not vision.is_dir():
        raise UserError(f"{vision}: not a folder; --vision takes the folder of the model's own CLIP")
    return vision


def parse_config(base: ModuleType, family: str, source: Path, vision: Path | None) -> Any:
    """The base's Config; raises UserError when config.json is not of this family."""
    if vision:
        read_json(vision / "config.json")
    try:
        return read_config(base, source, vision)
    except (KeyError, TypeError, ValueError) as error:
        model_type = read_json(source / "config.json").get("model_type")
        raise UserError(
            f"{source / 'config.json'}: not a config that --family={family} reads ({type(error).__name__}: {error}); "
            f"its model_type is {model_type!r}{other_family(source, read_folder(source), family)}"
        ) from None


def share_found(base: ModuleType, config: Any, tensors: Tensors) -> float:
    """The share of a base's tensors that a folder has."""
    needed = expected_tensors(base, config)
    return len(needed.keys() & find_names(base, tensors).keys()) / len(needed)


def other_family(source: Path, tensors: Tensors, family: str) -> str:
    """A hint at the family whose tensors these are, or nothing."""
    for other in known_families():
        base = load_base_module(other)
        try:
            if other != family and share_found(base, read_config(base, source), tensors) > 0.5:
                return f"; it looks like --family={other}"
        except (KeyError, TypeError, ValueError):
            pass
    return ""


def refuse_other_family(base: ModuleType, family: str, config: Any, source: Path, tensors: Tensors) -> None:
    """Raises UserError when the tensors are another family's, or none is this one's."""
    share = share_found(base, config, tensors)
    hint = other_family(source, tensors, family) if share < 0.5 else ""
    if hint or not share:
        model_type = read_json(source / "config.json").get("model_type")
        raise UserError(f"{source}: not a {family} model, its model_type is {model_type!r}{hint}")


def check_vision_size(source: Path, vision: Path) -> None:
    """Raises UserError when a CLIP folder has another size than the model was trained with."""
    config, clip = read_json(source / "config.json"), read_json(vision / "config.json")
    clip = clip.get("vision_config", clip)
    found = {key: clip.get(key) for key in ("hidden_size", "patch_size", "image_size")}
    named = str(config.get("mm_vision_tower", ""))
    size = re.search(r"patch(\d+)(?:-(\d+))?$", named)  # openai/clip-vit-large-patch14-336
    wanted = {
        "hidden_size": config.get("mm_hidden_size"),
        "patch_size": int(size[1]) if size else None,
        "image_size": int(size[2] or 224) if size else None,
    }
    for key, value in wanted.items():
        if None not in (value, found[key]) and found[key] != value:
            asked = f" ({named})" if size else ""
            raise UserError(f"{vision}: a CLIP with {key} {found[key]}, but {source} was trained with {value}{asked}")


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m conversion.from_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", required=True, choices=known_families(), help="which image LLM it is")
    parser.add_argument("--source", required=True, type=Path, help="the published folder")
    parser.add_argument("--vision", type=Path, help="the folder of its CLIP, when that is published apart (LLaVA)")
    parser.add_argument("--out", required=True, type=Path, help="the base folder to write")
    args = parser.parse_args(argv)
    meta = from_torch(args.family, args.source, args.out, args.vision)
    dtypes = ", ".join(f"{name} × {count}" for name, count in meta["dtypes"].items())
    print(f"{args.out}: {meta['family']} base, {meta['parameters']:,} parameters, {meta['bytes'] / 1e9:.2f} GB")
    print(f"  tensors      {meta['tensors']} ({dtypes}), {meta['tensors_not_loaded']} of them kept but never loaded")
    print(f"  vision       {meta['vision_source'] or 'in the same folder'}")
    print(f"  pictures     {meta['image_size']} px, resized by {meta['resize']}")
    print(f"  fingerprint  {meta['fingerprint'][:16]}")


if __name__ == "__main__":
    run(main)
