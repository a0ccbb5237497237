"""The parts that LLaVA and LLaVA-OneVision share: projector, language model, names of weights and their shardings."""

from typing import Protocol

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.modules import vit
from redvillm_jax.modules.layers import BATCH_AXES, Linear, gelu
from redvillm_jax.modules.llama import LlamaConfig, LlamaDecoder


class LlavaConfig(Protocol):
    """What the parts read of a base's Config, besides the fields of `LlamaConfig`."""

    feature_size: int
    hidden_size: int
    projector: str  # "mlp2x_gelu" or "linear"
    image_newline: bool  # whether the weights have the token behind every row of a picture that is cut into tiles


class Projector(nnx.Module):
    """Maps every feature to one token: features (B, M, D) -> (B, M, K); the mask and the layout do not matter."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        if config.projector == "linear":
            self.linear = Linear(config.feature_size, config.hidden_size, rngs=rngs)
        else:
            self.linear_1 = Linear(config.feature_size, config.hidden_size, rngs=rngs)
            self.linear_2 = Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.kind = config.projector

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """How the tokens of a picture (rows, cols) or a sequence (length,) lie: one for each feature."""
        return layout

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        if self.kind == "linear":
            return self.linear(features)
        return self.linear_2(gelu(self.linear_1(features)))


class LLM(LlamaDecoder):
    """The decoder with its output head, and `image_newline` (K,), the token behind every row of a tiled picture."""

    def __init__(self, config: LlavaConfig | LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        newline = 0.02 * jax.random.normal(rngs.params(), (config.hidden_size,)) if config.image_newline else None
        self.image_newline = None if newline is None else nnx.Param(newline)


PREFIX = {"encoder": "vision_tower.", "projector": "multi_modal_projector.", "llm": "language_model."}

CANONICAL = (  # published name -> canonical name: original repository, transformers 4 and 5, a separate vision tower
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "vision_tower."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^vision_model\.", "vision_tower."),
    (r"^(model\.mm_projector|multi_modal_projector)\.(weight|bias)$", r"multi_modal_projector.linear.\2"),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^(model\.)?image_newline$", "language_model.image_newline"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)

SHARDING = (  # canonical name -> the mesh axes of torch's axes (out, in)
    (r"multi_modal_projector\.linear(_1|_2)?\.weight$", P(BATCH_AXES, None)),  # the trained weights are small
    (r"(gate_proj|up_proj)\.weight$", P("tensor", "fsdp")),
    (r"(o_proj|down_proj)\.weight$", P("fsdp", "tensor")),
    (r"(embed_tokens|lm_head)\.weight$", P("tensor", "fsdp")),
    (r"norm\.weight$", P()),
    (r"(image_newline|linear(_1|_2)?\.bias)$", P()),
    *vit.SHARDING,  # q_proj, k_proj and v_proj of the decoder, too
)
