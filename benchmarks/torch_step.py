"""The PyTorch train step of benchmarks/train_vs_torch.py.

A `folder` gives published weights; without one they are random.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from tests.torch_qwen_vl import grid, resample, sequence


class Parts(NamedTuple):
    """A model in parts. trainable: by projector; project(projector, features): (B, M, D) -> (B, V, K), all fp32."""

    decoder: torch.nn.Module
    head: torch.nn.Module
    trainable: dict[str, list[torch.Tensor]]
    project: Callable[[str, torch.Tensor], torch.Tensor]


def make_step(
    *,
    family: str,
    config: Any,
    folder: Path | None,
    batch: Mapping[str, np.ndarray],
    device: str,
    dtype: str,
    learning_rate: float,
    num_steps: int,
    compiled: str,
    checkpoint: bool,
) -> tuple[Callable[[], float], Callable[[], int | None]]:
    """A train step of the projectors on rows of one question each, and its peak memory (see `variants`)."""
    at, kind = open_device(device), getattr(torch, dtype)
    parts = {"llava": llava_parts, "qwen_vl": qwen_parts}[family](config, folder, at, kind)
    decoder, head, trainable, project = parts
    decoder.requires_grad_(False).train()  # checkpointing needs the mode; nothing in it drops out
    head.requires_grad_(False)
    if checkpoint:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(batch[name]).to(at)

    ids, slots, targets = (tensor(name).long() for name in ("token_ids", "target_slots", "target_ids"))
    weights = tensor("target_weights")
    streams = {name: tensor(name)[:, 0].to(kind).float() for name in ("temporal", "spatial")}
    start = int((batch["video_tokens"][0] >= 0).argmax())

    def loss_of() -> torch.Tensor:
        text = decoder.get_input_embeddings()(ids)
        visual = torch.cat([project(name, features) for name, features in streams.items()], 1).to(kind)
        embeds = torch.cat([text[:, :start], visual, text[:, start + visual.shape[1] :]], 1)
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = head(torch.take_along_dim(hidden, slots[:, :, None], 1)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    if compiled == "layers":  # all layers share one compiled block: minutes less than the whole model
        for layer in decoder.layers:
            layer.compile()
    compute = torch.compile(loss_of) if compiled == "model" else loss_of

    leaves = [leaf for leaves in trainable.values() for leaf in leaves]
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0)
    warmup = -(-3 * num_steps // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)

    def step() -> float:
        loss = compute()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        wait(at)
        return loss.item()

    return step, peak_memory(at)


def open_device(device: str) -> torch.device:
    """The device, with fp32 products as JAX makes them on a GPU by default (TF32)."""
    if device == "cpu":
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", 0)


def wait(at: torch.device) -> None:
    """Until the device has nothing left to do."""
    if at.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(at: torch.device) -> Callable[[], int | None]:
    """The most memory that is allocated from the first question on."""
    if at.type != "cuda":
        return lambda: None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated


def random_model(kind: type, config: Any, at: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model of transformers with random weights, made where and as it is used."""
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with at:
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def llava_config(config: Any) -> LlavaConfig:
    """transformers' config of a LLaVA of this project."""
    text = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
        )
    }
    return LlavaConfig(
        text_config={"model_type": "llama", **text}, vision_config={"model_type": "clip_vision_model", **clip(config)}
    )


def clip(config: Any) -> dict[str, Any]:
    """The numbers of a LLaVA's vision tower."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    numbers = {name: getattr(config, f"vision_{name}") for name in names}
    return {**numbers, "image_size": config.image_size, "patch_size": config.patch_size}


def llava_parts(config: Any, folder: Path | None, at: torch.device, dtype: torch.dtype) -> Parts:
    """transformers' LLaVA without its vision tower, and a copy of its projector for the temporal stream."""
    if folder:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(at)
    else:
        model = random_model(LlavaForConditionalGeneration, llava_config(config), at, dtype)
    model.model.vision_tower = torch.nn.Identity()
    spatial = model.model.multi_modal_projector.float().requires_grad_(True)
    projectors = {"temporal": copy.deepcopy(spatial), "spatial": spatial}
    trainable = {name: list(module.parameters()) for name, module in projectors.items()}
    return Parts(model.model.language_model, model.lm_head, trainable, lambda name, x: projectors[name](x))


def qwen_parts(config: Any, folder: Path | None, at: torch.device, dtype: torch.dtype) -> Parts:
    """transformers' Qwen2, which Qwen's language model equals in training, behind two resamplers.

    The published Qwen-VL code does not run under transformers 5.
    """
    numbers = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            "max_position_embeddings",
        )
    }
    rope = {"rope_type": "default", "rope_theta": config.rotary_emb_base}
    heads = config.num_attention_heads
    model = random_model(
        Qwen2ForCausalLM,
        Qwen2Config(**numbers, num_key_value_heads=heads, rms_norm_eps=config.layer_norm_epsilon, rope_parameters=rope),
        at,
        dtype,
    )
    prefix = "transformer.visual."
    if folder:
        published = read(folder)
        model.load_state_dict(qwen2_names(published))
        starts = tuple(prefix + part for part in ("attn_pool.", "ln_post.", "proj"))
        original = {n.removeprefix(prefix): t.to(at) for n, t in published.items() if n.startswith(starts)}
    else:
        original = random_resampler(config, at)
    fixed = original.pop("attn_pool.pos_embed")

    def copied() -> dict[str, torch.Tensor]:
        return {name: leaf.clone().requires_grad_(True) for name, leaf in original.items()}

    projectors = {"temporal": copied(), "spatial": copied()}
    side = config.image_size // config.patch_size

    def project(name: str, features: torch.Tensor) -> torch.Tensor:
        positions = sequence(fixed, features.shape[1], "grid") if name == "temporal" else grid(fixed, side, side)
        weights = projectors[name] | {"attn_pool.pos_embed": fixed}
        return resample(weights, features, positions, config.resampler_num_attention_heads)["visual_out"]

    trainable = {name: list(weights.values()) for name, weights in projectors.items()}
    return Parts(model.model, model.lm_head, trainable, project)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a published folder in fp32."""
    from safetensors.torch import load_file

    return {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def qwen2_names(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen's language model under the names of Qwen2, which has a matrix each for query, key and value."""
    whole = {"attn.c_proj": "self_attn.o_proj", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj"}
    whole |= {"mlp.c_proj": "mlp.down_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"}
    out = {"lm_head.weight": published["lm_head.weight"]} | {new: published[old] for old, new in names.items()}
    for name, tensor in published.items():
        if not name.startswith("transformer.h."):
            continue
        layer, module, leaf = (
            name.removeprefix("transformer.h.").split(".", 1)[0],
            *name.split(".", 3)[3].rsplit(".", 1),
        )
        if module == "attn.c_attn":
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                out[f"model.layers.{layer}.self_attn.{part}_proj.{leaf}"] = piece
        else:
            out[f"model.layers.{layer}.{whole[module]}.{leaf}"] = tensor
    return out


def random_resampler(config: Any, at: torch.device) -> dict[str, torch.Tensor]:
    """A resampler of random fp32 weights under the published names."""
    k, d, n = config.hidden_size, config.vision_hidden_size, config.n_queries
    pool = {"query": (n, k), "pos_embed": (n, k), "kv_proj.weight": (k, d)}
    pool |= {"attn.in_proj_weight": (3 * k, k), "attn.in_proj_bias": (3 * k,)}
    pool |= {"attn.out_proj.weight": (k, k), "attn.out_proj.bias": (k,)}
    weights = {f"attn_pool.{name}": 0.02 * torch.randn(shape, device=at) for name, shape in pool.items()}
    for norm in ("attn_pool.ln_q", "attn_pool.ln_kv", "ln_post"):
        weights |= {f"{norm}.weight": torch.ones(k, device=at), f"{norm}.bias": torch.zeros(k, device=at)}
    return weights | {"proj": 0.02 * torch.randn(k, k, device=at)}
