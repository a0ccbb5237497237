"""The transformer layers that CLIP's and SigLIP's vision towers share; their weights have transformers' names."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.modules.layers import LayerNorm, Linear, Stack, attention, merge_heads, split_heads

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Sizes of a vision transformer that runs up to its feature layer."""

    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    layers_used: int  # the layers above the feature layer never run


SHARDING = (  # weight of a tower -> the mesh axes of torch's axes (out, in)
    (r"(q_proj|k_proj|v_proj|fc1)\.weight$", P("tensor", "fsdp")),
    (r"(out_proj|fc2)\.weight$", P("fsdp", "tensor")),
    (r"patch_embedding\.(weight|bias)$", P()),
    (r"(class_embedding|position_embedding\.weight)$", P()),
    (r"(layer_?norm\d?|layrnorm)\.(weight|bias)$", P()),
    (r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)\.bias$", P()),
)


class VitAttention(nnx.Module):
    """Full self-attention with separate projections: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v)))


class VitMLP(nnx.Module):
    """Two layers around an activation: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: VitConfig, activation: Activation, *, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class VitLayer(nnx.Module):
    """One pre-norm transformer layer: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: VitConfig, activation: Activation, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.self_attn = VitAttention(config, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.mlp = VitMLP(config, activation, rngs=rngs)

    def __call__(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x)), None


class VitLayers(nnx.Module):
    """The level `encoder` of a tower's weight names."""

    def __init__(self, config: VitConfig, activation: Activation, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda rngs: VitLayer(config, activation, rngs=rngs), config.layers_used, rngs=rngs)


def layer_norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a layer norm's weights."""
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias")}


def mlp_shapes(name: str, width: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an MLP's weights."""
    shapes = {f"{name}.fc1.weight": (intermediate_size, width), f"{name}.fc1.bias": (intermediate_size,)}
    return shapes | {f"{name}.fc2.weight": (width, intermediate_size), f"{name}.fc2.bias": (width,)}


def unused_layers(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the weights of the layers above the feature layer."""
    width = config.hidden_size
    layer = layer_norm_shapes("layer_norm1", width) | layer_norm_shapes("layer_norm2", width)
    for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{proj}.weight": (width, width), f"self_attn.{proj}.bias": (width,)}
    layer |= mlp_shapes("mlp", width, config.intermediate_size)
    above = range(config.layers_used, config.num_hidden_layers)
    return {f"encoder.layers.{i}.{leaf}": shape for i in above for leaf, shape in layer.items()}
