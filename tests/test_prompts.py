"""What stands around the visual tokens, token by token: of pictures and of videos, in every template."""

import re

import pytest

from redvillm_jax.bases import llava, qwen_vl
from redvillm_jax.bases.contract import known_families, load_family

QUESTION, ANSWER = "Which colour appears first?", "red"
BASES = {family: load_family(family) for family in known_families()}
TEMPLATES = [
    ("llava", llava.SIZES["v1-7b"]),
    ("llava", llava.SIZES["v1.5-7b"]),
    ("qwen_vl", qwen_vl.SIZES["7b"]),
    *((family, base.SIZES["tiny"]) for family, base in BASES.items()),  # LLaVA's without a system prompt
]


@pytest.fixture(scope="module")
def tokenizers(downloads):
    """The tiny folders' own, LLaVA's with v1's markers added."""
    made = {family: base.Tokenizer(downloads[family]) for family, base in BASES.items()}
    made["llava"].tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    return made


@pytest.mark.parametrize("labels", ["answer", "finetune"])
@pytest.mark.parametrize("answer", [None, ANSWER])
@pytest.mark.parametrize(("family", "config"), TEMPLATES, ids=lambda value: getattr(value, "image_size", value))
def test_pictures_and_videos_differ_in_their_visual_tokens_alone(family, config, answer, labels, tokenizers):
    """Qwen-VL's number of a picture is the one exception (docs/method.md). SmolVLM's places bring text around one."""
    base, tokenizer = BASES[family], tokenizers[family]
    picture, video = (
        base.prompt(tokenizer, config, QUESTION, answer, labels, picture=picture) for picture in (True, False)
    )
    if family == "smolvlm":
        placed = base.picture_places(tokenizer, config, 1, None, None).placed
        start, end = ([(token, False) for token, _ in part] for part in (placed[:-2], placed[-1:]))
        picture = picture[0] + start, end + picture[1]
    if family == "qwen_vl":
        number = [(token, False) for token in tokenizer.encode("Picture 1: ")]
        before = picture[0]
        assert before[-1] == video[0][-1] == (tokenizer.special("<img>"), False)
        assert before[-1 - len(number) : -1] == number
        picture = before[: -1 - len(number)] + before[-1:], picture[1]
    assert picture == video


@pytest.mark.parametrize("size", ["v1.5-7b", "tiny"])
@pytest.mark.parametrize("picture", [True, False])
def test_llava_15_is_tokenised_as_its_own_chat_format(size, picture, tokenizers):
    """transformers on the whole text: the blank before <image> is a token."""
    config, tokenizer = llava.SIZES[size], tokenizers["llava"]
    before, after = llava.prompt(tokenizer, config, QUESTION, None, picture=picture)
    system = f"{config.system_prompt} " if config.system_prompt else ""
    want = tokenizer.tokenizer(f"{system}USER: <image>\n{QUESTION} ASSISTANT:").input_ids
    assert [i for i, _ in (*before, (tokenizer.special("<image>"), False), *after)] == want
    assert tokenizer.tokenizer.convert_ids_to_tokens(before[-1][0]) == "▁"


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("question", [QUESTION, f" \n{QUESTION}"])
def test_llava_v1_is_tokenised_as_it_was_trained(question, picture, tokenizers):
    """By the slow tokenizer of transformers 4.28: white space beside an added token is dropped, each piece is a text.

    For `USER: <im_start><im_patch><im_end>\\nWhat is this? ASSISTANT:` transformers 4.28.1 gives
    … R : <im_start> <im_patch> <im_end> ▁W hat ▁is ▁th is ? … with a small vocabulary of its own.
    """
    config, tokenizer = llava.SIZES["v1-7b"], tokenizers["llava"]
    text = f"{config.system_prompt} USER: <im_start><im_patch><im_end>\n{question} ASSISTANT:"
    want = [tokenizer.bos_id]
    for piece in filter(None, re.split("(<im_[a-z]+>)", text)):
        want += [tokenizer.special(piece)] if piece.startswith("<im_") else tokenizer.encode(piece.strip())
    before, after = llava.prompt(tokenizer, config, question, None, picture=picture)
    assert [i for i, _ in (*before, (tokenizer.special("<im_patch>"), False), *after)] == want


def test_qwen_vl_is_tokenised_as_its_own_chat_format(tokenizers):
    """Every segment on its own, as the published code does; see also the ids in test_qwen_tokenizer.py."""
    tokenizer = tokenizers["qwen_vl"]
    for picture, number in ((True, "Picture 1: "), (False, "")):
        parts = qwen_vl.prompt(tokenizer, qwen_vl.SIZES["7b"], QUESTION, ANSWER, picture=picture)
        before, after = (tokenizer.decode([i for i, _ in part], keep_special=True) for part in parts)
        assert before == f"<|im_start|>system\n{qwen_vl.SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{number}<img>"
        assert after == f"</img>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>"
