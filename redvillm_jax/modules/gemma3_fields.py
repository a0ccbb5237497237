"""The tables of Gemma 3 in config.json: Gemma3TextConfig, and the rotary positions of its two kinds of layers.

Defaults are the defaults of transformers' classes, because transformers omits equal values from its files.
"""

from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    EPS,
    HEADS,
    LAYERS,
    POSITIONS,
    READ,
    THETA,
    VOCABULARY,
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
    require,
)
from redvillm_jax.modules.gemma3 import Gemma3TextConfig, Rope
from redvillm_jax.modules.llama_fields import KINDS, ROPE, are_kinds, rope_scaling

GEMMA3_TEXT: Fields = COMMON | {
    "model_type": only("gemma3_text"),
    "vocab_size": count(262208, VOCABULARY),
    "hidden_size": count(2304, WIDTH),
    "intermediate_size": count(9216, WIDTH),
    "num_hidden_layers": count(26, LAYERS),
    "num_attention_heads": count(8, HEADS),
    "num_key_value_heads": count(4, HEADS),
    "head_dim": count(256, WIDTH),
    "hidden_activation": only("gelu_pytorch_tanh"),
    "max_position_embeddings": count(131072, POSITIONS),
    "rms_norm_eps": number(1e-6, EPS),
    "tie_word_embeddings": only(True),
    "attention_bias": only(False),
    "query_pre_attn_scalar": number(256, WIDTH),
    "sliding_window": count(4096, POSITIONS),
    "layer_types": Field(READ, f"a list of {' and '.join(KINDS)}, or null (from sliding_window_pattern)", are_kinds),
    "sliding_window_pattern": count(6, LAYERS),  # every sixth layer is full
    "rope_parameters": mapping(None, null=True),
    "rope_theta": number(None, THETA),  # of full layers; before transformers 5
    "rope_scaling": mapping(None, null=True),  # of full layers
    "rope_local_base_freq": number(None, THETA),  # of window layers
    "final_logit_softcapping": only(None),
    "attn_logit_softcapping": only(None),
    "use_bidirectional_attention": only(False, None),
    **nothing("_sliding_window_pattern", "cache_implementation"),
}
ROPES: Fields = {kind: mapping(None, null=True) for kind in KINDS}


def read_gemma3_text(config: Any, where: str, path: str = "") -> Gemma3TextConfig:
    """Reads the config of a decoder. Raises UserError for refused values."""
    values = read_fields(config, GEMMA3_TEXT, where, path)
    check_multiple(values, "num_attention_heads", "num_key_value_heads", where, path)
    size, layers, types = values["head_dim"], values["num_hidden_layers"], values["layer_types"]
    require(size % 2 == 0 and size > 2, where, f"{path}head_dim is {size}, supported: an even number above 2")
    if types is None:
        every = values["sliding_window_pattern"]
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    require(len(types) == layers, where, f"{path}layer_types has {len(types)} layers, supported: {layers}")
    ropes = read_fields(values["rope_parameters"] or {}, ROPES, where, f"{path}rope_parameters.")
    full, window = ropes["full_attention"], ropes["sliding_attention"]
    scalings = {"rope_parameters.full_attention": full, "rope_scaling": values["rope_scaling"]}
    names = {name for name in Gemma3TextConfig.__dataclass_fields__ if name in values}
    return Gemma3TextConfig(
        **{name: values[name] for name in names},
        layer_kinds=tuple(KINDS[kind] for kind in types),
        full_rope=read_rope(scalings, {"rope_theta": values["rope_theta"]}, 1e6, where, path),
        window_rope=read_rope(
            {"rope_parameters.sliding_attention": window},
            {"rope_local_base_freq": values["rope_local_base_freq"]},
            1e4,
            where,
            path,
        ),
    )


def read_rope(objects: dict[str, Any], thetas: dict[str, float | None], default: float, where: str, path: str) -> Rope:
    """Returns base and scaling of one kind of layer from the fields that may hold them, by name.

    objects: rope objects, or None. Raises UserError when two fields that are not null differ.
    """
    scalings = {}
    for name, said in objects.items():
        if said is not None:
            values = read_fields(said, ROPE, where, f"{path}{name}.")
            thetas = thetas | {f"{name}.rope_theta": values["rope_theta"]}
            scalings[name] = rope_scaling(values, where, f"{path}{name}.")
    thetas = {path + name: theta for name, theta in thetas.items() if theta is not None}
    said = " but ".join(f"{name} is {theta:g}" for name, theta in thetas.items())
    require(len(set(thetas.values())) <= 1, where, f"{said}, supported: one value")
    differ = " and ".join(path + name for name in scalings)
    require(len(set(scalings.values())) <= 1, where, f"{differ} differ, supported: one of them")
    return Rope(next(iter(thetas.values()), default), next(iter(scalings.values()), None))
