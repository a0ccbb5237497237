"""The visual tokens and the text of pictures that are cut into tiles, against transformers' own code."""

import types

import numpy as np
import pytest
from PIL import Image

from redvillm_jax.inference.prompts import stepped
from redvillm_jax.modules.any_resolution import any_resolution_places
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_splitting import split_picture_places
from tests.tiny_tokenizers import TEMPLATES, write_template, write_tokenizer

torch = pytest.importorskip("torch")

SIDE = 4  # rows and columns of a square's tokens
SIZES = (  # height, width; the last one's 72 tokens of four squares are too few to be reduced
    *((20, 20), (7, 90), (90, 7), (1, 1), (3, 500), (500, 3), (64, 48), (333, 500), (101, 99), (480, 640)),
    (21, 42),
)
PINPOINTS = {
    "next": [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]],
    "onevision": [[14 * i, 14 * j] for i in range(1, 7) for j in range(1, 7)],
}


def model_of(kind: str) -> tuple[type, types.SimpleNamespace, dict]:
    """The class of a family, what its `pack_image_features` reads of the model, and its further arguments."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    vision = types.SimpleNamespace(image_size=14, patch_size=3)  # 4 × 4 patches, a border is left
    config = types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS[kind])
    if kind == "next":
        return LlavaNextModel, types.SimpleNamespace(config=config), {"vision_feature_select_strategy": "default"}
    return LlavaOnevisionModel, types.SimpleNamespace(config=config), {"vision_aspect_ratio": "anyres_max_4"}


@pytest.mark.parametrize("kind", PINPOINTS)
def test_any_resolution_orders_tokens_as_transformers(kind):
    from transformers.image_processing_utils import select_best_resolution

    rng, reduced = np.random.default_rng(0), 0
    model, itself, more = model_of(kind)
    for size in SIZES:
        best = select_best_resolution(size, PINPOINTS[kind])
        grid = best[0] // 14, best[1] // 14
        features = rng.normal(size=(1 + grid[0] * grid[1], SIDE**2, 5)).astype(np.float32)
        newline = rng.normal(size=5).astype(np.float32)
        arguments = [torch.from_numpy(features)], torch.tensor([size])
        packed, _ = model.pack_image_features(itself, *arguments, image_newline=torch.from_numpy(newline), **more)
        got = any_resolution_places((SIDE, SIDE), grid, size, 4 if kind == "onevision" else None)
        table = np.concatenate([newline[None], features.reshape(-1, 5)])
        if got.sources is not None:
            table = np.einsum("vn,vnk->vk", got.weights, table[got.sources])
            reduced += 1
        assert {token for token, _ in got.placed} == {0}
        np.testing.assert_allclose(table[[slot for _, slot in got.placed]], packed[0], atol=2e-6, err_msg=str(size))
    assert bool(reduced) == (kind == "onevision")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder with a tiny tokenizer of SmolVLM's kind; of its tiles' names it knows only `<row_1_col_1>`."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_tokenizer("smollm2", folder)
    write_template(TEMPLATES["smolvlm"], folder)
    return folder


@pytest.mark.parametrize(("longest", "size"), [(96, size) for size in SIZES] + [(24, (20, 30)), (75, (49, 49))])
def test_split_pictures_have_the_processor_s_text(longest, size, smollm2):
    from transformers import AutoTokenizer
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    cut = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": 24})
    processor = Idefics3Processor(cut, AutoTokenizer.from_pretrained(smollm2), image_seq_len=3)
    picture = Image.new("RGB", size[::-1])
    want = processor(images=picture, text="<image>")["input_ids"][0]
    one = cut(picture, return_row_col_info=True)
    tokenizer = HfTokenizer(smollm2)
    grid = one["rows"][0][0], one["cols"][0][0]
    places = split_picture_places(tokenizer, 3, grid)
    image = tokenizer.special("<image>")
    assert [image if slot >= 0 else token for token, slot in places.placed] == want
    slots = [slot for _, slot in places.placed if slot >= 0]
    assert slots == list(range(3 * (1 + grid[0] * grid[1])))
    assert places.sources is None


def test_widths_are_few_and_not_much_larger():
    widths = {stepped(number) for number in range(256, 8192)}
    assert len(widths) == 21 and 256 in widths
    assert all(number <= stepped(number) < 1.25 * number for number in range(4, 8192))
