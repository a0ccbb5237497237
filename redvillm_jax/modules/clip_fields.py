"""The tables of CLIP's config.json.

Defaults are the defaults of transformers' classes, because transformers omits equal values from its files.
"""

from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    EPS,
    HEADS,
    LAYERS,
    PIXELS,
    WIDTH,
    Fields,
    check_multiple,
    count,
    mapping,
    nothing,
    number,
    only,
    read_fields,
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
