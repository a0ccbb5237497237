"""Tiny published folders: what a download of each family holds, at the smallest size and with random weights.

A family's writer makes all files but the weights: config.json as the family's config class in transformers writes it,
the tokenizer's files, the chat template and preprocessor_config.json. `SIZES["tiny"]` of the family has the same sizes.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from redvillm_jax.bases.contract import load_family
from redvillm_jax.demo.pretrain import write_text_files
from redvillm_jax.demo.tokenizers import chinese_words, english_words, merges
from redvillm_jax.model.weights import random_parts, tensors_of
from tests import toy_base

TOY = "tests.toy_base"  # a base from outside; no file of the product names it

WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {  # family -> writes all but the weights; returns config.json
    "llava": functools.partial(write_text_files, "llava"),
    "qwen_vl": functools.partial(write_text_files, "qwen_vl"),
    TOY: toy_base.write_text_files,
}
PUBLISHED_NAMES = {TOY: toy_base.published_names}  # families whose canonical names are no published ones


def write_published(family: str, folder: Path) -> None:
    """Writes the tiny published folder of a family."""
    folder.mkdir(parents=True)
    base = load_family(family)
    config = base.Config.from_published(WRITERS[family](folder))
    tensors = tensors_of(base, config, random_parts(base, config))
    tensors = PUBLISHED_NAMES.get(family, dict)(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
