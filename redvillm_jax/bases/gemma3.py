"""Gemma 3 and MedGemma: SigLIP so400m/14-896, a pooling projector, a decoder whose pictures see both directions.

Module attributes have the names of transformers' Gemma3ForConditionalGeneration in the files of its version 4;
`CANONICAL` maps version 5's names to them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules import siglip, vit
from redvillm_jax.modules.chat_template import chat_prompt
from redvillm_jax.modules.config_fields import (
    COMMON,
    REQUIRED,
    WIDTH,
    Fields,
    count,
    mapping,
    nothing,
    only,
    read_fields,
    require,
)
from redvillm_jax.modules.gemma3 import Gemma3Decoder, Gemma3RMSNorm, Gemma3TextConfig, Rope
from redvillm_jax.modules.gemma3_fields import GEMMA3_TEXT, ROPES, read_gemma3_text
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_processor_fields import gemma3_transform, read_transform
from redvillm_jax.modules.layers import BATCH_AXES, product
from redvillm_jax.modules.llama import RopeScaling
from redvillm_jax.modules.llama_fields import ROPE
from redvillm_jax.modules.siglip import SiglipConfig, SiglipEncoder
from redvillm_jax.modules.siglip_fields import SIGLIP, read_siglip, siglip_config

PUBLISHED = "google/gemma-3-4b-it, google/gemma-3-12b-it or google/medgemma-4b-it"

MODEL_TYPES = ("gemma3",)  # in config.json

MEAN = STD = (0.5, 0.5, 0.5)
BOTH_DIRECTIONS = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of one Gemma 3."""

    text: Gemma3TextConfig
    siglip: SiglipConfig
    mm_tokens_per_image: int = 256

    image_size = property(lambda self: self.siglip.image_size)
    grid = property(lambda self: self.siglip.grid)
    feature_size = property(lambda self: self.siglip.hidden_size)
    hidden_size = property(lambda self: self.text.hidden_size)
    vocab_size = property(lambda self: self.text.vocab_size)
    max_position_embeddings = property(lambda self: self.text.max_position_embeddings)
    num_attention_heads = property(lambda self: self.text.num_attention_heads)
    head_dim = property(lambda self: self.text.head_dim)
    window = property(lambda self: self.text.window)

    @property
    def pool(self) -> int:
        """The side of the square of patches that make one token."""
        return self.grid[0] // math.isqrt(self.mm_tokens_per_image)

    @classmethod
    def from_published(cls, config: dict[str, Any], where: str = "config.json") -> "Config":
        """Reads a published config.json, transformers' Gemma3Config; omitted fields have the defaults of its classes.

        Raises UserError for an unknown field or an unsupported value.
        """
        own = read_fields(config, GEMMA3, where)
        vision = read_siglip(own["vision_config"], where, "vision_config.")
        tower = siglip_config(vision, layers_used=vision["num_hidden_layers"], post_layernorm=True)
        tokens, side = own["mm_tokens_per_image"], tower.grid[0]
        square = f"the square of a divisor of the {side} patches on a side"
        fits = math.isqrt(tokens) ** 2 == tokens and side % math.isqrt(tokens) == 0
        require(fits, where, f"mm_tokens_per_image is {tokens}, supported: {square}")
        return cls(read_gemma3_text(own["text_config"], where, "text_config."), tower, tokens)


# ---- the fields of config.json

GEMMA3: Fields = (
    COMMON
    | {
        "model_type": only(*MODEL_TYPES),
        "text_config": mapping(REQUIRED),
        "vision_config": mapping(REQUIRED),
        "mm_tokens_per_image": count(256, WIDTH),
        "tie_word_embeddings": only(True),
    }
    # the tokenizer's own names place a picture's tokens
    | nothing("image_token_index", "image_token_id", "boi_token_index", "boi_token_id", "eoi_token_index")
    | nothing("eoi_token_id")
)

FIELDS = {  # tables by their file or object
    "config.json": GEMMA3,
    "`text_config`": GEMMA3_TEXT,
    "`rope_parameters`": ROPES,
    "`rope_scaling`, and the objects in `rope_parameters`": ROPE,
    "`vision_config`": SIGLIP,
    "preprocessor_config.json, processor_config.json": gemma3_transform(896, 256, MEAN, STD),
}


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config; raises UserError when an image processor's file asks for another transform."""
    read_transform(published, gemma3_transform(config.image_size, config.mm_tokens_per_image, MEAN, STD), where)
    return config


def frame_fit(config: Config) -> str:
    """Returns the rule for frames and pictures: the whole picture squashed, as without pan and scan."""
    return "bilinear"


def layer_kinds(num_layers: int, every: int = 6) -> tuple[str, ...]:
    """Returns the kinds of layers: each `every`-th is full."""
    return tuple("window" if (i + 1) % every else "full" for i in range(num_layers))


SO400M = SiglipConfig(
    image_size=896,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    layer_norm_eps=1e-6,
    layers_used=27,
    post_layernorm=True,
)
GEMMA_3_4B = Gemma3TextConfig(
    vocab_size=262208,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=34,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=256,
    layer_kinds=layer_kinds(34),
    sliding_window=1024,
    full_rope=Rope(1e6, RopeScaling("linear", 8.0)),
    window_rope=Rope(1e4),
)
GEMMA_3_12B = dataclasses.replace(
    GEMMA_3_4B,
    hidden_size=3840,
    intermediate_size=15360,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=8,
    layer_kinds=layer_kinds(48),
)
SIZES = {
    "4b": Config(GEMMA_3_4B, SO400M),
    "12b": Config(GEMMA_3_12B, SO400M),
    "tiny": Config(
        dataclasses.replace(
            GEMMA_3_4B,
            vocab_size=768,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=2048,
            query_pre_attn_scalar=20,
            layer_kinds=layer_kinds(3, every=2),
            sliding_window=6,
        ),
        dataclasses.replace(
            SO400M,
            image_size=32,
            patch_size=4,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            layers_used=2,
        ),
        mm_tokens_per_image=16,
    ),
}

# ---- vision tower: names under `vision_tower.`


class Encoder(SiglipEncoder):
    """SigLIP with its last norm: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.siglip, rngs=rngs)


# ---- projector: names under `multi_modal_projector.`


class Projector(nnx.Module):
    """The mean of each square of patches, a norm, and a matrix: features (B, M, D) -> tokens (B, N, K).

    A square at the edge of a grid may be smaller. Each feature of a sequence is a token, as a square of equal features
    is. The mask does not matter.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        shape = config.feature_size, config.hidden_size
        self.mm_input_projection_weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))  # (in, out)
        self.mm_soft_emb_norm = Gemma3RMSNorm(config.feature_size, eps=config.siglip.layer_norm_eps)
        self.pool = config.pool

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """How the tokens of a picture (rows, cols) or a sequence (length,) lie."""
        return layout if len(layout) == 1 else tuple(-(-size // self.pool) for size in layout)

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        if len(layout) == 2:
            features = mean_of_squares(features, layout, self.pool)
        weight = self.mm_input_projection_weight[...].astype(features.dtype)
        return product("...i,io->...o", self.mm_soft_emb_norm(features), weight)


def mean_of_squares(features: jax.Array, layout: tuple[int, int], side: int) -> jax.Array:
    """Returns the means of squares of `side` * `side` features; those at the far edges may be smaller.

    features: (B, rows * cols, D) in raster order -> (B, N, D).
    """
    rest = [-size % side for size in layout]
    x = rearrange(features, "b (r c) d -> b r c d", r=layout[0])
    x = jnp.pad(x, ((0, 0), *((0, more) for more in rest), (0, 0)))
    sums = reduce(x, "b (r p) (c q) d -> b (r c) d", "sum", p=side, q=side)
    rows, cols = (np.minimum(side, size - np.arange(0, size, side)) for size in layout)
    return sums / jnp.asarray(np.outer(rows, cols).reshape(-1, 1), sums.dtype)


# ---- language model: names under `language_model.`


class LLM(Gemma3Decoder):
    """Gemma 3's decoder with its tied output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs)


# ---- names

PREFIX = {"encoder": "vision_tower.", "projector": "multi_modal_projector.", "llm": "language_model."}

CANONICAL = (  # published name -> canonical name: transformers 4 and 5
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
IGNORED = (r"^language_model\.lm_head\.weight$",)  # a copy of the tied embedding table


def unused(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns canonical names and shapes of tensors that never run; a published model may lack them."""
    return siglip.unused_shapes(config.siglip, PREFIX["encoder"])


SHARDING = (  # canonical name -> the mesh axes of torch's axes (out, in)
    (r"multi_modal_projector\.mm_input_projection_weight$", P(None, BATCH_AXES)),  # (in, out)
    (r"(gate_proj|up_proj|embed_tokens)\.weight$", P("tensor", "fsdp")),
    (r"(o_proj|down_proj)\.weight$", P("fsdp", "tensor")),
    (r"position_embedding\.weight$", P("fsdp", None)),  # 4096 positions
    (r"norm\.weight$", P()),
    *vit.SHARDING,  # and the decoder's queries, keys and values
)

# ---- text


Tokenizer = HfTokenizer
PICTURE = {  # what the template writes for a picture, what stands for its tokens, and the processor's text around them
    "picture_token": "<start_of_image>",
    "visual_token": "<image_soft_token>",
    "opening": "\n\n<start_of_image>",
    "closing": "<end_of_image>\n\n",
}


def prompt(
    tokenizer: Tokenizer,
    config: Config,
    question: str,
    answer: str | None,
    labels: str = "answer",
    *,
    picture: bool = False,
) -> tuple[Segment, Segment]:
    """Returns the tokens before and after the visual tokens by the folder's own template, for videos and pictures.

    The answer and the token that ends its turn are supervised, with both values of `labels`.
    """
    return chat_prompt(tokenizer, question, answer, **PICTURE)
