"""The demo's own image LLMs: their tokenizers, their published form, what they can do, and how they are made."""

import json
import re
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from conversion import from_torch
from redvillm_jax.bases.contract import load_family
from redvillm_jax.demo import pretrain
from redvillm_jax.demo.moving_shapes import LANGUAGES, SPATIAL, TEMPLATES, WORDS
from redvillm_jax.demo.shape_stories import KINDS, NOTHING
from redvillm_jax.demo.tokenizers import CHINESE
from redvillm_jax.model.base_folder import load_part, open_base
from redvillm_jax.model.weights import PARTS, tensors_of
from redvillm_jax.runtime.sharding import make_mesh, weight_sharding

POSITIONS = "transformer.visual.attn_pool.pos_embed"
FOLDERS = Path(pretrain.__file__).parent / "bases"


@pytest.fixture(params=sorted(pretrain.PHASES))
def family(request):
    return request.param


@pytest.fixture
def text_folder(family, tmp_path):
    pretrain.write_text_files(family, tmp_path, pretrain.DTYPE[family])
    return tmp_path


def test_shipped_text_files_are_the_generated_ones(family, text_folder):
    written = sorted(path.name for path in text_folder.iterdir())
    assert sorted(path.name for path in (FOLDERS / family).iterdir()) == sorted([*written, "model.safetensors"])
    for name in written:
        assert (text_folder / name).read_bytes() == (FOLDERS / family / name).read_bytes()
    assert sum(path.stat().st_size for path in (FOLDERS / family).iterdir()) < 5e6


def test_every_word_is_one_token(family, text_folder):
    tokenizer = load_family(family).Tokenizer(text_folder)
    space = int(family == "llava")  # LLaMA puts a space before each text, which Chinese words do not carry
    for words in WORDS["zh"].values():
        for word in (*words, *CHINESE, NOTHING["zh"]):
            assert len(tokenizer.encode(word)) == space + 1, word
    for words in WORDS["en"].values():
        for word in (*words, NOTHING["en"]):
            assert len(tokenizer.encode(f"{word} {word}")) == 2, word
    for language in LANGUAGES:
        thing = {"en": "red object", "zh": "红色物体"}[language]
        for template in TEMPLATES[language].values():
            text = template.format(thing=thing)
            count = len(text.split()) + 1 if language == "en" else count_chinese_words(text)
            assert len(tokenizer.encode(f"\n{text}")) == 1 + count, text


def count_chinese_words(text):
    """Longest words first: a count without the tokenizer."""
    known = sorted([*(word for words in WORDS["zh"].values() for word in words), *CHINESE], key=len, reverse=True)
    count = 0
    while text:
        text = text[len(next(word for word in known if text.startswith(word))) :]
        count += 1
    return count


def test_any_text_round_trips(family, text_folder):
    tokenizer = load_family(family).Tokenizer(text_folder)
    for text in ("What colour is the circle?", "圆形是什么颜色？", "Ünïcode 🎈 漢字\n</s> <|im_end|> x", "two  spaces"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(tokenizer.stop_ids) & set(ids)


def test_published_form(family):
    """transformers reads the LLaVA; the Qwen-VL has the published names, as its base module spells them."""
    folder = FOLDERS / family
    if family == "llava":
        transformers = pytest.importorskip("transformers")
        model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index
        assert tokenizer("left")["input_ids"] == [1, *tokenizer.encode("left", add_special_tokens=False)]
    else:
        with safe_open(folder / "model.safetensors", "numpy") as tensors:
            assert all(name.startswith(("transformer.", "lm_head.")) for name in tensors.keys())
            assert tensors.get_tensor("transformer.visual.attn_pool.query").shape == (16, 96)
        start = json.loads((folder / "config.json").read_text())["visual"]["image_start_id"]
        assert load_family(family).Tokenizer(folder).special("<img>") == start


def test_answers_questions_about_documents(family, tmp_path):
    """Through from_torch: single pictures and stories above 90 %, over all kinds of questions."""
    from_torch.main([f"--family={family}", f"--source={FOLDERS / family}", f"--out={tmp_path / 'base'}"])
    opened = open_base(tmp_path / "base")
    base, mesh = opened.module, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    place = weight_sharding(mesh, base.SHARDING)
    parts = {part: load_part(opened, part, dtype=jnp.float32, sharding=place) for part in PARTS}
    rows = pretrain.RowWriter(base, opened.config, base.Tokenizer(opened.path), pretrain.ROW_LENGTH[family])
    result = pretrain.accuracy(parts, base, rows, np.random.default_rng(1), 3)
    for kind in KINDS:
        values = [value for (of, _), value in result.items() if of == kind]
        assert np.mean(values) > 0.9, (kind, result)
    assert {question for of, question in result if of == "picture"} == set(SPATIAL)


def untrained(family, folder):
    base = load_family(family)
    config = base.Config.from_published(json.loads((folder / "config.json").read_text()))
    rows = pretrain.RowWriter(base, config, base.Tokenizer(folder), pretrain.ROW_LENGTH[family])
    return base, config, rows, pretrain.new_parts(base, config, seed=0)


def test_batches_are_a_function_of_seed_and_phase(family, text_folder):
    _, _, rows, _ = untrained(family, text_folder)
    first, again, other, next_seed = (
        next(rows.batches(seed, phase, (1, 1, 1, 1))) for seed, phase in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    )
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["pictures"], other["pictures"])
    assert not np.array_equal(first["pictures"], next_seed["pictures"])
    tokens = rows.config.num_patches
    visual = [row[row >= 0].tolist() for row in first["video_tokens"]]
    starts = np.cumsum([0, 1, 2, 0, 1]) * tokens  # pictures of a picture, a pair, a story, a story and a picture
    assert visual == [list(range(a, b)) for a, b in pairwise(starts)]
    assert first["pictures"].shape == (4, 32, 32, 3) and first["cells"].shape == (4, tokens, 4)


def test_fixed_positions_do_not_train(tmp_path):
    pretrain.write_text_files("qwen_vl", tmp_path)
    base, config, rows, parts = untrained("qwen_vl", tmp_path)
    before = tensors_of(base, config, parts)
    parts = pretrain.train_language(parts, base, rows, 0, [pretrain.Phase("align", 2, (), 1.0)])
    after = tensors_of(base, config, parts)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {n for n in before if re.search(r"attn_pool|ln_post|proj$", n)} - {POSITIONS}


@pytest.mark.slow
def test_making_is_deterministic(family, text_folder):
    """A few steps of both stages, twice: the same bits."""
    phases = (pretrain.Phase("a", 2, (), 1.0), pretrain.Phase("b", 2, (1, 1, 1, 1), 0.3))

    def make():
        base, config, rows, parts = untrained(family, text_folder)
        parts["encoder"] = pretrain.train_encoder(parts["encoder"], base, config, 0, 2)
        parts = pretrain.train_language(parts, base, rows, 0, phases)
        return tensors_of(base, config, parts)

    first, second = make(), make()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
