"""Tiny published folders: what a download of each family holds, at the smallest size and with random weights.

A family's writer makes all files but the weights: config.json as the family's config class in transformers writes it,
the tokenizer's files, the chat template and preprocessor_config.json. `SIZES["tiny"]` of the family has the same sizes.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from redvillm_jax.bases.contract import load_family
from redvillm_jax.demo.pretrain import write_text_files
from redvillm_jax.demo.tokenizers import chinese_words, english_words, merges
from redvillm_jax.model.weights import random_parts, tensors_of
from tests import toy_base
from tests.tiny_tokenizers import TEMPLATES, write_template, write_tokenizer

TOY = "tests.toy_base"  # a base from outside; no file of the product names it


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_byte_tokenizer(folder: Path, special: Sequence[str], words: Iterable[str] = (), **config: Any) -> list[int]:
    """Writes a byte-level BPE as GPT-2, Qwen2, Llama 3 and SmolLM2 have it; returns the ids of its special tokens.

    The words of the demo's questions and answers, and `words`, are one token each; the special tokens come last.
    config: fields of tokenizer_config.json, such as bos_token, eos_token and chat_template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    first, following = english_words()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = first | {f" {word}" for word in following} | chinese_words() | set(words)
    learnt = merges({piece for word in whole for piece, _ in level.pre_tokenize_str(word)})
    pieces = sorted(level.alphabet()) + ["".join(pair) for pair in learnt]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, learnt))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", fixed | config)
    return [tokenizer.token_to_id(token) for token in special]


# ---- SmolVLM

IDEFICS3_TEMPLATE = (  # in the form of SmolVLM's own: blanks and line breaks are tokens
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_smolvlm(folder: Path) -> dict[str, Any]:
    """Writes SmolVLM's files but the weights; returns config.json."""
    from transformers import Idefics3Config
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    special = ["<|im_start|>", "<|im_end|>", "<global-img>"]
    special += [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    special += ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    words = {"User", "Assistant", " What", " Which", " Where", " How"}
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    ids = write_byte_tokenizer(folder, special, words, **tokens)
    write_json(folder / "chat_template.json", {"chat_template": IDEFICS3_TEMPLATE})
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(Idefics3ImageProcessorPil(**sizes).to_json_string())
    text = {"vocab_size": 640, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 12}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "model_type": "llama"}
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 32, "patch_size": 8}
    config = Idefics3Config(text_config=text, vision_config=tower, scale_factor=2, image_token_id=ids[-2])
    written = json.loads(config.to_json_string(use_diff=False))
    write_json(folder / "config.json", written)
    return written


def smolvlm_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the names of SmolVLM's files."""
    published = {"vision_tower.": "model.vision_model.", "connector.": "model.connector.modality_projection."}
    published |= {"language_model.model.": "model.text_model.", "language_model.lm_head.": "lm_head."}

    def rename(name: str) -> str:
        prefix = next(prefix for prefix in published if name.startswith(prefix))
        return published[prefix] + name.removeprefix(prefix)

    return {rename(name): array for name, array in tensors.items()}


# ---- LLaVA-OneVision

ONEVISION_TEMPLATE = (  # in the form of its own
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_llava_onevision(folder: Path) -> dict[str, Any]:
    """Writes LLaVA-OneVision's files but the weights; returns config.json."""
    from transformers import LlavaOnevisionConfig
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    words = {"user", "assistant"}
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    ids = write_byte_tokenizer(folder, special, words, **tokens)
    write_json(folder / "chat_template.json", {"chat_template": ONEVISION_TEMPLATE})
    half, side, pinpoints = [0.5] * 3, {"height": 32, "width": 32}, [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = LlavaOnevisionImageProcessorPil(
        size=side, image_mean=half, image_std=half, image_grid_pinpoints=pinpoints
    )
    (folder / "preprocessor_config.json").write_text(processor.to_json_string())
    text = {
        "vocab_size": 640,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "model_type": "qwen2",
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    text |= {"rope_theta": 1e6, "tie_word_embeddings": True, "max_window_layers": 2}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"image_size": 32, "patch_size": 7, "vision_use_head": False, "model_type": "siglip_vision_model"}
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=tower,
        image_grid_pinpoints=pinpoints,
        image_token_index=ids[-2],
        video_token_index=ids[-1],
    )
    written = json.loads(config.to_json_string(use_diff=False))
    write_json(folder / "config.json", written)
    return written


def llava_onevision_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the names of LLaVA-OneVision's files."""
    return {name.replace("language_model.image_newline", "image_newline"): array for name, array in tensors.items()}


# ---- Gemma 3


def write_gemma3(folder: Path) -> dict[str, Any]:
    """Writes all files of a tiny Gemma 3 but the weights; returns its config.json."""
    from transformers import Gemma3Config, SiglipVisionConfig

    first, following = english_words()
    size = write_tokenizer("gemma", folder, 800, first | {f" {word}" for word in following} | chinese_words())
    write_template(TEMPLATES["gemma"], folder)
    text = {
        "vocab_size": 768,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert size <= text["vocab_size"], size
    vision = SiglipVisionConfig(
        image_size=32,
        patch_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vision_use_head=False,
    )
    token = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["<image_soft_token>"]
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_index=token)
    (folder / "config.json").write_text(config.to_json_string())
    half, side = [0.5] * 3, {"height": 32, "width": 32}
    kind = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "image_seq_length": 16,
    }
    pixels = {"image_mean": half, "image_std": half, "resample": 2, "rescale_factor": 1 / 255, "size": side}
    switches = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pan_and_scan": None}
    write_json(folder / "preprocessor_config.json", kind | pixels | switches)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 5], "do_sample": True})
    return json.loads((folder / "config.json").read_text())


# ---- all families

WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {  # family -> writes all but the weights; returns config.json
    "llava": functools.partial(write_text_files, "llava"),
    "qwen_vl": functools.partial(write_text_files, "qwen_vl"),
    "llava_onevision": write_llava_onevision,
    "smolvlm": write_smolvlm,
    "gemma3": write_gemma3,
    TOY: toy_base.write_text_files,
}
PUBLISHED_NAMES = {  # of families whose canonical names are no published ones
    "llava_onevision": llava_onevision_names,
    "smolvlm": smolvlm_names,
    TOY: toy_base.published_names,
}


def write_published(family: str, folder: Path) -> None:
    """Writes the tiny published folder of a family."""
    folder.mkdir(parents=True)
    base = load_family(family)
    config = base.Config.from_published(WRITERS[family](folder))
    tensors = tensors_of(base, config, random_parts(base, config))
    tensors = PUBLISHED_NAMES.get(family, dict)(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
