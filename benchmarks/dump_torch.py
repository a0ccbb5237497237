"""Runs a published image LLM in PyTorch on the inputs of benchmarks.make_inputs and stores every stage.

python -m benchmarks.dump_torch --family=llava|qwen_vl --source=FOLDER [--vision=CLIP] --inputs=FILE --out=FILE

Everything is fp32 on the CPU. LLaVA in transformers' form runs as LlavaForConditionalGeneration; in its original
form as transformers' CLIPVisionModel and LlamaForCausalLM and the projector of the same folder, which is the
same computation. Qwen-VL runs the code that its folder brings along, which needs transformers 4.32. Of large
arrays only a sample is kept (benchmarks.stage_file). This file imports neither JAX nor redvillm_jax, so that it
runs in an environment of its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.stage_file import NEW_TOKENS, sample

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Arrays = dict[str, torch.Tensor]


def normalised(frames: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) fp32, as both models' own image processors do."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def record(module: nn.Module, take: Callable, into: Arrays, name: str) -> None:
    """Stores `take(inputs, output)` of a module's first call under `name`."""

    def hook(_, inputs, output) -> None:
        into.setdefault(name, take(inputs, output))

    module.register_forward_hook(hook)


def record_text(layers: nn.ModuleList, into: Arrays) -> None:
    for i, layer in enumerate(layers):
        record(layer, lambda _, out: out[0] if isinstance(out, tuple) else out, into, f"text_layer_{i}")


def pool(features: torch.Tensor) -> Arrays:
    """features: (T, N, D) -> the two streams of RED-VILLM."""
    return {"mean_over_time": features.mean(0), "mean_over_space": features.mean(1)}


# ---- LLaVA


def load_llava(source: Path, vision: Path | None) -> tuple[nn.Module, nn.Module, nn.Module, int | None]:
    """The vision tower, the projector, the language model, and the id of a picture's tokens (transformers' form)."""
    from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

    config = json.loads((source / "config.json").read_text())
    if "text_config" in config:
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        return model.model.vision_tower, model.model.multi_modal_projector, model, model.config.image_token_id
    tower = CLIPVisionModel.from_pretrained(vision or source / "vision", dtype=torch.float32)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # wrong in old files, and of no use here
    llama = LlamaConfig(**{key: value for key, value in config.items() if key not in (*ids, "model_type")})
    llm, report = LlamaForCausalLM.from_pretrained(source, config=llama, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise SystemExit(f"error: {source}: lacks {', '.join(sorted(report['missing_keys']))}")
    weights = {name: w.float() for name, w in projector_weights(source).items()}
    if "weight" in weights:
        projector = nn.Linear(*reversed(weights["weight"].shape))
    else:
        first, second = (nn.Linear(*reversed(weights[f"{i}.weight"].shape)) for i in (0, 2))
        projector = nn.Sequential(first, nn.GELU(), second)
    projector.load_state_dict(weights)
    return tower, projector, llm, None


def projector_weights(source: Path) -> Arrays:
    """What follows `mm_projector.` in the names of a folder's tensors, with the tensors."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted([*source.glob("*.bin"), *source.glob("*.safetensors")]):
        read = load_file if file.suffix == ".safetensors" else (lambda f: torch.load(f, mmap=True, weights_only=True))
        found |= {name.split("mm_projector.")[1]: w for name, w in read(file).items() if "mm_projector." in name}
    return found


def dump_llava(source: Path, vision: Path | None, pixels: torch.Tensor, ids: Arrays) -> Arrays:
    tower, projector, llm, image_token = load_llava(source, vision)
    config = json.loads((source / "config.json").read_text())
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    kind = "lin" if isinstance(projector, nn.Linear) else "mlp"
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    out = {f"clip_hidden_{i}": x for i, x in enumerate(hidden)}
    out["patch_features"] = features = hidden[layer][:, 1:]
    out["mm_projected"] = projector(features)
    out |= pool(features)
    q_t, q_z = projector(out["mean_over_space"]), projector(out["mean_over_time"])
    out |= {f"{kind}_mean_over_space": q_t, f"{kind}_mean_over_time": q_z, "video_tokens": torch.cat([q_t, q_z])}

    embed = llm.get_input_embeddings()
    before, after = ids["video_prefix_ids"], ids["video_suffix_ids"]

    def around(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([embed(before)[0], tokens, embed(after)[0]])[None]

    body = llm.model.language_model if image_token is not None else llm.model
    record_text(body.layers, out)
    out["text_logits"] = llm(input_ids=ids["text_ids"]).logits
    out[f"video_{kind}_embeds"] = clip = around(out["video_tokens"])
    out[f"video_{kind}_logits"] = llm(inputs_embeds=clip).logits
    slots = torch.full((1, features.shape[1]), -1 if image_token is None else image_token)
    out["image_ids"] = torch.cat([before, slots, after], dim=1)
    if image_token is None:
        out["image_logits"] = llm(inputs_embeds=around(out["mm_projected"][0])).logits
    else:
        out["image_logits"] = llm(input_ids=out["image_ids"], pixel_values=pixels[:1]).logits
    for name, embeds in (("greedy", around(out["mm_projected"][0])), ("greedy_video", clip)):
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        new = llm.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long(), **settings)
        out[name] = new[:, -NEW_TOKENS:]
    return out


# ---- Qwen-VL


def dump_qwen_vl(source: Path, vision: Path | None, pixels: torch.Tensor, ids: Arrays) -> Arrays:
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "torch_dtype": torch.float32, "fp32": True, "low_cpu_mem_usage": True}
    model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    visual, out = model.transformer.visual, {}
    conv1, ln_pre, blocks = visual.conv1, visual.ln_pre, visual.transformer.resblocks
    record(conv1, lambda _, y: y[:1].flatten(2).transpose(1, 2), out, "conv1_frame0")
    record(ln_pre, lambda x, _: x[0][:1], out, "pos_added_frame0")
    record(ln_pre, lambda _, y: y[:1], out, "ln_pre_frame0")
    record(blocks[0].attn, lambda _, y: y[:, :1].transpose(0, 1), out, "block0_attn_frame0")
    for i, block in enumerate(blocks):
        record(block, lambda _, y: y[:, :1].transpose(0, 1), out, f"block{i}_frame0")
    record(visual.attn_pool, lambda x, _: x[0], out, "vit")
    record(visual.attn_pool, lambda _, y: y[:1], out, "attn_pool_frame0")
    record(visual.ln_post, lambda _, y: y[:1], out, "ln_post_frame0")
    out["visual_out_frames01"] = visual(pixels)[:2]
    out |= pool(out["vit"])
    num_frames = len(pixels)

    def project(features: torch.Tensor) -> torch.Tensor:
        return (visual.ln_post(visual.attn_pool(features[None])) @ visual.proj)[0]

    q_t, q_z = project(out["mean_over_space"]), project(out["mean_over_time"])
    out |= {f"align_mean_over_space_T{num_frames}": q_t, "align_mean_over_time": q_z}
    out["video_tokens"] = torch.cat([q_t, q_z])

    start = model.config.visual["image_start_id"]
    before, after = ids["video_prefix_ids"], ids["video_suffix_ids"]

    def around(tokens: torch.Tensor) -> torch.Tensor:
        """The row of ids whose picture, named "" in bytes, the model replaces by `tokens`."""
        visual.encode = lambda paths: tokens[None]
        return torch.cat([before, torch.full((1, len(tokens)), start + 2), after], dim=1)

    record_text(model.transformer.h, out)
    out["text_logits_eval"] = model(input_ids=ids["text_ids"]).logits
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out["greedy_text"] = model.generate(ids["text_ids"], **settings)[:, -NEW_TOKENS:]
    for name, tokens in (("image", out["visual_out_frames01"][0]), ("video", out["video_tokens"])):
        row = around(tokens)
        logits = model(input_ids=row).logits
        out |= {"image_ids": row, "image_logits_eval": logits} if name == "image" else {}
        out |= {"video_resample_logits": logits[:, -after.shape[1] :]} if name == "video" else {}
        out[f"greedy_{name}"] = model.generate(row, **settings)[:, -NEW_TOKENS:]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=("llava", "qwen_vl"))
    parser.add_argument("--source", required=True, type=Path, help="the published folder")
    parser.add_argument("--vision", type=Path, help="the folder of LLaVA v1's CLIP")
    parser.add_argument("--inputs", required=True, type=Path, help="made by benchmarks.make_inputs")
    parser.add_argument("--out", required=True, type=Path, help="the .npz to write")
    args = parser.parse_args()
    inputs = dict(np.load(args.inputs))
    ids = {name: torch.from_numpy(array) for name, array in inputs.items() if name.endswith("_ids")}
    dump = {"llava": dump_llava, "qwen_vl": dump_qwen_vl}[args.family]
    with torch.no_grad():
        pixels = normalised(inputs["frames"])
        arrays = {"pixels": pixels} | dump(args.source, args.vision, pixels, ids)
    unfinished = args.out.with_suffix(".partial.npz")
    np.savez(unfinished, **inputs, **{name: sample(array.numpy()) for name, array in arrays.items()})
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
