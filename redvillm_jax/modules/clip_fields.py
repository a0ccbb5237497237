"""The tables of CLIP's published files: config.json of its vision tower, and the files of its image processor.

Defaults are the defaults of transformers' classes, because transformers omits equal values from its files.
"""

from collections.abc import Sequence
from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    EPS,
    FIXED,
    HEADS,
    LAYERS,
    PIXELS,
    WIDTH,
    Field,
    Fields,
    check_multiple,
    count,
    mapping,
    nothing,
    number,
    only,
    read_fields,
    shown,
)

CLIP: Fields = COMMON | {
    "model_type": only("clip_vision_model"),
    "hidden_size": count(768, WIDTH),
    "intermediate_size": count(3072, WIDTH),
    "num_hidden_layers": count(12, LAYERS),
    "num_attention_heads": count(12, HEADS),
    "image_size": count(224, PIXELS),
    "patch_size": count(32, PIXELS),
    "layer_norm_eps": number(1e-5, EPS),
    "num_channels": only(3),
    "hidden_act": only("quick_gelu"),
    # fields of CLIP's text half and its loss; a vision tower has no output head to tie
    **nothing("projection_dim", "vocab_size", "tie_word_embeddings", "logit_scale_init_value"),
}

WHOLE_CLIP: Fields = COMMON | {  # a CLIP that is published with its text half
    "model_type": only("clip"),
    "vision_config": mapping(None),
    **nothing("text_config", "text_config_dict", "vision_config_dict", "projection_dim", "logit_scale_init_value"),
    **nothing("tie_word_embeddings"),
}

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
KNOWN_CLIPS = {  # the fields of published CLIPs, by name
    "clip-vit-large-patch14": CLIP_LARGE | {"patch_size": 14, "image_size": 224},
    "clip-vit-large-patch14-336": CLIP_LARGE | {"patch_size": 14, "image_size": 336},
}


def read_clip(config: Any, where: str, path: str = "") -> dict[str, Any]:
    """Reads the fields of a CLIP vision tower from its own config or from a whole CLIP's."""
    if isinstance(config, dict) and "vision_config" in config:
        config, path = read_fields(config, WHOLE_CLIP, where, path)["vision_config"], f"{path}vision_config."
    values = read_fields(config, CLIP, where, path)
    check_multiple(values, "hidden_size", "num_attention_heads", where, path)
    check_multiple(values, "image_size", "patch_size", where, path)
    return values


# ---- preprocessor_config.json and processor_config.json


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


def clip_transform(image_size: int, patch_size: int, mean: tuple, std: tuple, *, pads: bool) -> Fields:
    """Returns the table of a CLIP image processor for pictures of `image_size`.

    pads: pictures are padded to squares; a centre crop then changes nothing.
    """
    square = {"height": image_size, "width": image_size}
    return COMMON | {
        "image_processor": mapping(None),  # processor_config.json holds the fields of the other file here
        "image_processor_type": only(
            *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
            *("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil"),
        ),
        "feature_extractor_type": only("CLIPFeatureExtractor"),
        "do_resize": only(True),
        "size": only({"shortest_edge": image_size}, image_size),
        "do_center_crop": only(True),
        "crop_size": only(square, image_size),
        "resample": only(3, values="3 (bicubic)"),
        "do_rescale": only(True),
        "rescale_factor": close(1 / 255),
        "do_normalize": only(True),
        "image_mean": close(mean),
        "image_std": close(std),
        "do_pad": only(False, True) if pads else only(False),
        "default_to_square": only(False),
        "patch_size": only(patch_size),
        "vision_feature_select_strategy": only("default"),
        **nothing("do_convert_rgb", "processor_class", "num_additional_image_tokens", "image_token", "chat_template"),
        **nothing("image_seq_length", "disable_grouping", "data_format", "input_data_format", "return_tensors"),
        **nothing("device", "_valid_processor_keys", "size_divisor", "pad_size", "processor_type"),
    }


def read_transform(config: Any, fields: Fields, where: str) -> None:
    """Raises UserError when an image processor's file asks for another transform than `fields`."""
    inner = read_fields(config, fields, where)["image_processor"]
    if inner is not None:
        read_fields(inner, fields, where, "image_processor.")
