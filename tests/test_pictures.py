"""Pictures: read as the originals read them, and answered about as the image LLM itself would."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES
from PIL import Image
from test_model import DTYPE, build

from data_pipeline.common.errors import UserError
from data_pipeline.media.pictures import as_rgb, picture_size, read_picture
from data_pipeline.media.reading import Clip, Picture, Reading, read_media
from data_pipeline.media.resizing import resizer
from data_pipeline.media.tiles import AnyResolution, LongestSide, cut_picture, most_squares
from redvillm_jax.bases import llava, qwen_vl
from redvillm_jax.bases.contract import load_family
from redvillm_jax.modules.layers import normalize

torch = pytest.importorskip("torch")
from tests import torch_qwen_vl as oracle  # noqa: E402
from tests.tiny_bases import TOY  # noqa: E402


@pytest.fixture
def photo(tmp_path):
    """Saves random pixels (height, width, 3) as a PNG file and returns its path and them."""

    def save(width: int, height: int):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        return tmp_path / "photo.png", pixels

    return save


# ---- reading


SHAPES = ((37, 90), (90, 37), (224, 224), (500, 333), (5, 7), (1, 199))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [33, 224])
def test_crop_is_clip_s_own(photo, shape, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path, pixels = photo(*shape)
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = CLIPImageProcessorPil(**sizes, do_rescale=False, do_normalize=False)
    want = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(read_picture(path, size, "crop"), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_stands_in_the_middle_of_the_mean_colour(photo, shape):
    path, pixels = photo(*shape)
    height, width, _ = pixels.shape
    square = np.empty((max(shape), max(shape), 3), np.uint8)
    square[:] = [int(255 * mean) for mean in llava.MEAN]
    top, left = (max(shape) - height) // 2, (max(shape) - width) // 2
    square[top : top + height, left : left + width] = pixels
    want = np.asarray(Image.fromarray(square).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_picture(path, 24, "pad"), want)


def test_a_rule_of_frames_keeps_all_and_no_ratio(photo):
    path, pixels = photo(91, 37)
    want = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_picture(path, 24, "bicubic"), want)


def test_which_base_takes_which():
    assert [llava.picture_fit(llava.SIZES[size]) for size in ("v1-7b", "v1.5-7b", "v1.5-7b-hf")] == [
        "crop",
        "pad",
        "pad",
    ]
    assert load_family("qwen_vl").picture_fit(qwen_vl.SIZES["7b"]) == "bicubic"


def filled(mode: str, pixel: tuple) -> Image.Image:
    return Image.new(mode, (30, 20), pixel)


GREY, RED = filled("RGB", (200, 200, 200)), filled("RGB", (255, 0, 0))


def palette() -> Image.Image:
    picture = Image.new("P", (30, 20), 1)
    picture.putpalette([9, 9, 9, 10, 20, 30])
    return picture


@pytest.mark.parametrize(
    ("picture", "name", "options", "colour"),
    [
        (GREY, "a.jpg", {}, (200, 200, 200)),
        (GREY, "a.webp", {"lossless": True}, (200, 200, 200)),
        (GREY.convert("L"), "a.png", {}, (200, 200, 200)),
        (GREY.convert("L").point(lambda value: 255, mode="1"), "a.png", {}, (255, 255, 255)),
        (GREY.convert("CMYK"), "a.jpg", {}, (200, 200, 200)),
        (palette(), "a.png", {}, (10, 20, 30)),
        (palette(), "a.png", {"transparency": 1}, (255, 255, 255)),
        (filled("LA", (10, 0)), "a.png", {}, (255, 255, 255)),
        (filled("RGBA", (0, 0, 0, 51)), "a.png", {}, (204, 204, 204)),
        (filled("RGB", (1, 2, 3)), "a.png", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.fromarray(np.full((20, 30), 0x9C40, np.uint16)), "a.png", {}, (0x9C, 0x9C, 0x9C)),
        (Image.fromarray(np.full((20, 30), 0x9C40, np.uint16)), "a.tif", {}, (0x9C, 0x9C, 0x9C)),
        (GREY, "a.gif", {"save_all": True, "append_images": [RED]}, (200, 200, 200)),
        (GREY, "a.png", {"exif": b"garbage"}, (200, 200, 200)),
    ],
)
def test_any_mode_becomes_rgb(picture, name, options, colour, tmp_path):
    picture.save(tmp_path / name, **options)
    got = read_picture(tmp_path / name, 8, "bicubic")
    assert got.shape == (8, 8, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.broadcast_to(np.uint8(colour), (8, 8, 3)))


@pytest.mark.parametrize(
    ("orientation", "white"), [(1, np.s_[:, :3]), (3, np.s_[:, -3:]), (6, np.s_[:3]), (8, np.s_[-3:])]
)
def test_exif_turns_a_picture(orientation, white, tmp_path):
    half = Image.new("RGB", (30, 20))
    half.paste((255, 255, 255), (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    half.save(tmp_path / "a.png", exif=exif)
    assert picture_size(tmp_path / "a.png") == ((30, 20) if orientation > 4 else (20, 30))
    got = read_picture(tmp_path / "a.png", 8, "bicubic")
    assert (got[white] > 250).all() and got.mean() < 140


def cut(name: str, keep: float):
    def make(folder):
        GREY.save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])
        return folder / name

    return make


def holding(name: str, content: bytes):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def saved(name: str, picture: Image.Image):
    def make(folder):
        picture.save(folder / name)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut("a.jpg", 0.9), "a.jpg: cannot be read as a picture"),
        (cut("a.png", 0.7), "a.png: cannot be read as a picture"),
        (holding("a.png", b""), "a.png: not a picture in a known format"),
        (holding("a.jpg", b"<html>"), "not a picture in a known format"),
        (holding("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99), r"a.heic: not a picture.*HEIC cannot"),
        (saved("a.eps", Image.new("RGB", (8, 8))), "a.eps: not a picture in a known format"),
        (saved("a.tif", Image.new("F", (3, 3))), "a.tif: cannot be read as a picture.*mode F"),
        (saved("a.png", Image.new("RGB", (1, 300))), "1 × 300 pixels, expected at most 200 times as long"),
        (lambda folder: folder, "cannot be read as a picture"),
        (lambda folder: folder / "none.jpg", "none.jpg: no such file"),
    ],
)
def test_mistakes_end_in_one_line(make, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read_picture(make(tmp_path), 8, "bicubic")
    assert "\n" not in str(error.value)


def test_a_list_of_files_is_not_the_video_that_it_names(tmp_path):
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile b.mp4\n")
    reading = Reading(num_frames=2, image_size=8, resize="nearest", sampling="uniform", fit="bicubic")
    with pytest.raises(UserError, match=r"a\.mp4: is no video in a format that is read"):
        read_media(reading, Clip(tmp_path / "a.mp4"))


# ---- frames, and pictures that are not cut, as the image processors of transformers make them

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIDES = range(1, 7)
ODD = ((1, 1), (3, 500), (500, 3), (37, 90), (90, 37), (199, 1), (5, 7), (500, 333), (640, 480), (64, 64))


def processor(name: str, **arguments):
    """The PIL image processor of a family of transformers, which makes uint8 pixels."""
    folder, kind = name.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    return getattr(module, f"{kind}ImageProcessorPil")(do_rescale=False, do_normalize=False, **arguments)


WHOLE = {  # family -> its processor without image splitting, the rule
    "LLaVA-NeXT": ("llava_next.LlavaNext", {"size": {"shortest_edge": 64}, "crop_size": 64}, "bicubic"),
    "LLaVA-OneVision": ("llava_onevision.LlavaOnevision", {"size": {"height": 64, "width": 64}}, "bicubic"),
    "Gemma 3": ("gemma3.Gemma3", {"size": {"height": 64, "width": 64}}, "bilinear"),
    "SmolVLM": (
        "idefics3.Idefics3",
        {"size": {"longest_edge": 150}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": False},
        "lanczos=150",
    ),
}


@pytest.mark.parametrize("family", WHOLE)
def test_the_whole_picture_is_the_processor_s(family):
    name, arguments, rule = WHOLE[family]
    own = processor(name, **arguments)
    for width, height in ODD:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        want = own(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
        want = want.reshape(-1, 3, 64, 64)[0].transpose(1, 2, 0)  # the base view comes first
        np.testing.assert_array_equal(resizer(rule)(pixels, 64), want, err_msg=f"{width} × {height}")


CUTS = {  # family -> its processor at a small size, the cut
    "LLaVA-NeXT": (
        "llava_next.LlavaNext",
        {"size": {"shortest_edge": 24}, "crop_size": 24, "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]},
        AnyResolution(((24, 48), (48, 24), (48, 48))),
    ),
    "LLaVA-OneVision": (
        "llava_onevision.LlavaOnevision",
        {"size": {"height": 16, "width": 16}, "image_grid_pinpoints": [[16 * i, 16 * j] for i in SIDES for j in SIDES]},
        AnyResolution(tuple((16 * i, 16 * j) for i in SIDES for j in SIDES)),
    ),
    "SmolVLM": (
        "idefics3.Idefics3",
        {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 24}},
        LongestSide(96),
    ),
    "SmolVLM, odd": (
        "idefics3.Idefics3",
        {"size": {"longest_edge": 75}, "max_image_size": {"longest_edge": 25}},
        LongestSide(75),
    ),
    "SmolVLM, rounded up": (
        "idefics3.Idefics3",
        {"size": {"longest_edge": 80}, "max_image_size": {"longest_edge": 24}},
        LongestSide(80),
    ),
    "SmolVLM, one square": (
        "idefics3.Idefics3",
        {"size": {"longest_edge": 20}, "max_image_size": {"longest_edge": 24}},
        LongestSide(20),
    ),
}


@pytest.mark.parametrize("family", CUTS)
def test_tiles_are_the_processor_s(family):
    name, arguments, cut = CUTS[family]
    own, most = processor(name, **arguments), 0
    for width, height in (*ODD, (75, 75), (49, 48), (95, 94), (121, 100)):
        picture = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))
        options = {"return_row_col_info": True} if "Idefics3" in name else {}
        want = own(picture, return_tensors="np", **options)
        side = want["pixel_values"].shape[-1]
        got = cut_picture(picture, side, cut)
        pixels = want["pixel_values"].reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(got.squares, pixels, err_msg=f"{width} × {height}")
        if options:
            assert got.grid == (want["rows"][0][0], want["cols"][0][0])
        assert len(got.squares) == 1 + got.grid[0] * got.grid[1]
        most = max(most, len(got.squares))
    assert most == most_squares(side, cut)


def test_normalised_tiles_are_the_processor_s(tmp_path):
    module = importlib.import_module("transformers.models.idefics3.image_processing_pil_idefics3")
    own = module.Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 24})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    want = own(picture, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    got = read_media(Reading(1, 24, "nearest", "uniform", LongestSide(96)), Picture(tmp_path / "a.png"))
    assert {name: got[name].tolist() for name in ("num_tiles", "grid", "size")} == {
        "num_tiles": 9,
        "grid": [2, 4],
        "size": [37, 90],
    }
    assert got["pictures"].shape == (17, 24, 24, 3) and not got["pictures"][9:].any()
    np.testing.assert_allclose(normalize(jnp.asarray(got["pictures"][:9]), *HALF, jnp.float32), want, atol=1e-6)


@pytest.mark.parametrize(
    "picture",
    [
        *(GREY.convert(mode) for mode in ("L", "1", "CMYK", "HSV")),
        palette(),
        *(filled(mode, pixel) for mode, pixel in (("LA", (10, 99)), ("RGBA", (9, 0, 200, 51)), ("PA", (3, 77)))),
    ],
    ids=lambda picture: picture.mode,
)
def test_other_modes_become_rgb_as_in_the_processors(picture):
    from transformers.image_transforms import convert_to_rgb

    np.testing.assert_array_equal(np.asarray(as_rgb(picture)), convert_to_rgb(picture, return_numpy=True))


@pytest.mark.parametrize("rule", ["lanczos", "lanczos=0", "lanczos=4097", "lanczos=08", "area", ""])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ValueError, match="is no rule, expected nearest, bicubic, bilinear or lanczos=N"):
        resizer(rule)


# ---- answering: a base alone is the image LLM that it was made from

QUESTION = "What is the colour of the square?"


def picture_logits(base, model, pictures: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Logits of a whole picture question, and the ids before and after the visual tokens."""
    tokenizer = base.module.Tokenizer(base.path)
    before, after = (
        [i for i, _ in part] for part in base.module.prompt(tokenizer, base.config, QUESTION, None, picture=True)
    )
    tokens = model.picture_tokens(jnp.asarray(pictures), DTYPE)
    slots = [-1] * len(before) + list(range(tokens.shape[1])) + [-1] * len(after)
    ids = jnp.array([[*before, *[0] * tokens.shape[1], *after]])
    embeds = model.embed(ids, jnp.array([slots]), tokens)
    ones = jnp.ones(ids.shape, jnp.int32)
    positions = jnp.arange(ids.shape[1])[None]
    masks = model.masks(ones, 0 * ones, positions, jnp.array([slots]))
    hidden, _ = model.llm(embeds, positions, masks, context_length=jnp.array([ids.shape[1]]))
    return np.asarray(model.llm.logits(hidden)), before, after


def pixels(base, picture: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) normalised in torch."""
    mean, std = (np.float32(value) for value in (base.module.MEAN, base.module.STD))
    return torch.from_numpy((picture.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)[None]


def test_llava_answers_about_a_picture_as_transformers_does(bases, photo):
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    base, _, model = build(bases["llava"], "llava")
    picture = read_picture(photo(50, 40)[0], base.config.image_size, base.module.picture_fit(base.config))
    got, before, after = picture_logits(base, model, picture[None])

    reference = LlavaForConditionalGeneration.from_pretrained(bases["llava"], dtype=torch.float32).eval()
    image = reference.config.image_token_index
    text = AutoTokenizer.from_pretrained(bases["llava"])(f"USER: <image>\n{QUESTION} ASSISTANT:").input_ids
    assert [*before, image, *after] == text
    ids = [*before, *[image] * base.config.num_patches, *after]
    with torch.no_grad():
        want = reference(input_ids=torch.tensor([ids]), pixel_values=pixels(base, picture)).logits
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_qwen_vl_answers_about_a_picture_as_the_reference_does(bases, photo):
    from safetensors.torch import load_file

    base, _, model = build(bases["qwen_vl"], "qwen_vl")
    picture = read_picture(photo(50, 40)[0], base.config.image_size, base.module.picture_fit(base.config))
    got, before, after = picture_logits(base, model, picture[None])

    tensors = load_file(bases["qwen_vl"] / "model.safetensors")
    projector = oracle.below(tensors, "transformer.visual.")
    side, _ = base.config.grid
    heads = base.config.resampler_num_attention_heads
    with torch.no_grad():
        features = oracle.vision(tensors, pixels(base, picture), heads=base.config.vision_num_attention_heads)["vit"]
        positions = oracle.grid(projector["attn_pool.pos_embed"], side, side)
        visual = oracle.resample(projector, features, positions, heads=heads)["visual_out"]
        before_embeds, after_embeds = (tensors["transformer.wte.weight"][part][None] for part in (before, after))
        embeds = torch.cat([before_embeds, visual, after_embeds], dim=1)
        want = oracle.decoder(tensors, embeds, heads=base.config.num_attention_heads, seq_length=base.config.seq_length)
    assert visual.shape[1] == base.config.n_queries
    np.testing.assert_allclose(got, want, atol=1e-4)
    said = base.module.Tokenizer(base.path).decode(before + after, keep_special=True)
    asked = f"<|im_start|>user\nPicture 1: <img></img>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert said == f"<|im_start|>system\n{qwen_vl.SYSTEM_PROMPT}<|im_end|>\n{asked}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_switches_of_videos_do_not_touch_a_picture(family, bases):
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8))
    want = build(bases[family], family)[2].picture_tokens(pictures, DTYPE)
    assert want.shape[:2] == (1, 4 if family == TOY else 16)
    other = build(bases[family], family, streams="spatial", spatial_pool=2, temporal_module=False)[2]
    np.testing.assert_array_equal(other.picture_tokens(pictures, DTYPE), want)


def test_an_extra_mlp_stands_behind_pictures_too(bases):
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8))
    plain, more = (build(bases["llava"], "llava", extra_mlp=flag)[2] for flag in (False, True))
    want = more.projectors["extra_mlp_spatial"](plain.picture_tokens(pictures, DTYPE))
    np.testing.assert_allclose(more.picture_tokens(pictures, DTYPE), want, atol=1e-6)
