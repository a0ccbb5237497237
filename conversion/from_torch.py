"""Makes a base folder from a published image LLM: safetensors or PyTorch's .bin files, one or many.

python -m conversion.from_torch --source=llava-1.5-7b-hf --out=bases/llava-1.5
python -m conversion.from_torch --source=LLaVA-7B-Lightening-v1-1 --vision=clip-vit-large-patch14 --out=bases/llava-v1
python -m conversion.from_torch --source=Qwen-VL-Chat --out=bases/qwen-vl-chat

The family comes from model_type in config.json; --family overrides it, and names families of your own.

A base folder keeps the published tensor names and dtypes, one tensor per layer, in safetensors files. It also has
config.json, the tokenizer's files, and base.json, which marks the folder as whole and has the hashes of its files.
"""

import collections
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion.families import check_family, find_family
from conversion.names import (
    FLOATS,
    Tensors,
    check_folder,
    check_tensors,
    copy_small_files,
    read_folder,
    read_json,
    refuse_foreign,
    whole_folder,
    write_shards,
)
from data_pipeline.common.artefacts import CONVERTED, read_object, with_checksum
from data_pipeline.common.cli import Parser, local_path
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.file_hashes import check_files, hash_files
from data_pipeline.common.locks import locked
from redvillm_jax.bases.contract import Family, known_families, load_family
from redvillm_jax.model.base_folder import BASE_MARK, canonical_name, head_name, read_config
from redvillm_jax.model.weights import expected_tensors
from redvillm_jax.modules.chat_template import find_template


def from_torch(
    family: str | None, source: Path, out: Path, vision: Path | None = None, *, tokenizer: bool = True
) -> dict[str, Any]:
    """Writes a base folder and returns its base.json. An existing base folder is left as it is.

    family: None takes it from config.json. vision: the CLIP folder of a model that is published without its vision
    tower. tokenizer: whether the source must have the tokenizer that belongs to its weights; a base without one can
    neither train nor answer. Raises UserError for a source that cannot be converted, and while another run converts to
    `out`.
    """
    with locked(out, beside=True):
        return convert(family, source, out, vision, tokenizer)


def convert(family: str | None, source: Path, out: Path, vision: Path | None, tokenizer: bool) -> dict[str, Any]:
    """`from_torch` for a caller that holds the lock of `out`."""
    base = load_family(family) if family is not None else None
    check_folder(source, "--source takes the folder of a published model")
    base = base or load_family(find_family(source))
    refuse_delta(source)
    asked = {"family": base.name, "source": str(source.resolve())}
    if (out / BASE_MARK).is_file():
        meta = read_object(out / BASE_MARK, CONVERTED)
        if any(meta.get(key) != value for key, value in asked.items()):
            raise UserError(f"{out}: holds a {meta['family']} base made from {meta['source']}; choose another --out")
        check_files(out, meta.get("files"), "delete it to convert again")
        print(f"{out}: already whole, nothing to do (delete it to convert again)")
        return meta
    refuse_foreign(out)

    vision = find_vision(base, source, vision)
    config = parse_config(base, source, vision)
    tensors = read_folder(source)
    has_tower = any(canonical_name(base, name).startswith(base.PREFIX["encoder"]) for name in tensors)
    tower: Tensors = {}
    hint = ""
    if vision:
        # The model's own tower may be fine-tuned, so it goes before a separate one.
        tower = {} if has_tower else read_folder(vision)
    elif not has_tower:
        hint = " | there is no vision tower"
        if base.VISION_FIELD is not None:
            named = read_json(source / "config.json").get(base.VISION_FIELD, "its CLIP")
            hint += f": when it is published apart, download {named} and pass it with --vision"
    both = {**tensors, **tower}
    if len(both) < len(tensors) + len(tower):
        shared = sorted(tensors.keys() & tower.keys())
        raise UserError(f"{source} and {vision} both hold {shared[0]}; --vision takes a CLIP folder")
    published = check_tensors(base, config, both, source, hint)
    if tokenizer:
        check_tokenizer(base, config, source)

    digests: dict[str, str] = {}
    num_bytes = sum(tensor.nbytes for tensor in both.values())
    with whole_folder(out, num_bytes) as folder, tqdm(total=len(both), desc=out.name, unit="tensor") as bar:

        def watch(name: str, array: np.ndarray) -> None:
            check_finite(name, array, vision if name in tower else source)
            digests[name] = digest(array)
            bar.update()

        copy_small_files(source, folder)
        write_shards(folder, tensors, watch)
        if vision:
            (folder / "vision").mkdir(exist_ok=True)
            copy_small_files(vision, folder / "vision")
        if tower:
            write_shards(folder / "vision", tower, watch)
        check_copied_head(base, config, published, digests, source)
        meta = describe(base, config, both, published, digests) | asked
        meta["vision_source"] = str(vision.resolve()) if vision else None
        meta["chat_template"] = (find_template(source) or (None,))[0]
        meta = with_checksum(meta | {"files": hash_files(folder)})
        (folder / BASE_MARK).write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def digest(array: np.ndarray) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def describe(
    base: Family, config: Any, tensors: Tensors, published: dict[str, str], digests: dict[str, str]
) -> dict[str, Any]:
    """The content of base.json. The fingerprint depends on the loaded tensors, not on their files.

    fingerprint: SHA-256 over the config's `identity` and, by canonical name, dtype, shape and bytes of every loaded
    tensor. parameters: of the published model, including tensors that a base never runs.
    """
    loaded = sorted(expected_tensors(base, config))
    lines = [json.dumps(base.identity(config), sort_keys=True, default=str)]
    for name in loaded:
        tensor = tensors[published[name]]
        lines.append(f"{name} {tensor.dtype.name} {tensor.shape} {digests[published[name]]}")
    own = [name for name in published if name in base.unused(config)] + loaded
    return {
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "image_size": config.image_size,
        "resize": base.frame_fit(config),
        "parameters": sum(int(np.prod(tensors[published[name]].shape)) for name in own),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "tensors": len(tensors),
        "tensors_not_loaded": len(tensors) - len(loaded),
        "dtypes": dict(collections.Counter(tensor.dtype.name for tensor in tensors.values())),
    }


# ---- what may be wrong with a source


def refuse_delta(source: Path) -> None:
    """Raises UserError for delta weights, known by the name of their folder or of their hub repository.

    config.json's _name_or_path is no evidence, because merging writes the delta's name into the merged copy.
    """
    for part in source.resolve().parts[-3:]:  # a hub cache has <repository>/snapshots/<revision>
        if re.search(r"(^|[-_.])delta([-_.]|$)", part, re.IGNORECASE):
            raise UserError(
                f"{source}: {part} holds delta weights, differences to LLaMA that answer nothing by themselves; merge "
                "them with LLaVA's apply_delta, or take a merged copy such as mmaaz60/LLaVA-7B-Lightening-v1-1 "
                "(a merged folder must not have 'delta' in its name)"
            )


def find_vision(base: Family, source: Path, vision: Path | None) -> Path | None:
    """The folder of a separate vision tower: the given one, or `vision` in the source, as bases and exports have it.

    The value of `VISION_FIELD` in config.json only names a tower and is never opened as a path. Raises UserError for a
    family that has its tower in its own files.
    """
    if vision is None and (source / "vision").is_dir():
        vision = source / "vision"
    if vision is not None:
        if base.VISION_FIELD is None:
            raise UserError(f"{vision}: the family {base.name} has its vision tower in its own files; leave it out")
        check_folder(vision, "--vision takes the folder of the model's own CLIP")
        read_json(vision / "config.json")
    return vision


def parse_config(base: Family, source: Path, vision: Path | None) -> Any:
    """The base's Config. Raises UserError when config.json is another family's or asks for another computation."""
    check_family(base, source)
    return read_config(base, source, vision, "copy it again")


def check_tokenizer(base: Family, config: Any, source: Path) -> None:
    """Raises UserError when the source has no readable tokenizer, or the tokenizer of other weights."""
    try:
        tokenizer = base.Tokenizer(source)
    except UserError as error:
        raise UserError(
            f"{error}, or pass --without_tokenizer for a base that can be compared but neither trains nor answers"
        ) from None
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {tokenizer.size} tokens, vocab_size in config.json is {config.vocab_size}; "
            "use the files that belong to these weights"
        )
    base.prompt(tokenizer, config, "What happens?", None)  # raises where the tokenizer lacks one of its markers
    base.check_tokenizer(tokenizer, config, read_json(source / "config.json"), str(source))


def check_copied_head(
    base: Family, config: Any, published: Mapping[str, str], digests: Mapping[str, str], source: Path
) -> None:
    """Raises UserError when a folder holds an output head that differs from the table to which the model ties it."""
    head, copy = head_name(base, config), f"{base.PREFIX['llm']}lm_head.weight"
    if copy != head and copy in published and digests[published[copy]] != digests[published[head]]:
        raise UserError(
            f"{source}: {published[copy]} differs from {published[head]}, which its config.json ties to it; set "
            "tie_word_embeddings to false if the model was trained so"
        )


def check_finite(name: str, array: np.ndarray, where: Path) -> None:
    """Raises UserError when a tensor holds NaN or infinity."""
    if array.dtype.name in FLOATS and not (finite := np.isfinite(array)).all():
        bad = finite.size - np.count_nonzero(finite)
        raise UserError(
            f"{where}: {name} has {bad} values of {finite.size} that are NaN or infinite; its file is damaged, or the "
            "model diverged while it was trained: download it again, or take another checkpoint"
        )


def main(argv: list[str]) -> None:
    parser = Parser("python -m conversion.from_torch", __doc__, needed=("source", "out"))
    families = f"{', '.join(known_families())}, or the dotted path of your own module (docs/new_base.md)"
    parser.add_argument("--family", help=f"which image LLM it is, where config.json does not say so: {families}")
    parser.add_argument("--source", type=local_path, metavar="DIR", help="the published folder")
    parser.add_argument(
        "--vision", type=local_path, metavar="DIR", help="the folder of its vision tower, if published apart (LLaVA)"
    )
    parser.add_argument("--out", type=local_path, metavar="DIR", help="the base folder to write")
    parser.add_argument(
        "--without_tokenizer", action="store_true", help="take weights alone: the base neither trains nor answers"
    )
    args = parser.parse_args(argv)
    tokenizer = not args.without_tokenizer
    meta = from_torch(args.family, args.source, args.out, args.vision, tokenizer=tokenizer)
    dtypes = ", ".join(f"{name} × {count}" for name, count in meta["dtypes"].items())
    print(f"{args.out}: {meta['family']} base, {meta['parameters']:,} parameters, {meta['bytes'] / 1e9:.2f} GB")
    print(f"  tensors      {meta['tensors']} ({dtypes}), {meta['tensors_not_loaded']} of them kept but never loaded")
    print(f"  vision       {meta['vision_source'] or 'in the same folder'}")
    print(f"  pictures     {meta['image_size']} px, resized by {meta['resize']}")
    print(f"  prompt       {meta.get('chat_template') or 'of the family'}")
    print(f"  fingerprint  {meta['fingerprint'][:16]}")


if __name__ == "__main__":
    run(main)
