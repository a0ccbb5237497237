"""Runs a published image LLM in PyTorch on the inputs of conversion.compare and returns every stage.

python -m conversion.reference --source=FOLDER [--vision=CLIP] --inputs=FILE --out=FILE [--trust_remote_code]

Everything is fp32 on the CPU. A folder in transformers' form runs as its own class, LLaVA's original form as
transformers' CLIPVisionModel and language model with the projector of the folder, which is the same computation, and
Qwen-VL as the code that its folder brings along, which needs transformers 4.32. This file imports neither JAX nor
redvillm_jax, so that it runs in an environment of its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from conversion.stage_file import NEW_TOKENS, ROWS, sample

Arrays = dict[str, torch.Tensor]


class Published(NamedTuple):
    """A published model.

    encoder, decoder: modules whose longest list is of their layers. swapped: whether the encoder's layers have the
    batch in their second axis. encode: pixels (T, 3, H, W) -> features (T, N, D). project: features (B, N, D) -> (B, V,
    K). sequence: features (T, D) of a sequence -> (V, K). logits: (ids before, visual tokens (V, K) or None, ids
    behind) -> (1, S, vocab_size); ids are (1, any). tiled: (pixels (n, 3, S, S) of a picture's squares, its size, ids
    with -1 for visual tokens) -> (1, S, vocab_size), by the model's own forward as a whole; None: it cuts no pictures.
    """

    encoder: nn.Module
    decoder: nn.Module
    swapped: bool
    encode: Callable[[torch.Tensor], torch.Tensor]
    project: Callable[[torch.Tensor], torch.Tensor]
    sequence: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[..., torch.Tensor]
    tiled: Callable[..., torch.Tensor] | None = None


def normalised(inputs: dict[str, np.ndarray], name: str) -> torch.Tensor:
    """inputs[name] (T, H, W, 3) uint8 -> (T, 3, H, W) fp32, by the mean and standard deviation of the inputs."""
    pixels = torch.from_numpy(inputs[name]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.from_numpy(inputs[name]).float()[:, None, None] for name in ("mean", "std"))
    return (pixels - mean) / std


def record(module: nn.Module, into: Arrays, name: str, swapped: bool = False) -> list[Any]:
    """Stores the first input and all outputs of a module's layers in its next run; returns the hooks."""
    layers = max((one for one in module.modules() if isinstance(one, nn.ModuleList)), key=len)

    def keep(key: str, found: Any) -> None:
        array = found[0] if isinstance(found, tuple) else found
        into.setdefault(key, array.transpose(0, 1) if swapped else array)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(f"{name}_embeds", args[0] if args else kwargs["hidden_states"])

    def behind(i: int) -> Callable:
        return lambda _, args, output: keep(f"{name}_layer_{i}", output)

    hooks = [layer.register_forward_hook(behind(i)) for i, layer in enumerate(layers)]
    return [layers[0].register_forward_pre_hook(before, with_kwargs=True), *hooks]


# ---- published models


def load_transformers(source: Path) -> Published:
    """A model of transformers' own class."""
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    refuse_missing(source, report)
    body, config = model.model.eval(), model.config
    encoder = body.vision_tower if hasattr(body, "vision_tower") else body.vision_model
    project = body.multi_modal_projector if hasattr(body, "multi_modal_projector") else body.connector
    embed = model.get_input_embeddings()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        if not hasattr(config, "vision_feature_layer"):
            return encoder(pixel_values=pixels).last_hidden_state
        hidden = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        return hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden

    def sequence(features: torch.Tensor) -> torch.Tensor:
        """Each feature as a picture of equal features: also through a projector that pools a grid, to one token."""
        return torch.cat([project(one.repeat(1, num_features, 1))[:, 0] for one in features[:, None]])

    def logits(before: torch.Tensor, tokens: torch.Tensor | None, behind: torch.Tensor) -> torch.Tensor:
        visual = [] if tokens is None else [tokens[None]]
        embeds = torch.cat([embed(before), *visual, embed(behind)], dim=1)
        kinds = torch.zeros(embeds.shape[:2], dtype=torch.long)
        kinds[:, before.shape[1] : embeds.shape[1] - behind.shape[1]] = 1
        options = {"token_type_ids": kinds} if "mm_tokens_per_image" in config.to_dict() else {}  # Gemma 3
        return model(inputs_embeds=embeds, **options).logits

    def tiled(pixels: torch.Tensor, size: np.ndarray, ids: np.ndarray) -> torch.Tensor:
        options = {"image_sizes": torch.from_numpy(size)[None]} if hasattr(config, "image_grid_pinpoints") else {}
        slots = torch.from_numpy(np.where(ids < 0, config.image_token_id, ids))
        return model(input_ids=slots, pixel_values=pixels[None], **options).logits

    num_features = 0

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal num_features
        features = encode(pixels)
        num_features = features.shape[1]
        return features

    decoder = body.language_model if hasattr(body, "language_model") else body.text_model
    return Published(encoder, decoder, False, counted, project, sequence, logits, tiled)


def refuse_missing(source: Path, report: dict[str, Any]) -> None:
    """Ends the run when transformers would fill weights at random."""
    if report["missing_keys"]:
        raise SystemExit(f"error: {source}: lacks {', '.join(sorted(report['missing_keys'])[:5])}")


def load_original_llava(source: Path, vision: Path | None) -> Published:
    """LLaVA in the form of its own repository: a language model with `mm_projector`, and a CLIP published apart."""
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel

    config = json.loads((source / "config.json").read_text())
    tower = CLIPVisionModel.from_pretrained(vision or source / "vision", dtype=torch.float32).eval()
    kind = "mistral" if "mistral" in config["model_type"] else "llama"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # wrong in old files, and of no use here
    text = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k not in (*ids, "model_type")})
    loaded = AutoModelForCausalLM.from_pretrained(source, config=text, dtype=torch.float32, output_loading_info=True)
    llm, report = loaded
    refuse_missing(source, report)
    weights = {name: w.float() for name, w in projector_weights(source).items()}
    if "weight" in weights:
        project: nn.Module = nn.Linear(*reversed(weights["weight"].shape))
    else:
        first, second = (nn.Linear(*reversed(weights[f"{i}.weight"].shape)) for i in (0, 2))
        project = nn.Sequential(first, nn.GELU(), second)
    project.load_state_dict(weights)
    embed, layer = llm.eval().get_input_embeddings(), config.get("mm_vision_select_layer", -2)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]

    def logits(before: torch.Tensor, tokens: torch.Tensor | None, behind: torch.Tensor) -> torch.Tensor:
        visual = [] if tokens is None else [tokens[None]]
        return llm(inputs_embeds=torch.cat([embed(before), *visual, embed(behind)], dim=1)).logits

    return Published(tower, llm.model, False, encode, project, project, logits)


def projector_weights(source: Path) -> Arrays:
    """What follows `mm_projector.` in the names of a folder's tensors, with the tensors."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted([*source.glob("*.bin"), *source.glob("*.safetensors")]):
        read = load_file if file.suffix == ".safetensors" else (lambda f: torch.load(f, mmap=True, weights_only=True))
        found |= {name.split("mm_projector.")[1]: w for name, w in read(file).items() if "mm_projector." in name}
    return found


def load_remote(source: Path) -> Published:
    """Qwen-VL, whose code finds a picture by the marks around it and replaces what lies between."""
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "torch_dtype": torch.float32, "fp32": True, "low_cpu_mem_usage": True}
    model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    visual, start = model.transformer.visual, model.config.visual["image_start_id"]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        found: Arrays = {}
        hook = visual.attn_pool.register_forward_hook(lambda _, args, output: found.update(features=args[0]))
        visual(pixels)
        hook.remove()
        return found["features"]

    def project(features: torch.Tensor) -> torch.Tensor:
        return visual.ln_post(visual.attn_pool(features)) @ visual.proj

    def logits(before: torch.Tensor, tokens: torch.Tensor | None, behind: torch.Tensor) -> torch.Tensor:
        if tokens is None:
            return model(input_ids=torch.cat([before, behind], dim=1)).logits
        visual.encode = lambda paths: tokens[None]  # the path, in bytes between the marks, is not read
        place = torch.full((1, len(tokens)), start + 2)
        return model(input_ids=torch.cat([before, place, behind], dim=1)).logits

    sequence = lambda features: project(features[None])[0]  # noqa: E731
    return Published(visual, model.transformer, True, encode, project, sequence, logits)


# ---- stages


def run_published(
    source: Path, vision: Path | None, inputs: dict[str, np.ndarray], trust_remote_code: bool = False
) -> dict[str, np.ndarray]:
    """Returns the stages of a published model by name, large ones as samples.

    inputs: of `conversion.compare.make_inputs`. trust_remote_code: whether the folder's own code may run. Raises
    ValueError for a folder that needs it.
    """
    config = json.loads((source / "config.json").read_text())
    if "text_config" in config:
        model = load_transformers(source)
    elif "visual" not in config:
        model = load_original_llava(source, vision)
    elif trust_remote_code:
        model = load_remote(source)
    else:
        raise ValueError("it runs with its own code alone: read its .py files, then pass --trust_remote_code")
    with torch.no_grad():
        stages = run(model, normalised(inputs, "frames"), {k: torch.from_numpy(inputs[k]) for k in IDS})
        if "tiles" in inputs and model.tiled is not None:
            hooks = record(model.decoder, stages, "tiles")
            pixels = normalised(inputs, "tiles")
            stages["tiles_logits"] = model.tiled(pixels, inputs["tiles_size"], inputs["tiles_ids"])
            for hook in hooks:
                hook.remove()
    return {name: sample(array.numpy()) for name, array in stages.items()}


IDS = ("text_ids", "before_ids", "behind_ids")


def run(model: Published, pixels: torch.Tensor, ids: Arrays) -> Arrays:
    """The stages of one picture (the first frame), of the clip of all frames, and of a text."""
    out: Arrays = {}
    hooks = record(model.encoder, out, "encoder", model.swapped)
    out["features"] = features = model.encode(pixels)
    for hook in hooks:
        hook.remove()
    out["pictures"] = pictures = model.project(features)
    frames, places = features.mean(1), features.mean(0)  # RED-VILLM's streams
    out["mean_over_space"], out["mean_over_time"] = frames, places
    out["clip_tokens"] = clip = torch.cat([model.sequence(frames), model.project(places[None])[0]])
    nothing = torch.zeros((1, 0), dtype=torch.long)
    rows = {"text": (ids["text_ids"], None, nothing)}
    rows |= {name: (ids["before_ids"], x, ids["behind_ids"]) for name, x in (("picture", pictures[0]), ("clip", clip))}
    for name in ROWS:
        before, tokens, behind = rows[name]
        hooks = record(model.decoder, out, name)
        out[f"{name}_logits"] = logits = model.logits(before, tokens, behind)
        for hook in hooks:
            hook.remove()
        new = [logits[:, -1].argmax(-1)]
        while len(new) < NEW_TOKENS:
            row = torch.cat([behind, torch.stack(new, dim=1)], dim=1)
            new.append(model.logits(before, tokens, row)[:, -1].argmax(-1))
        out[f"{name}_greedy"] = torch.stack(new, dim=1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=Path, help="the published folder")
    parser.add_argument("--vision", type=Path, help="the folder of a CLIP that is published apart")
    parser.add_argument("--inputs", required=True, type=Path, help="the inputs that conversion.compare writes")
    parser.add_argument("--out", required=True, type=Path, help="the .npz to write")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the folder brings along")
    args = parser.parse_args()
    try:
        stages = run_published(args.source, args.vision, dict(np.load(args.inputs)), args.trust_remote_code)
    except ValueError as error:
        raise SystemExit(f"error: {args.source}: {error}") from None
    np.savez(args.out, **stages)


if __name__ == "__main__":
    main()
