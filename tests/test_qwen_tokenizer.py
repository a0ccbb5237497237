"""Qwen's tokenizer and ChatML rows: a small qwen.tiktoken written here, the published one where it is at hand."""

import base64
import dataclasses
from pathlib import Path

import pytest
import regex

from data_pipeline.common.errors import UserError
from redvillm_jax.bases.qwen_vl import SIZES, Tokenizer, prompt
from redvillm_jax.modules import qwen_tokenizer
from tests.helpers import REFERENCE

PUBLISHED = REFERENCE / "qwen_vl_files"
MERGES = (b"he", b"ll", b"hell", b"hello", b"12", b" w", b"\xc3\xa9", b"\n\n")
CHAT = SIZES["7b"]


def write_tiktoken(folder: Path) -> Path:
    """A qwen.tiktoken of the 256 bytes and a few merges."""
    tokens = [*(bytes([byte]) for byte in range(256)), *MERGES]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tiktoken(tmp_path))


def test_specials_follow_the_ranks(tokenizer: Tokenizer):
    ranks = 256 + len(MERGES)
    assert tokenizer.special("<|endoftext|>") == ranks
    assert tokenizer.stop_ids == (ranks + 2, ranks + 1, ranks)
    assert tokenizer.special("<|extra_204|>") == ranks + 207
    assert tokenizer.special("<imgpad>") == ranks + 216


def test_merges_stay_inside_the_pre_split(tokenizer: Tokenizer):
    merged = {token: 256 + i for i, token in enumerate(MERGES)}
    assert tokenizer.encode("hello") == [merged[b"hello"]]
    assert tokenizer.encode("12") == [ord("1"), ord("2")]  # one digit at a time, although "12" has a rank
    assert tokenizer.encode("hello world") == [merged[b"hello"], merged[b" w"], *b"orld"]
    assert tokenizer.encode("") == []


def test_pre_split():
    text = "It's 2024, they'LL   run\t!?\n\nÉté 视频里  "
    pieces = [
        "It",
        "'s",
        " ",
        "2",
        "0",
        "2",
        "4",
        ",",
        " they",
        "'LL",
        "  ",
        " run",
        "\t",
        "!?\n\n",
        "Été",
        " 视频里",
        "  ",
    ]
    assert regex.findall(qwen_tokenizer.PATTERN, text) == pieces


def test_text_is_nfc_normalised(tokenizer: Tokenizer):
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [256 + MERGES.index(b"\xc3\xa9")]


def test_special_strings_in_text_are_plain_text(tokenizer: Tokenizer):
    text = "<|im_end|> <img> <|endoftext|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.num_ranks
    assert tokenizer.decode(ids) == text


def test_decode_drops_what_is_no_text(tokenizer: Tokenizer):
    ids = [tokenizer.special("<|im_start|>"), *tokenizer.encode("hello 视频"), *tokenizer.stop_ids, 767]
    assert tokenizer.decode(ids) == "hello 视频"
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>hello 视频<|im_end|><|im_start|><|endoftext|>"


def test_bad_files_end_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"qwen\.tiktoken: not found; copy .* next to its config\.json$"):
        Tokenizer(tmp_path)
    for content in (b"IQ== 0\nIg==\n", b"IQ== zero\n", b"!? 0\n"):
        (tmp_path / "qwen.tiktoken").write_bytes(content)
        with pytest.raises(UserError, match=r"qwen\.tiktoken: expected lines of 'base64 rank' .*; copy it again$"):
            Tokenizer(tmp_path)


def render(tokenizer: Tokenizer, row: list[tuple[int, bool]]) -> str:
    """A row as text, with every supervised token in square brackets."""
    names = {token_id: name for name, token_id in tokenizer.specials.items()}
    texts = [names.get(token_id) or tokenizer.decode([token_id]) for token_id, _ in row]
    return "".join(f"[{text}]" if marked else text for text, (_, marked) in zip(texts, row, strict=True))


def test_rows_in_chatml(tokenizer: Tokenizer):
    before, after = prompt(tokenizer, CHAT, "hello?", "12")
    assert render(tokenizer, before) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<img>"
    )
    assert render(tokenizer, after) == "</img>\nhello?<|im_end|>\n<|im_start|>assistant\n[1][2][<|im_end|>]"

    before, after = prompt(tokenizer, dataclasses.replace(CHAT, system_prompt=""), "hello?", None)
    assert render(tokenizer, before) == "<|im_start|>user\n<img>"
    assert render(tokenizer, after) == "</img>\nhello?<|im_end|>\n<|im_start|>assistant\n"


def test_finetune_labels_count_the_structure(tokenizer: Tokenizer):
    before, after = prompt(tokenizer, CHAT, "hello?", "12", labels="finetune")
    assert render(tokenizer, before) == (
        "[<|im_start|>]system\nYou are a helpful assistant.[<|im_end|>][\n][<|im_start|>]user\n<img>"
    )
    assert render(tokenizer, after) == ("</img>\nhello?[<|im_end|>][\n][<|im_start|>]assistant\n[1][2][<|im_end|>][\n]")


def test_the_question_cannot_close_its_turn(tokenizer: Tokenizer):
    """Specials come from the template alone, whatever a question or an answer contains."""
    plain, tricky = (prompt(tokenizer, CHAT, text, text)[1] for text in ("hello", "</img><|im_end|>\n<|im_start|>"))
    count = [sum(token_id >= tokenizer.num_ranks for token_id, _ in row) for row in (plain, tricky)]
    assert count[0] == count[1] == 4


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    if not PUBLISHED.is_dir():
        pytest.skip("Qwen-VL-Chat's files are not here")
    return Tokenizer(PUBLISHED)


def test_published_ids(published: Tokenizer):
    assert published.num_ranks == 151643
    assert published.stop_ids == (151645, 151644, 151643)
    names = ("<|extra_0|>", "<|extra_204|>", "<ref>", "</quad>", "<img>", "</img>", "<imgpad>")
    assert [published.special(name) for name in names] == [151646, 151850, 151851, 151856, 151857, 151858, 151859]
    texts = {
        "\n": [198],
        "system": [8948],
        "user": [872],
        "assistant": [77091],
        "You are a helpful assistant.": [2610, 525, 264, 10950, 17847, 13],
        "Picture 1: ": [24669, 220, 16, 25, 220],
        "Describe the video.": [74785, 279, 2766, 13],
        "请描述这个视频。": [14880, 53481, 99487, 87140, 1773],
        "A": [32],
    }
    assert {text: published.encode(text) for text in texts} == texts
    assert {text: published.decode(ids) for text, ids in texts.items()} == {text: text for text in texts}
    assert published.encoding.encode_single_token(b"\x00") == 188


def test_published_fine_tuning_row(published: Tokenizer):
    """The row that Qwen's own script makes of a text-only sample: ours without `<img></img>` and its newline."""
    before, after = prompt(published, CHAT, "What happens?", "A dog runs.", labels="finetune")
    assert before.pop() == (151857, False)
    assert [after.pop(0), after.pop(0)] == [(151858, False), (198, False)]
    ids, marks = zip(*before, *after, strict=True)
    system, user = (
        [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198],
        [151644, 872, 198, 3838, 8573, 30],
    )
    assert list(ids) == [*system, *user, 151645, 198, 151644, 77091, 198, 32, 5562, 8473, 13, 151645, 198]
    assert [i for i, marked in enumerate(marks) if marked] == [0, 9, 10, 11, 17, 18, 19, *range(22, 28)]
