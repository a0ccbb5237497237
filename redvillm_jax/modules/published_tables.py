"""The tables of the published parts that bases are made of: LLaMA, Mistral without a window, CLIP, its transform.

Defaults are those of transformers' classes, because its files omit what equals them.
"""

from collections.abc import Sequence
from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    FIXED,
    Field,
    Fields,
    count,
    equal_to,
    mapping,
    nothing,
    number,
    only,
    read_fields,
    require,
    shown,
)

# Bounds far above any model there is: what lies beyond is a damaged file, refused before anything is built.
LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS, PIXELS, EPS, THETA = 1024, 4096, 2**20, 2**24, 2**31 - 1, 2**14, 1.0, 1e12

ROPE: Fields = {  # transformers 5's rope_parameters, and rope_scaling before it
    "rope_type": only("default"),
    "type": only("default"),
    "rope_theta": number(None, THETA),
    "partial_rotary_factor": only(1.0),
}

LLAMA: Fields = COMMON | {
    "model_type": only("llama"),
    "vocab_size": count(32000, VOCABULARY),
    "hidden_size": count(4096, WIDTH),
    "intermediate_size": count(11008, WIDTH),
    "num_hidden_layers": count(32, LAYERS),
    "num_attention_heads": count(32, HEADS),
    "num_key_value_heads": count(None, HEADS, null="as many as heads"),
    "max_position_embeddings": count(2048, POSITIONS),
    "rms_norm_eps": number(1e-6, EPS),
    "rope_theta": number(None, THETA),
    "rope_parameters": mapping(None, null=True),
    "rope_scaling": mapping(None, null=True),
    "partial_rotary_factor": only(1.0),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "tie_word_embeddings": only(False),
    "head_dim": equal_to("hidden_size / num_attention_heads, or null"),
    "sliding_window": only(None),
    **nothing("pretraining_tp"),  # splits products without changing them
}

MISTRAL: Fields = LLAMA | {  # without a window it is LLaMA's computation
    "model_type": only("mistral"),
    "intermediate_size": count(14336, WIDTH),
    "num_key_value_heads": count(8, HEADS, null="as many as heads"),
    "max_position_embeddings": count(131072, POSITIONS),
    "sliding_window": only(None, default=4096),
}

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
    # of CLIP's text half and its loss; a vision tower has no output head to tie
    **nothing("projection_dim", "vocab_size", "tie_word_embeddings", "logit_scale_init_value"),
}

WHOLE_CLIP: Fields = COMMON | {  # a CLIP that is published with its text half
    "model_type": only("clip"),
    "vision_config": mapping(None),
    **nothing("text_config", "text_config_dict", "vision_config_dict", "projection_dim", "logit_scale_init_value"),
    **nothing("tie_word_embeddings"),
}

CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
KNOWN_CLIPS = {  # what the names of published CLIPs stand for
    "clip-vit-large-patch14": CLIP_LARGE | {"patch_size": 14, "image_size": 224},
    "clip-vit-large-patch14-336": CLIP_LARGE | {"patch_size": 14, "image_size": 336},
}


def read_rope_theta(values: dict[str, Any], where: str, path: str) -> float:
    """The rotary base from the fields that may hold it; raises UserError when they differ."""
    found = {"rope_theta": values["rope_theta"]}
    for name in ("rope_parameters", "rope_scaling"):
        if values[name]:
            found[f"{name}.rope_theta"] = read_fields(values[name], ROPE, where, f"{path}{name}.")["rope_theta"]
    found = {path + name: theta for name, theta in found.items() if theta is not None}
    said = " but ".join(f"{name} is {shown(theta)}" for name, theta in found.items())
    require(len(set(found.values())) <= 1, where, f"{said}, supported: one value")
    return next(iter(found.values()), 10000.0)


def check_multiple(values: dict[str, Any], name: str, of: str, where: str, path: str) -> None:
    """Raises UserError unless one field is a multiple of another."""
    fits = values[name] % values[of] == 0
    require(fits, where, f"{path}{name} is {values[name]}, supported: a multiple of {path}{of} = {values[of]}")


def head_size(values: dict[str, Any], where: str, path: str) -> int:
    """hidden_size / num_attention_heads; raises UserError where rotary positions cannot turn such heads."""
    check_multiple(values, "hidden_size", "num_attention_heads", where, path)
    heads = values["num_attention_heads"]
    size = values["hidden_size"] // heads
    fits = size % 2 == 0 and size > 2
    require(fits, where, f"{path}num_attention_heads is {heads}, supported: heads of an even size above 2, not {size}")
    return size


def read_llama(config: Any, where: str, path: str = "", fields: Fields = LLAMA) -> dict[str, Any]:
    """The numbers of a LLaMA: every read field, with `rope_theta` and `num_key_value_heads` settled."""
    values = read_fields(config, fields, where, path)
    size = head_size(values, where, path)
    said = values["head_dim"]
    supported = f"hidden_size / num_attention_heads = {size}"
    require(said in (None, size), where, f"{path}head_dim is {said}, supported: {supported}")
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    check_multiple(values, "num_attention_heads", "num_key_value_heads", where, path)
    return values | {"rope_theta": read_rope_theta(values, where, path)}


def read_decoder(config: Any, where: str, path: str = "") -> dict[str, Any]:
    """The numbers of a LLaMA or of a Mistral without a window, whichever `model_type` says."""
    tables = {"llama": LLAMA, "mistral": MISTRAL}
    kind = config.get("model_type", "llama") if isinstance(config, dict) else "llama"
    known = isinstance(kind, str) and kind in tables
    require(known, where, f"{path}model_type is {shown(kind)}, supported: {' or '.join(map(shown, tables))}")
    return read_llama(config, where, path, tables[kind])


def read_clip(config: Any, where: str, path: str = "") -> dict[str, Any]:
    """The numbers of a CLIP vision tower from its own config or from a whole CLIP's."""
    if isinstance(config, dict) and "vision_config" in config:
        config, path = read_fields(config, WHOLE_CLIP, where, path)["vision_config"], f"{path}vision_config."
    values = read_fields(config, CLIP, where, path)
    check_multiple(values, "hidden_size", "num_attention_heads", where, path)
    check_multiple(values, "image_size", "patch_size", where, path)
    return values


# ---- preprocessor_config.json and processor_config.json


def close(wanted: float | Sequence[float]) -> Field:
    """A number, or a list of numbers, that must be these to 1e-6."""

    def accepts(value: Any) -> bool:
        try:
            pairs = zip(value, wanted, strict=True) if isinstance(wanted, tuple) else [(value, wanted)]
            return all(abs(a - b) < 1e-6 for a, b in pairs)
        except (TypeError, ValueError, OverflowError):
            return False

    default = list(wanted) if isinstance(wanted, tuple) else wanted
    return Field(FIXED, shown(default), accepts, default)


def clip_transform(image_size: int, patch_size: int, mean: tuple, std: tuple, *, pads: bool) -> Fields:
    """The table of a CLIP image processor for pictures of `image_size`; pads: whether pictures are padded to squares.

    With `pads` a centre crop finds a square and changes nothing.
    """
    square = {"height": image_size, "width": image_size}
    return COMMON | {
        "image_processor": mapping(None),  # processor_config.json holds the other file's fields in it
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
