"""The PyTorch encoder of benchmarks/encode_vs_torch.py.

A `folder` gives published weights; without one they are random.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from benchmarks.torch_step import clip, open_device, peak_memory, random_model, read, wait
from redvillm_jax.bases.contract import load_family
from tests.torch_qwen_vl import vision


def make_encoder(
    *, family: str, config: Any, folder: Path | None, frames: np.ndarray, device: str, dtype: str, compiled: bool
) -> tuple[Callable[[], np.ndarray], Callable[[], int | None]]:
    """Frames (B, T, H, W, 3) uint8 through the vision tower; a step returns one patch's features (see `variants`)."""
    at, kind = open_device(device), getattr(torch, dtype)
    encode = {"llava": clip_encoder, "qwen_vl": qwen_encoder}[family](config, folder, at, kind)
    module = load_family(family)
    mean, std = (torch.tensor(x, device=at) for x in (module.MEAN, module.STD))
    pictures = torch.from_numpy(frames).flatten(0, 1).to(at)

    def features_of(pictures: torch.Tensor) -> torch.Tensor:
        return encode(((pictures / 255.0 - mean) / std).to(kind).permute(0, 3, 1, 2))

    compute = torch.compile(features_of) if compiled else features_of

    @torch.no_grad()
    def step() -> np.ndarray:
        features = compute(pictures)
        wait(at)
        return features[0, 0].float().cpu().numpy()

    return step, peak_memory(at)


def clip_encoder(config: Any, folder: Path | None, at: torch.device, dtype: torch.dtype) -> Callable:
    """transformers' CLIP as LLaVA uses it: the hidden states before the last layer, without the class token."""
    if folder:
        whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        tower = whole.model.vision_tower.to(at)
    else:
        tower = random_model(CLIPVisionModel, CLIPVisionConfig(**clip(config)), at, dtype)
    tower.eval()
    layer = config.vision_feature_layer
    return lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def qwen_encoder(config: Any, folder: Path | None, at: torch.device, dtype: torch.dtype) -> Callable:
    """Qwen-VL's vision transformer in PyTorch's own operations."""
    prefix, heads = "transformer.visual.", config.vision_num_attention_heads
    if folder:
        weights = {name: t.to(at, dtype) for name, t in read(folder).items() if name.startswith(prefix)}
    else:
        weights = {prefix + name: t.to(dtype) for name, t in random_vision(config, at).items()}
    return lambda pixels: vision(weights, pixels, heads)["vit"]


def random_vision(config: Any, at: torch.device) -> dict[str, torch.Tensor]:
    """Random weights of Qwen-VL's vision transformer under the published names."""
    d, m, p = config.vision_hidden_size, config.vision_intermediate_size, config.patch_size
    shapes = {"conv1.weight": (d, 3, p, p), "positional_embedding": (config.n_queries, d)}
    norms = ["ln_pre"]
    for i in range(config.vision_num_hidden_layers):
        block = f"transformer.resblocks.{i}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        for name, out, into in (("attn.in_proj", 3 * d, d), ("attn.out_proj", d, d), ("mlp.c_fc", m, d)):
            shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
        shapes |= {f"{block}mlp.c_proj.weight": (d, m), f"{block}mlp.c_proj.bias": (d,)}
    weights = {name: 0.02 * torch.randn(shape, device=at) for name, shape in shapes.items()}
    for norm in norms:
        weights |= {f"{norm}.weight": torch.ones(d, device=at), f"{norm}.bias": torch.zeros(d, device=at)}
    return weights
