"""The tables of LLaVA's config.json: transformers' LlavaConfig and LlavaNextConfig, and the original repository's form.

The language model's fields are in `llama_fields`, those of the vision tower in `clip_fields`.
"""

import dataclasses
import re
from typing import Any

from redvillm_jax.modules.clip_fields import KNOWN_CLIPS, read_clip
from redvillm_jax.modules.config_fields import (
    COMMON,
    LAYERS,
    PIXELS,
    READ,
    REQUIRED,
    WIDTH,
    Field,
    Fields,
    count,
    flag,
    is_count,
    mapping,
    nothing,
    one_of,
    only,
    read_fields,
    require,
    shown,
    text,
)
from redvillm_jax.modules.llama import LlamaConfig
from redvillm_jax.modules.llama_fields import read_decoder

Pinpoints = tuple[tuple[int, int], ...]  # (height, width) of each resolution that a tiled picture can have

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def are_pinpoints(value: Any) -> bool:
    """Returns whether a value is null or a list of pairs of whole numbers."""
    if not isinstance(value, list):
        return value is None
    pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return bool(value) and pairs and all(is_count(side, 1, PIXELS) for pair in value for side in pair)


FEATURE_LAYER = Field(READ, "a whole number, one layer", lambda value: is_count(value, -LAYERS, LAYERS), -2)
PINPOINTS = Field(READ, "a list of pairs of whole numbers, or null", are_pinpoints, None)

SHARED: Fields = (  # what the configs of transformers' classes have in common
    COMMON
    | {
        "text_config": mapping(REQUIRED),
        "vision_feature_layer": FEATURE_LAYER,
        "projector_hidden_act": only("gelu"),
        "multimodal_projector_bias": only(True),
        "tie_word_embeddings": flag(False),
    }
    # this project's prompt places a picture's tokens; vocab_size repeats the language model's
    | nothing("image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size")
)
TILED: Fields = {  # of classes that cut pictures into tiles
    "image_grid_pinpoints": PINPOINTS,
    "use_image_newline_parameter": only(True),
}

LLAVA: Fields = (
    SHARED
    | {
        "model_type": only("llava"),
        "vision_config": mapping(KNOWN_CLIPS["clip-vit-large-patch14-336"]),
        "vision_feature_select_strategy": only("default"),
        "system_prompt": text(SYSTEM_PROMPT),  # a field of this project; without it the published value
    }
    | nothing("mm_vision_tower")  # in exports of this project
)
NEXT: Fields = LLAVA | TILED | {"model_type": only("llava_next")}
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # in files that omit them

ORIGINAL_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}  # model_type, ours
ORIGINAL: Fields = (  # LLaVA's own repository: these beside the language model's fields
    {
        "model_type": only(*ORIGINAL_DECODERS),
        "system_prompt": text(SYSTEM_PROMPT),
        "mm_vision_tower": text(""),
        "mm_hidden_size": count(None, WIDTH),
        "mm_vision_select_layer": FEATURE_LAYER,
        "mm_vision_select_feature": only("patch"),
        "mm_projector_type": one_of("linear", "mlp2x_gelu", default="linear"),
        "mm_use_im_start_end": flag(False),
        "image_aspect_ratio": one_of("square", "pad", "anyres", None, default=None),
        "mm_patch_merge_type": one_of("flat", "spatial_unpad", default="flat"),
        "image_grid_pinpoints": PINPOINTS,
        "use_mm_proj": only(True),
        "mm_resampler_type": only(None),
        "sep_image_conv_front": only(False),
    }
    # settings of its training, and of other values of image_aspect_ratio
    | nothing("mm_use_im_patch_token", "pretrain_mm_mlp_adapter", "max_sequence_length", "mm_tunable_parts")
    | nothing("tokenizer_model_max_length", "tokenizer_padding_side", "mm_projector_lr", "mm_vision_tower_lr")
    | nothing("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_vision_resampler")
    | nothing("unfreeze_mm_vision_tower", "tune_mm_vision_tower", "freeze_backbone")
    | nothing("image_crop_resolution", "image_split_resolution")
)


def read_text(own: dict[str, Any], where: str) -> LlamaConfig:
    """Reads `text_config`. Embedding and head are one matrix when it says so, or the file around it."""
    decoder = read_decoder(own["text_config"], where, "text_config.")
    tied = decoder.tie_word_embeddings or own["tie_word_embeddings"]
    return dataclasses.replace(decoder, tie_word_embeddings=tied)


def read_original(config: dict[str, Any], where: str) -> tuple[dict[str, Any], LlamaConfig]:
    """Reads an original config.json: the fields of `ORIGINAL`, and the language model."""
    own = read_fields({name: value for name, value in config.items() if name in ORIGINAL}, ORIGINAL, where)
    other = {name: value for name, value in config.items() if name not in ORIGINAL}
    return own, read_decoder(other | {"model_type": ORIGINAL_DECODERS[own["model_type"]]}, where)


def read_pinpoints(pairs: list[list[int]] | None, default: list[list[int]], image_size: int, where: str) -> Pinpoints:
    """Returns the resolutions of tiled pictures. Raises UserError unless tiles of `image_size` fill them."""
    for pair in pairs or default:
        fits = all(side % image_size == 0 for side in pair)
        require(fits, where, f"image_grid_pinpoints has {pair}, supported: multiples of image_size = {image_size}")
    return tuple((height, width) for height, width in pairs or default)


def original_pinpoints(own: dict[str, Any], image_size: int, where: str) -> Pinpoints:
    """Returns the resolutions of an original config, whose pairs are (width, height); () without tiles."""
    if own["image_aspect_ratio"] != "anyres":
        return ()
    pairs = own["image_grid_pinpoints"]
    require(pairs is not None, where, "image_grid_pinpoints is missing, which image_aspect_ratio anyres needs")
    return read_pinpoints([pair[::-1] for pair in pairs], [], image_size, where)


def named_clip(own: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of the CLIP that an original config names. Raises UserError for an unknown name."""
    name = own["mm_vision_tower"]
    known = KNOWN_CLIPS.get(name.rpartition("/")[2])
    supported = f"{' or '.join(KNOWN_CLIPS)} by name, any other CLIP with its folder given by --vision"
    require(known is not None, where, f"mm_vision_tower is {shown(name)}, supported: {supported}")
    return read_clip(known, where)


def check_clip(own: dict[str, Any], vision: dict[str, Any], where: str, vision_where: str) -> None:
    """Raises UserError when a CLIP has another size than the CLIP that an original config was trained with."""
    named = own["mm_vision_tower"]
    size = re.search(r"patch(\d+)(?:-(\d+))?$", named)  # openai/clip-vit-large-patch14-336
    wanted = {"hidden_size": own["mm_hidden_size"]}
    if size:
        wanted |= {"patch_size": int(size[1]), "image_size": int(size[2] or 224)}
    for key, value in wanted.items():
        trained = f"{where} was trained with {value}" + (f" ({named})" if size else "")
        require(value in (None, vision[key]), vision_where, f"a CLIP with {key} {vision[key]}, but {trained}")


def check_fit(own: dict[str, Any], where: str) -> None:
    """Raises UserError when an original model was trained with another way to make pixels of a picture."""
    fit, kind, merge = own["image_aspect_ratio"], own["mm_projector_type"], own["mm_patch_merge_type"]
    supported = ("square", None) if kind == "linear" else ("pad", "anyres")
    said = f"image_aspect_ratio is {shown(fit)} (square and null crop pictures)"
    choices = " or ".join(map(shown, supported))
    require(fit in supported, where, f"{said}, supported with mm_projector_type {kind}: {choices}")
    unpads = fit != "anyres" or merge == "spatial_unpad"
    require(unpads, where, f"mm_patch_merge_type is {shown(merge)}, supported with {fit}: spatial_unpad")


def from_the_end(values: dict[str, Any], name: str, num_layers: int, where: str) -> int:
    """Returns the feature layer as a negative index into the embeddings and layer outputs. Raises UserError."""
    layer = values[name]
    counted = layer if layer < 0 else layer - num_layers - 1
    supported = f"1 to {num_layers}, or -{num_layers} to -1"
    require(-num_layers <= counted <= -1, where, f"{name} is {layer}, supported: {supported}")
    return counted
