"""Tiny tokenizers of the kinds that image LLMs have, and chat templates in the form of the published ones."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "USER: What happens in this video? ASSISTANT: A dog runs over the grass, then it stops.",
    "user model assistant system Assistant: User: [INST] What is the colour of the ball? It is red. [/INST]",
    "Which shape appears first? The 12 circles move to the left.\n\nHow many are there? There are 3 of them.\n",
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PARTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'KIND') %}{{ WRITE }}{% endfor %}"


def images(separator: str) -> str:
    return PARTS.replace("KIND", "image").replace("WRITE", f"'<image>{separator}'")


def texts(expression: str) -> str:
    return PARTS.replace("KIND", "text").replace("WRITE", expression)


TEMPLATES = {
    "mistral": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + images("\\n")
    + texts("part['text']")
    + "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    + "{% else %}{{ raise_exception('user and assistant only') }}{% endif %}{% endfor %}",
    "vicuna": "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    + images("\\n")
    + "{% if message['role'] != 'assistant' %}"
    + texts("part['text'] + ' '")
    + "{% else %}{% generation %}"
    + texts("part['text'] + ' '")
    + "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + images("\\n")
    + texts("part['text'] | trim")
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3_strings": "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + images("\\n")
    + texts("part['text']")
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "onevision": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + images("")
    + texts("'\n' + part['text']")
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "smolvlm": "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}

SPECIAL = {  # kind of tokenizer -> its special tokens
    "llama": ["<unk>", "<s>", "</s>", "<image>"],
    "mistral": ["<unk>", "<s>", "</s>", "<image>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
    "smollm2": "<|endoftext|> <|im_start|> <|im_end|> <fake_token_around_image> <image> <end_of_utterance> <global-img>"
    " <row_1_col_1>".split(),
    "gemma": "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>"
    "".split(),
}
CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    "mistral": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "unk_token": "<|endoftext|>"},
    "gemma": {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    },
}
CONFIG["llama"] |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIG["mistral"] |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_tokenizer(kind: str, folder: Path, size: int = 400, words: Iterable[str] = ()) -> int:
    """Writes tokenizer.json and tokenizer_config.json of a tiny tokenizer; returns the number of its ids.

    words: more words that Gemma's, LLaMA's and Mistral's tokenizers learn, as one token each if `size` has room.
    """
    special = SPECIAL[kind]
    if kind in ("llama", "mistral", "gemma"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        blank = normalizers.Replace(" ", "▁")
        if kind == "llama":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
        elif kind == "gemma":
            tokenizer.normalizer = blank
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        tokenizer.decoder = decoders.Sequence(pieces)
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *alphabet], show_progress=False)
        learnt = [word for line in TEXT for word in line.split(" ")]  # no piece goes over a blank
        tokenizer.train_from_iterator([f" {word}" for word in learnt] + learnt + sorted(words), trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
        first = pre_tokenizers.Digits(individual_digits=True)
        if kind != "smollm2":
            first = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXT, trainer)
    if kind in ("llama", "mistral", "llama3"):
        bos = CONFIG[kind]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    content = json.loads(tokenizer.to_str())
    if kind in ("llama", "mistral", "gemma"):  # bytes are pieces of the vocabulary, not tokens of their own
        content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]
    if kind == "gemma":
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2, 3)])
        content = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | CONFIG[kind]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_str(json.dumps(content)).get_vocab_size()


def write_template(template: str, folder: Path, place: str = "chat_template.jinja") -> None:
    """Writes a chat template where published folders have it: one of modules.chat_template.FILES."""
    file = folder / place
    if file.suffix == ".jinja":
        file.write_text(template, "utf-8")
        return
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | {"chat_template": template}))
