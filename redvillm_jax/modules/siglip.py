"""SigLIP's vision transformer; its weights have the names of transformers 5."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from redvillm_jax.modules.layers import Embedding, LayerNorm, PatchEmbedding, gelu_tanh
from redvillm_jax.modules.vit import VitConfig, VitLayers, layer_norm_shapes, mlp_shapes, unused_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(VitConfig):
    """Sizes and switches of a SigLIP vision transformer."""

    image_size: int
    post_layernorm: bool  # whether the features are normalised after the last used layer
    vision_use_head: bool = False  # whether the files have an attention pooling head, which never runs
    position_ids: tuple[int, ...] | None = None  # the learned position of every patch; None: its own number

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, in raster order; pixels behind the last whole patch are not read."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


class SiglipEmbeddings(nnx.Module):
    """The patches with learned positions: (B, H, W, 3) -> (B, N, D)."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.patch_embedding = PatchEmbedding(width, config.patch_size, bias=True, rngs=rngs)
        self.position_embedding = Embedding(config.num_patches, width, rngs=rngs)
        self.position_ids = config.position_ids

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        positions = self.position_embedding.weight[...]
        if self.position_ids is not None:
            positions = positions[np.asarray(self.position_ids)]
        return patches + positions.astype(patches.dtype)


class SiglipEncoder(nnx.Module):
    """SigLIP's vision transformer up to the feature layer; it has no class token.

    pixels: (B, H, W, 3) normalised -> (B, N, D) in the dtype of `pixels`.
    """

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.embeddings = SiglipEmbeddings(config, rngs=rngs)
        self.encoder = VitLayers(config, gelu_tanh, rngs=rngs)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.post_layernorm = LayerNorm(width, eps=eps) if config.post_layernorm else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        hidden = self.encoder.layers(self.embeddings(pixels))[0]
        return hidden if self.post_layernorm is None else self.post_layernorm(hidden)


def unused_shapes(config: SiglipConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of unused weights: layers above the feature layer, norm and pooling head if unused."""
    width = config.hidden_size
    shapes = unused_layers(config)
    if not config.post_layernorm:
        shapes |= layer_norm_shapes("post_layernorm", width)
    if config.vision_use_head:
        shapes |= {"head.probe": (1, 1, width)} | layer_norm_shapes("head.layernorm", width)
        shapes |= {"head.attention.in_proj_weight": (3 * width, width), "head.attention.in_proj_bias": (3 * width,)}
        shapes |= {"head.attention.out_proj.weight": (width, width), "head.attention.out_proj.bias": (width,)}
        shapes |= mlp_shapes("head.mlp", width, config.intermediate_size)
    return {prefix + name: shape for name, shape in shapes.items()}
