"""Odd checkpoints: each is computed as transformers computes it, or refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from conversion import compare
from conversion.from_torch import from_torch
from data_pipeline.common.errors import UserError
from tests.tiny_tokenizers import TEMPLATES, write_template, write_tokenizer

Settings = dict[str, Any]
TEXT: Settings = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
}
CLIP: Settings = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "layer_norm_eps": 1e-3,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "vision_use_head": False}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6, "sliding_window_pattern": 2}
TILES = {"image_grid_pinpoints": [[24, 48], [48, 24]], "image_token_index": 511}
MODELS: dict[str, tuple] = {  # kind -> transformers' class, its config's class, settings, of the text, of the encoder
    "llava": (LlavaForConditionalGeneration, LlavaConfig, {"image_token_index": 511}, {"model_type": "llama"}, CLIP),
    "next": (LlavaNextForConditionalGeneration, LlavaNextConfig, TILES, MISTRAL, CLIP),
    "onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, TILES, QWEN2, SIGLIP),
    "smolvlm": (
        Idefics3ForConditionalGeneration,
        Idefics3Config,
        {"image_token_id": 511, "scale_factor": 2},
        {"model_type": "llama", "pad_token_id": 2},
        {k: v for k, v in SIGLIP.items() if k != "vision_use_head"}
        | {"model_type": "idefics3_vision", "image_size": 32},
    ),
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config,
        {"mm_tokens_per_image": 4, "image_token_index": 511},
        {"model_type": "gemma3_text"} | GEMMA,
        SIGLIP | {"image_size": 32},
    ),
}
TOKENIZERS = {
    "llava": ("llama", "vicuna"),
    "next": ("mistral", "mistral"),
    "onevision": ("qwen2", "onevision"),
    "gemma3": ("gemma", "gemma"),
}


def write(folder: Path, kind: str, own: Settings, text: Settings, vision: Settings, **save: Any) -> Path:
    """Writes a random model of transformers with a tokenizer and a chat template where its kind has one here."""
    model_class, config_class, settings, of_text, of_vision = MODELS[kind]
    config = config_class(text_config=TEXT | of_text | text, vision_config=of_vision | vision, **settings | own)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    if kind in TOKENIZERS:
        tokenizer, template = TOKENIZERS[kind]
        write_tokenizer(tokenizer, folder)
        write_template(TEMPLATES[template], folder)
    return folder


# ---- what is done to a folder afterwards


def config_edit(**fields: Any) -> Callable[[Path], None]:
    """Sets fields of config.json by their dotted names, with two underscores for a dot."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for name, value in fields.items():
            *path, last = name.split("__")
            inner = config
            for key in path:
                inner = inner[key]
            inner[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def as_bin(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit_tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return edit


def head_beside_the_embedding(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    head = "lm_head.weight" if embedding.startswith("model.text") else "language_model.lm_head.weight"
    return tensors | {head: tensors[embedding].copy()}


def head_unlike_the_embedding(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = head_beside_the_embedding(tensors)
    (head,) = (name for name in tensors if "lm_head" in name)
    return tensors | {head: tensors[head] + 1}


def with_nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name = next(name for name in tensors if "o_proj" in name)
    tensors[name][0, 0] = np.nan
    return tensors


def v4_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.replace("vision_tower.", "vision_tower.vision_model.").replace(
            "vision_model.vision_model", "vision_model"
        ): a
        for name, a in tensors.items()
    }


def v5_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As transformers 5's classes have them in memory."""

    def rename(name: str) -> str:
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.")

    return {rename(name): array for name, array in tensors.items()}


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def nothing(folder: Path) -> None:
    """The folder stays as it is written."""


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}

RIGHT = {  # name -> (kind, settings, of the text, of the encoder, options of save_pretrained, what is done afterwards)
    "bf16 on disk": ("llava", {}, {}, {}, {"dtype": torch.bfloat16}, nothing),
    "fp16, in shards": ("next", {}, {}, {}, {"dtype": torch.float16, "max_shard_size": "50KB"}, nothing),
    ".bin": ("llava", {}, {}, {}, {}, as_bin),
    "names of transformers 4": ("next", {}, {}, {}, {}, edit_tensors(v4_names)),
    "names of transformers 5": ("onevision", {}, {}, {}, {}, edit_tensors(v5_names)),
    "tied head": ("onevision", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}, {}, {}, nothing),
    "a copy of the tied head": (
        "onevision",
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
        {},
        {},
        edit_tensors(head_beside_the_embedding),
    ),
    "separate head": ("smolvlm", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}, {}, {}, nothing),
    "odd head_dim": ("llava", {}, {"head_dim": 20}, {}, {}, nothing),
    "llama3 rope": ("llava", {}, {"rope_parameters": LLAMA3}, {}, {}, nothing),
    "linear rope": ("llava", {}, {"rope_parameters": LINEAR}, {}, {}, nothing),
    "last vision layer": ("llava", {"vision_feature_layer": -1}, {}, {}, {}, nothing),
    "first vision layer": ("next", {"vision_feature_layer": 1}, {}, {}, {}, nothing),
    "grid 12 x 12": ("gemma3", {"mm_tokens_per_image": 16}, {}, {"image_size": 48, "patch_size": 4}, {}, nothing),
    "grid 9 x 9, scale 3": ("smolvlm", {"scale_factor": 3}, {}, {"image_size": 36, "patch_size": 4}, {}, nothing),
    "wide pinpoints": ("next", {"image_grid_pinpoints": [[24, 72], [72, 24], [48, 96]]}, {}, {}, {}, nothing),
    "no generation_config": ("gemma3", {}, {}, {}, {}, without("generation_config.json")),
    "window of Mistral": ("next", {}, {"sliding_window": 8}, {}, {}, nothing),
    "scalar of Gemma's queries": ("gemma3", {}, {"query_pre_attn_scalar": 7}, {}, {}, nothing),
    "one key head": ("smolvlm", {}, {"num_key_value_heads": 1}, {}, {}, nothing),
}

BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED = {  # name -> (kind, settings, of the text, of the encoder, options of save_pretrained, the edit, the message)
    "no chat template": (
        "gemma3",
        {},
        {},
        {},
        {},
        without("chat_template.jinja"),
        "no chat template in processor_config",
    ),
    "no template for Mistral": (
        "next",
        {},
        {},
        {},
        {},
        without("chat_template.jinja"),
        "supported: LLaMA, or a chat templ",
    ),
    "a template without a picture": (
        "next",
        {},
        {},
        {},
        {},
        lambda folder: write_template(TEMPLATES["mistral"].replace("<image>", ""), folder),
        "writes no place for a picture",
    ),
    "no tokenizer": ("llava", {}, {}, {}, {}, without("tokenizer.json"), "no tokenizer that can be read"),
    "a larger tokenizer": (
        "llava",
        {},
        {},
        {},
        {},
        lambda folder: write_tokenizer("llama", folder, 600),
        "tokens, vocab_size in config.json is 512",
    ),
    "another vocabulary": ("llava", {}, {}, {}, {}, config_edit(text_config__vocab_size=500), "should be (500, 48)"),
    "yarn rope": ("llava", {}, {"rope_parameters": YARN}, {}, {}, nothing, "yarn"),
    "two vision layers": ("llava", {"vision_feature_layer": [-2, -1]}, {}, {}, {}, nothing, "vision_feature_layer"),
    "class token": ("next", {"vision_feature_select_strategy": "full"}, {}, {}, {}, nothing, "feature_select_strategy"),
    "other projector": ("llava", {"projector_hidden_act": "relu"}, {}, {}, {}, nothing, "projector_hidden_act"),
    "other activation": ("next", {}, {"hidden_act": "gelu"}, {}, {}, nothing, "hidden_act"),
    "other activation of the encoder": ("onevision", {}, {}, {"hidden_act": "gelu"}, {}, nothing, "hidden_act"),
    "capped logits": ("gemma3", {}, {"attn_logit_softcapping": 50.0}, {}, {}, nothing, "attn_logit_softcapping"),
    "unknown field": ("smolvlm", {}, {}, {}, {}, config_edit(text_config__a_new_field=1), "a_new_field"),
    "4-bit weights": ("llava", {}, {}, {}, {}, config_edit(quantization_config=BITS), "quantization_config"),
    "NaN": ("onevision", {}, {}, {}, {}, edit_tensors(with_nan), "that are NaN or infinite"),
    "truncated": ("llava", {}, {}, {}, {}, truncate, "model.safetensors: "),
    "a lost shard": ("next", {}, {}, {}, {"max_shard_size": "50KB"}, without_a_shard, "model-00002-of-"),
    "a head unlike the tied one": (
        "onevision",
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
        {},
        {},
        edit_tensors(head_unlike_the_embedding),
        "which its config.json ties to it",
    ),
    "SmolVLM 2": ("smolvlm", {}, {}, {}, {}, config_edit(model_type="smolvlm"), "trained on video already (SmolVLM 2)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_checkpoint_is_refused_in_one_line(name, tmp_path):
    kind, own, text, vision, save, edit, message = REFUSED[name]
    source = write(tmp_path / "source", kind, own, text, vision, **save)
    edit(source)
    with pytest.raises(UserError) as caught:
        from_torch(None, source, tmp_path / "base", tokenizer=kind in TOKENIZERS)
    said = str(caught.value)
    assert message in said and str(source) in said and "\n" not in said
    assert not (tmp_path / "base").exists()


def test_delta_weights_are_refused(tmp_path):
    source = write(tmp_path / "LLaVA-7b-delta-v1", "llava", {}, {}, {})
    with pytest.raises(UserError, match="delta weights"):
        from_torch(None, source, tmp_path / "base")


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_checkpoint_is_computed_right(name, tmp_path, capsys):
    kind, own, text, vision, save, edit = RIGHT[name]
    source = write(tmp_path / "source", kind, own, text, vision, **save)
    edit(source)
    over = compare.compare(source, None, tokenizer=kind in TOKENIZERS, num_frames=1)
    table = capsys.readouterr().out
    assert over == 0, table
    assert ("tiles_logits" in table) == (kind in ("next", "onevision"))
