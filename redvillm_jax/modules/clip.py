"""CLIP's vision transformer; its weights have the names of transformers 5."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from redvillm_jax.modules.layers import Embedding, LayerNorm, PatchEmbedding, broadcast_rows, quick_gelu
from redvillm_jax.modules.vit import VitConfig, VitLayers, layer_norm_shapes, unused_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig(VitConfig):
    """Sizes of a CLIP vision transformer that runs up to its feature layer."""

    num_patches: int


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


class ClipEncoder(nnx.Module):
    """CLIP's vision transformer up to the feature layer, without the class token.

    pixels: (B, H, W, 3) normalised -> (B, N, D) in the dtype of `pixels`.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.embeddings = ClipEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VitLayers(config, quick_gelu, rngs=rngs)

    def hidden(self, pixels: jax.Array) -> jax.Array:
        """Returns the hidden state after the last used layer, class token first: (B, 1 + N, D)."""
        return self.encoder.layers(self.pre_layrnorm(self.embeddings(pixels)))[0]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.hidden(pixels)[:, 1:]


def unused_shapes(config: ClipConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of unused weights: the layers above the feature layer and the norm after them."""
    shapes = unused_layers(config) | layer_norm_shapes("post_layernorm", config.hidden_size)
    return {prefix + name: shape for name, shape in shapes.items()}
