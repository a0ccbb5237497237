"""CLIP's vision transformer; its weights have the names of transformers 5."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.layers import (
    Embedding,
    LayerNorm,
    Linear,
    PatchEmbedding,
    Stack,
    attention,
    broadcast_rows,
    merge_heads,
    quick_gelu,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP vision transformer that runs up to its feature layer."""

    num_patches: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    layers_used: int  # the layers above the feature layer never run


class ClipAttention(nnx.Module):
    """Full self-attention with separate projections: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attention(q, k, v)))


class ClipMLP(nnx.Module):
    """Two layers around a quick GELU: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, intermediate_size: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, intermediate_size, rngs=rngs)
        self.fc2 = Linear(intermediate_size, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(quick_gelu(self.fc1(x)))


class ClipLayer(nnx.Module):
    """One pre-norm transformer layer: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(width, eps=eps)
        self.self_attn = ClipAttention(width, config.num_attention_heads, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps=eps)
        self.mlp = ClipMLP(width, config.intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x)), None


class ClipEmbeddings(nnx.Module):
    """The class token and the patches, with learned positions: (B, H, W, 3) -> (B, 1 + N, D)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.patch_embedding = PatchEmbedding(width, config.patch_size, rngs=rngs)
        self.position_embedding = Embedding(config.num_patches + 1, width, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        cls = broadcast_rows(self.class_embedding[...][None].astype(patches.dtype), len(patches))
        return jnp.concatenate([cls, patches], axis=1) + self.position_embedding.weight[...].astype(patches.dtype)


class ClipLayers(nnx.Module):
    """The level `encoder` of CLIP's weight names."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda rngs: ClipLayer(config, rngs=rngs), config.layers_used, rngs=rngs)


class ClipEncoder(nnx.Module):
    """CLIP's vision transformer up to the feature layer, without the class token.

    pixels: (B, H, W, 3) normalised -> (B, N, D) in the dtype of `pixels`.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.embeddings = ClipEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipLayers(config, rngs=rngs)

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """Returns the hidden state after the last used layer, class token first: (B, 1 + N, D)."""
        return self.encoder.layers(self.pre_layrnorm(self.embeddings(pixels)))[0]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.hidden(pixels)[:, 1:]


def unused_shapes(config: ClipConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of unused weights: the layers above the feature layer and the norm after them."""
    width, intermediate = config.hidden_size, config.intermediate_size
    layer = {f"layer_norm{i}.{leaf}": (width,) for i in (1, 2) for leaf in ("weight", "bias")}
    for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{proj}.weight": (width, width), f"self_attn.{proj}.bias": (width,)}
    layer |= {"mlp.fc1.weight": (intermediate, width), "mlp.fc1.bias": (intermediate,)}
    layer |= {"mlp.fc2.weight": (width, intermediate), "mlp.fc2.bias": (width,)}
    above = range(config.layers_used, config.num_hidden_layers)
    shapes = {f"{prefix}encoder.layers.{i}.{leaf}": shape for i in above for leaf, shape in layer.items()}
    return shapes | {f"{prefix}post_layernorm.{leaf}": (width,) for leaf in ("weight", "bias")}
