"""The tokenizers of the demo's tiny bases, in LLaMA's and in Qwen's own format, made from the generated text.

Both are byte-pair encodings that write every word of the templates as one token (English words with the space before
them, Chinese words alone) and any other text byte by byte.
"""

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from redvillm_jax.demo.moving_shapes import TEMPLATES, WORDS
from redvillm_jax.demo.shape_stories import NOTHING

# Chinese is written without spaces: these are the words of its templates.
CHINESE = (
    "是 什么 颜色 形状 的 水平 垂直 位置 在 哪里 一共 有 几个 图形 往 哪个 方向 移动 哪种 最先 最后 出现 物体 ？"
).split()


def english_words() -> tuple[set[str], set[str]]:
    """Words that begin a text or a line, and words that follow a space."""
    questions = [template.replace("{thing}", "object").rstrip("?").split() for template in TEMPLATES["en"].values()]
    values = {word for words in WORDS["en"].values() for word in words} | {NOTHING["en"]}
    return {words[0] for words in questions} | values, {word for words in questions for word in words[1:]} | values


def chinese_words() -> set[str]:
    """Template words and answers."""
    return {word for words in WORDS["zh"].values() for word in words} | {NOTHING["zh"], *CHINESE}


def merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, that turn each word from single characters into one symbol."""
    spelled = [list(word) for word in sorted(words)]
    learnt = []
    while counts := Counter(pair for symbols in spelled for pair in pairwise(symbols)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learnt.append(best)
        spelled = [merge(symbols, best) for symbols in spelled]
    return learnt


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins each occurrence of `pair`, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def write_llama_tokenizer(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json as LLaVA-1.5's are; returns the number of ids.

    As in LLaMA "▁" stands for a space, one is put before each text, and unknown characters fall back to bytes.
    """
    first, following = english_words()
    words = first | {f"▁{word}" for word in following} | {"▁USER:", "▁ASSISTANT:", "▁\n"} | chinese_words()
    learnt = merges(words)
    specials = ["<unk>", "<s>", "</s>"]
    pieces = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted({character for word in words | {"?"} for character in word}) + ["".join(pair) for pair in learnt]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    added = [*specials, "<image>"]
    ids = {**vocab, "<image>": len(vocab)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first_text, second_text = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **special} for token in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first_text],
            "pair": [bos, first_text, {"SpecialToken": {"id": "<s>", "type_id": 1}}, second_text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in learnt],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", "utf-8")
    return len(ids)


def write_qwen_tokenizer(folder: Path) -> int:
    """Writes qwen.tiktoken, lines of "base64 rank", and returns the number of ranks; specials follow them.

    The first 256 ranks are the bytes in GPT-2's order; characters outside ASCII come next, so that they are whole
    before words are built from them.
    """
    first, following = english_words()
    words = first | {f" {word}" for word in following} | chinese_words()
    words |= {"system", "user", "assistant", "Picture", "You", " are", " a", " helpful", " assistant"}
    wide = sorted({character for word in words for character in word if not character.isascii()})
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    pieces = [bytes([byte]) for byte in order]
    pieces += [wide_character.encode()[:length] for wide_character in wide for length in (2, 3)]
    pieces += ["".join(pair).encode() for pair in merges(words)]
    ranks = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items())
    (folder / "qwen.tiktoken").write_text("".join(lines), "ascii")
    config = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(ranks)
