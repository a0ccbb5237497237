"""The tables of preprocessor_config.json and processor_config.json: how published code makes pixels of a picture.

Each function returns the table of one image processor of transformers for a model of given sizes. A table refuses every
value that makes other pixels than this project's own code (`data_pipeline.media`).
"""

from collections.abc import Sequence
from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    FIXED,
    READ,
    Field,
    Fields,
    flag,
    is_count,
    mapping,
    nothing,
    only,
    read_fields,
    shown,
)

Colour = tuple[float, float, float]
LONGEST_EDGE = 4096  # Idefics3's own bound on the sides of a picture


def clip_transform(image_size: int, patch_size: int, mean: Colour, std: Colour, *, pads: bool) -> Fields:
    """CLIP's and LLaVA-1.5's: the shorter side becomes `image_size`, the middle stays.

    pads: pictures are padded to squares; a centre crop then changes nothing.
    """
    return normalising(mean, std) | {
        "image_processor_type": names("CLIP", "Llava"),
        "feature_extractor_type": only("CLIPFeatureExtractor"),
        "size": only({"shortest_edge": image_size}, image_size),
        "do_center_crop": only(True),
        "crop_size": only(square(image_size), image_size),
        "resample": only(3, values="3 (bicubic)"),
        "do_pad": only(False, True) if pads else only(False),
        "default_to_square": only(False),
        "patch_size": only(patch_size),
        "vision_feature_select_strategy": only("default"),
        **nothing("num_additional_image_tokens", "image_token", "size_divisor", "pad_size", "image_seq_length"),
    }


def any_resolution_transform(
    image_size: int,
    patch_size: int,
    mean: Colour,
    std: Colour,
    *,
    pinpoints: Sequence[tuple[int, int]],
    strategy: str,
    aspect_ratio: str | None = None,
) -> Fields:
    """LLaVA-NeXT's and LLaVA-OneVision's: the whole picture squashed, then tiles of the best of several resolutions.

    pinpoints: the resolutions (height, width). strategy: `vision_feature_select_strategy`. aspect_ratio:
    `vision_aspect_ratio`, which only OneVision has. The tiles are squares, so a centre crop changes nothing.
    """
    return normalising(mean, std) | {
        "image_processor_type": names("LlavaNext", "LlavaOnevision"),
        "size": only({"shortest_edge": image_size}, square(image_size), image_size),
        "crop_size": only(square(image_size), image_size, None),
        "resample": only(3, values="3 (bicubic)"),
        "image_grid_pinpoints": only([list(point) for point in pinpoints], values="those of config.json"),
        "default_to_square": only(False, True),
        "patch_size": only(patch_size),
        "vision_feature_select_strategy": only(strategy),
        "vision_aspect_ratio": only(aspect_ratio),
        "aspect_ratio_setting": only("anyres"),
        "pad_size": only(None),
        # do_pad fills up batches of pictures with different numbers of tiles
        **nothing("do_center_crop", "do_pad", "num_additional_image_tokens", "num_image_tokens", "image_token"),
        **nothing("video_token", "video_processor"),
    }


def idefics3_transform(image_size: int, tokens: int, mean: Colour, std: Colour) -> Fields:
    """Idefics3's and SmolVLM's: the longest side becomes `size["longest_edge"]`, then tiles of `image_size`.

    tokens: of one tile.
    """
    return normalising(mean, std) | {
        "image_processor_type": names("Idefics3", "SmolVLM"),
        "size": Field(
            READ,
            f'{{"longest_edge": N}}, N a whole number from 1 to {LONGEST_EDGE}',
            lambda value: isinstance(value, dict) and list(value) == ["longest_edge"] and is_edge(*value.values()),
            {"longest_edge": 4 * 364},
        ),
        "max_image_size": only({"longest_edge": image_size}),
        "do_image_splitting": flag(True),
        "resample": only(1, values="1 (Lanczos)"),
        "image_seq_len": only(tokens),
        # do_pad fills up batches of pictures with different numbers of tiles
        **nothing("do_pad", "return_row_col_info", "video_sampling", "video_processor", "default_to_square"),
    }


def gemma3_transform(image_size: int, tokens: int, mean: Colour, std: Colour) -> Fields:
    """Gemma 3's without its pan and scan: the whole picture squashed. tokens: of a picture."""
    return normalising(mean, std) | {
        "image_processor_type": names("Gemma3"),
        "size": only(square(image_size), image_size),
        "resample": only(2, values="2 (bilinear)"),
        "default_to_square": only(True),
        "do_pan_and_scan": only(None, False),
        "image_seq_length": only(tokens),
        **nothing("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate"),
        **nothing("video_processor"),
    }


def normalising(mean: Colour, std: Colour) -> Fields:
    """The fields of every image processor: pixels / 255 - mean, divided by std."""
    return COMMON | {
        "image_processor": mapping(None),  # processor_config.json holds the fields of the other file here
        "do_resize": only(True),
        "do_rescale": only(True),
        "rescale_factor": close(1 / 255),
        "do_normalize": only(True),
        "image_mean": close(mean),
        "image_std": close(std),
        **nothing("do_convert_rgb", "processor_class", "processor_type", "chat_template", "_valid_processor_keys"),
        **nothing("disable_grouping", "data_format", "input_data_format", "return_tensors", "device"),
    }


def names(*models: str) -> Field:
    """`image_processor_type`: the classes of some models, in the variants of transformers."""
    return only(*(f"{model}ImageProcessor{variant}" for model in models for variant in ("", "Fast", "Pil")))


def square(side: int) -> dict[str, int]:
    """A size with two equal sides."""
    return {"height": side, "width": side}


def is_edge(value: Any) -> bool:
    """Returns whether a value can be `longest_edge`."""
    return is_count(value, 1, LONGEST_EDGE)


def close(wanted: float | Sequence[float]) -> Field:
    """A number, or a list of numbers, that must equal `wanted` within 1e-6."""

    def accepts(value: Any) -> bool:
        try:
            pairs = zip(value, wanted, strict=True) if isinstance(wanted, tuple) else [(value, wanted)]
            return all(abs(a - b) < 1e-6 for a, b in pairs)
        except (TypeError, ValueError, OverflowError):
            return False

    default = list(wanted) if isinstance(wanted, tuple) else wanted
    return Field(FIXED, shown(default), accepts, default)


def read_transform(config: Any, fields: Fields, where: str) -> dict[str, Any]:
    """Returns the values that an image processor's file states; those that it omits are not there.

    Raises UserError when the file asks for another transform than `fields`.
    """
    values = read_fields(config, fields, where)
    if values["image_processor"] is not None:
        config = values["image_processor"]
        values = read_fields(config, fields, where, "image_processor.")
    return {name: value for name, value in values.items() if name in config}
