"""The table of a SigLIP vision tower in config.json.

Defaults are the defaults of transformers' classes, because transformers omits equal values from its files.
"""

import dataclasses
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
    flag,
    number,
    only,
    read_fields,
    require,
)
from redvillm_jax.modules.siglip import SiglipConfig

SIGLIP: Fields = COMMON | {
    "model_type": only("siglip_vision_model"),
    "hidden_size": count(768, WIDTH),
    "intermediate_size": count(3072, WIDTH),
    "num_hidden_layers": count(12, LAYERS),
    "num_attention_heads": count(12, HEADS),
    "image_size": count(224, PIXELS),
    "patch_size": count(16, PIXELS),
    "layer_norm_eps": number(1e-6, EPS),
    "vision_use_head": flag(True),
    "num_channels": only(3),
    "hidden_act": only("gelu_pytorch_tanh"),
    "tie_last_hidden_states": only(None, False),  # true would normalise the last layer's output
}


def read_siglip(config: Any, where: str, path: str = "", fields: Fields = SIGLIP) -> dict[str, Any]:
    """Reads the fields of a SigLIP vision tower. Raises UserError for refused values."""
    values = read_fields(config, fields, where, path)
    check_multiple(values, "hidden_size", "num_attention_heads", where, path)
    side, patch = values["image_size"], values["patch_size"]
    require(side >= patch, where, f"{path}image_size is {side}, supported: at least {path}patch_size = {patch}")
    return values


def siglip_config(values: dict[str, Any], *, layers_used: int, post_layernorm: bool) -> SiglipConfig:
    """Makes the config of a SigLIP from the fields of `read_siglip` and the base's choice of layers."""
    names = {field.name for field in dataclasses.fields(SiglipConfig)}
    sizes = {name: value for name, value in values.items() if name in names}
    return SiglipConfig(**sizes, layers_used=layers_used, post_layernorm=post_layernorm)
