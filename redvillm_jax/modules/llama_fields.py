"""The tables of published decoders that compute as LLaMA with options: LLaMA, Mistral, Qwen2.

Defaults are the defaults of transformers' classes, because transformers omits equal values from its files.
"""

import dataclasses
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
    flag,
    head_size,
    mapping,
    nothing,
    number,
    one_of,
    only,
    read_fields,
    require,
    shown,
)
from redvillm_jax.modules.llama import LlamaConfig, RopeScaling

KINDS = {"full_attention": "full", "sliding_attention": "window"}  # transformers' names -> names in `llama.KINDS`

ROPE: Fields = {  # transformers 5's rope_parameters, and rope_scaling before it
    "rope_type": one_of("default", "linear", "llama3", default=None),
    "type": one_of("default", "linear", "llama3", default=None),
    "rope_theta": number(None, THETA),
    "partial_rotary_factor": only(1.0),
    "factor": number(None, 1e6),
    "low_freq_factor": number(1.0, 1e6),
    "high_freq_factor": number(4.0, 1e6),
    "original_max_position_embeddings": count(None, POSITIONS),
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
    "tie_word_embeddings": flag(False),
    "head_dim": count(None, WIDTH, null="hidden_size / num_attention_heads"),
    "sliding_window": only(None),
    **nothing("pretraining_tp"),  # splits products without changing them
}

MISTRAL: Fields = LLAMA | {
    "model_type": only("mistral"),
    "intermediate_size": count(14336, WIDTH),
    "num_key_value_heads": count(8, HEADS, null="as many as heads"),
    "max_position_embeddings": count(131072, POSITIONS),
    "sliding_window": count(4096, POSITIONS, null="every layer sees all keys"),
}


def are_kinds(value: Any) -> bool:
    """Returns whether a value is null or a list of transformers' names of layer kinds."""
    return value is None or (isinstance(value, list) and all(isinstance(v, str) and v in KINDS for v in value))


QWEN2: Fields = LLAMA | {  # no field states that its queries, keys and values have biases
    "model_type": only("qwen2"),
    "vocab_size": count(151936, VOCABULARY),
    "intermediate_size": count(22016, WIDTH),
    "num_key_value_heads": count(32, HEADS, null="as many as heads"),
    "max_position_embeddings": count(32768, POSITIONS),
    "use_sliding_window": flag(False),
    "sliding_window": count(4096, POSITIONS, null="every layer sees all keys"),
    "max_window_layers": count(28, LAYERS, least=0),
    "layer_types": Field(READ, f"a list of {' and '.join(KINDS)}, or null (from max_window_layers on)", are_kinds),
}

DECODERS = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}


def read_rope(values: dict[str, Any], where: str, path: str, fields: Fields) -> tuple[float, RopeScaling | None]:
    """Returns the rotary base and scaling from the fields that may hold them. Raises UserError when those differ."""
    thetas, scalings = {"rope_theta": values["rope_theta"]}, {}
    for name in ("rope_parameters", "rope_scaling"):
        if values[name]:
            said = read_fields(values[name], fields, where, f"{path}{name}.")
            thetas[f"{name}.rope_theta"] = said["rope_theta"]
            scalings[name] = rope_scaling(said, where, f"{path}{name}.")
    thetas = {path + name: theta for name, theta in thetas.items() if theta is not None}
    said = " but ".join(f"{name} is {shown(theta)}" for name, theta in thetas.items())
    require(len(set(thetas.values())) <= 1, where, f"{said}, supported: one value")
    require(len(set(scalings.values())) <= 1, where, f"{path}rope_parameters and {path}rope_scaling differ")
    return next(iter(thetas.values()), 10000.0), next(iter(scalings.values()), None)


def rope_scaling(said: dict[str, Any], where: str, path: str) -> RopeScaling | None:
    """Returns the scaling of a rope object, or None."""
    kinds = {said[name] for name in ("rope_type", "type")} - {None}
    require(len(kinds) <= 1, where, f"{path}rope_type is {said['rope_type']} but {path}type is {said['type']}")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        return None
    needed = ["factor", "original_max_position_embeddings"][: 1 + (kind == "llama3")]
    for name in needed:
        require(said[name] is not None, where, f"{path}{name} is missing, which {path}rope_type {kind} needs")
    if kind == "linear":
        return RopeScaling(kind, float(said["factor"]))
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    require(low < high, where, f"{path}low_freq_factor is {low}, supported: less than high_freq_factor = {high}")
    return RopeScaling(kind, float(said["factor"]), float(low), float(high), said["original_max_position_embeddings"])


def read_llama(config: Any, where: str, path: str = "", fields: Fields = LLAMA, rope: Fields = ROPE) -> dict[str, Any]:
    """Reads the fields of a decoder and fills in key-value heads, head size, rotary base and scaling.

    fields, rope: the tables of the config and of the rope objects in it. Raises UserError for refused values.
    """
    values = read_fields(config, fields, where, path)
    said = values["head_dim"]
    values["head_dim"] = size = said or head_size(values, where, path)
    require(size % 2 == 0 and size > 2, where, f"{path}head_dim is {size}, supported: an even number above 2")
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    check_multiple(values, "num_attention_heads", "num_key_value_heads", where, path)
    theta, scaling = read_rope(values, where, path, rope)
    return values | {"rope_theta": theta, "rope_scaling": scaling}


def model_table(config: Any, tables: dict[str, Fields], where: str, path: str) -> Fields:
    """Returns the table of the decoder that `model_type` names; a config without it is a LLaMA."""
    kind = config.get("model_type", "llama") if isinstance(config, dict) else "llama"
    known = isinstance(kind, str) and kind in tables
    require(known, where, f"{path}model_type is {shown(kind)}, supported: {' or '.join(map(shown, tables))}")
    return tables[kind]


def read_decoder(config: Any, where: str, path: str = "", tables: dict[str, Fields] = DECODERS) -> LlamaConfig:
    """Reads the config of a decoder by its `model_type`, a key of `tables`."""
    values = read_llama(config, where, path, model_table(config, tables, where, path))
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    kinds, window = layer_kinds(values, where, path)
    decoder = {name: value for name, value in values.items() if name in names}
    decoder |= {"qkv_bias": values["model_type"] == "qwen2", "layer_kinds": kinds, "sliding_window": window}
    return LlamaConfig(**decoder)


def layer_kinds(values: dict[str, Any], where: str, path: str) -> tuple[tuple[str, ...], int]:
    """Returns the kind of every layer, () if all are full, and the window's size."""
    layers, window = values["num_hidden_layers"], values["sliding_window"]
    if window is None or not values.get("use_sliding_window", True):
        return (), 0
    kinds = ("window",) * layers
    if (first := values.get("max_window_layers")) is not None:
        kinds = ("full",) * min(first, layers) + kinds[: max(layers - first, 0)]
    if types := values.get("layer_types"):
        kinds = tuple(KINDS[kind] for kind in types)
        require(len(kinds) == layers, where, f"{path}layer_types has {len(kinds)} layers, supported: {layers}")
    return (kinds, window) if "window" in kinds else ((), 0)
