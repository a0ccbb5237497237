"""SmolVLM 1: SigLIP, pixel shuffle with one linear layer, LLaMA; transformers' Idefics3ForConditionalGeneration.

SmolVLM 2 has the same layout, but was trained on videos.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError
from data_pipeline.media.tiles import LongestSide
from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.chat_template import chat_prompt
from redvillm_jax.modules.config_fields import (
    COMMON,
    EPS,
    HEADS,
    LAYERS,
    PIXELS,
    REQUIRED,
    WIDTH,
    Fields,
    count,
    flag,
    mapping,
    nothing,
    number,
    only,
    read_fields,
    require,
)
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_processor_fields import LONGEST_EDGE, idefics3_transform, read_transform
from redvillm_jax.modules.image_splitting import AROUND, split_picture_places
from redvillm_jax.modules.layers import BATCH_AXES, Linear
from redvillm_jax.modules.llama import LlamaConfig, LlamaDecoder
from redvillm_jax.modules.llama_fields import LLAMA, ROPE, read_decoder
from redvillm_jax.modules.picture_places import Places
from redvillm_jax.modules.siglip import SiglipConfig, SiglipEncoder
from redvillm_jax.modules.siglip_fields import read_siglip, siglip_config
from redvillm_jax.modules.vit import SHARDING as VIT_SHARDING

PUBLISHED = "HuggingFaceTB/SmolVLM-256M-Instruct, SmolVLM-500M-Instruct or SmolVLM-Instruct (2.2B)"
MODEL_TYPES = ("idefics3", "smolvlm")  # in config.json

MEAN = STD = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of one SmolVLM. text, vision: the language model and the vision tower.

    scale_factor: the side of the regions of features that become one token each. longest_edge: the longer side to which
    the processor resizes a picture first, and image_splitting: whether it cuts pictures into tiles.
    """

    text: LlamaConfig
    vision: SiglipConfig
    scale_factor: int
    longest_edge: int
    image_splitting: bool = True

    image_size = property(lambda self: self.vision.image_size)
    grid = property(lambda self: self.vision.grid)
    feature_size = property(lambda self: self.vision.hidden_size)
    hidden_size = property(lambda self: self.text.hidden_size)
    vocab_size = property(lambda self: self.text.vocab_size)
    max_position_embeddings = property(lambda self: self.text.max_position_embeddings)
    num_attention_heads = property(lambda self: self.text.num_attention_heads)
    head_dim = property(lambda self: self.text.head_dim)
    window = property(lambda self: self.text.window)

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of one square picture."""
        return (self.grid[0] // self.scale_factor) * (self.grid[1] // self.scale_factor)

    @classmethod
    def from_published(cls, config: dict[str, Any], where: str = "config.json") -> "Config":
        """Reads a published config.json. where: the file, for messages.

        `longest_edge` and `image_splitting` are in another file (`read_image_processor`); without it they have the
        values of all published SmolVLMs. Raises UserError for an unknown field or an unsupported value.
        """
        own = read_fields(config, IDEFICS3, where)
        text = read_decoder(own["text_config"], where, "text_config.", {"llama": TEXT})
        vision = read_siglip(own["vision_config"], where, "vision_config.", VISION)
        tower = siglip_config(vision, layers_used=vision["num_hidden_layers"], post_layernorm=True)
        side, scale = tower.grid[0], own["scale_factor"]
        fits = f"a divisor of image_size / patch_size = {side}"
        require(side % scale == 0, where, f"scale_factor is {scale}, supported: {fits}")
        text = dataclasses.replace(text, tie_word_embeddings=own["tie_word_embeddings"])
        return cls(text, tower, scale, longest_edge=min(4 * tower.image_size, LONGEST_EDGE))


# ---- the fields of config.json and preprocessor_config.json

IDEFICS3: Fields = COMMON | {
    "model_type": only(*MODEL_TYPES),
    "text_config": mapping(REQUIRED),
    "vision_config": mapping(REQUIRED),
    "scale_factor": count(2, PIXELS),
    "tie_word_embeddings": flag(False),
    # the prompt places a picture's tokens by their names; vocab_size repeats the language model's
    **nothing("image_token_id", "image_seq_len", "vocab_size", "_pad_token_id"),
    **nothing("use_reentrant_checkpointing", "transformers.js_config"),
}
TEXT: Fields = LLAMA | {
    "qk_layer_norms": only(False),
    "rope_interleaved": only(False),
    "use_resampler": only(False),
    # the whole model's config ties the head; the rest belongs to the code of the original training
    **nothing("tie_word_embeddings", "is_llama_config", "neftune_noise_alpha", "perceiver_config"),
    **nothing("pixel_shuffle_factor", "transformers.js_config"),
}
VISION: Fields = COMMON | {
    "model_type": only("idefics3_vision", "idefics3", "smolvlm_vision"),
    "hidden_size": count(1152, WIDTH),
    "intermediate_size": count(3072, WIDTH),
    "num_hidden_layers": count(12, LAYERS),
    "num_attention_heads": count(16, HEADS),
    "num_channels": only(3),
    "image_size": count(224, PIXELS),
    "patch_size": count(32, PIXELS),
    "hidden_act": only("gelu_pytorch_tanh"),
    "layer_norm_eps": number(1e-6, EPS),
    **nothing("tie_word_embeddings", "max_image_size", "size", "use_base_siglip"),  # the processor has sizes of its own
}


FIELDS = {  # tables by their file or object
    "config.json": IDEFICS3,
    "`text_config`": TEXT,
    "`rope_parameters`, `rope_scaling`": ROPE,
    "`vision_config`": VISION,
    "preprocessor_config.json, processor_config.json of SmolVLM-256M": idefics3_transform(512, 64, MEAN, STD),
}


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config with the values of a preprocessor_config.json or processor_config.json.

    Raises UserError when the file asks for another transform.
    """
    table = idefics3_transform(config.image_size, config.num_image_tokens, MEAN, STD)
    said = read_transform(published, table, where)
    if "image_processor_type" not in said:  # a processor_config.json beside a preprocessor_config.json
        return config
    size, splits = said.get("size", {"longest_edge": 1456}), said.get("do_image_splitting", True)
    return dataclasses.replace(config, longest_edge=size["longest_edge"], image_splitting=splits)


def smol(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, theta: float, **other: Any
) -> LlamaConfig:
    """A SmolLM2 as SmolVLM has it, with heads of width 64."""
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        **{"head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 49280, "max_position_embeddings": 8192} | other,
    )


def tower(
    image_size: int, patch_size: int, width: int, intermediate_size: int, layers: int, heads: int
) -> SiglipConfig:
    """A SigLIP up to its last layer and the norm behind it."""
    return SiglipConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        layer_norm_eps=1e-6,
        layers_used=layers,
        post_layernorm=True,
    )


BASE_512 = tower(512, 16, 768, 3072, 12, 12)
SO400M = tower(384, 14, 1152, 4304, 27, 16)
SIZES = {
    "256m": Config(smol(576, 1536, 30, 9, 3, 1e5), BASE_512, 4, 2048),
    "500m": Config(smol(960, 2560, 32, 15, 5, 1e5), BASE_512, 4, 2048),
    "2.2b": Config(
        smol(2048, 8192, 24, 32, 32, 273768.0, vocab_size=49155, max_position_embeddings=16384), SO400M, 3, 1536
    ),
    "tiny": Config(
        smol(48, 96, 2, 4, 2, 1e4, head_dim=12, vocab_size=640, max_position_embeddings=2048),
        tower(32, 8, 48, 96, 2, 4),
        scale_factor=2,
        longest_edge=128,
    ),
}


def frame_fit(config: Config) -> str:
    """Returns the rule for frames: the processor's picture, which is not cut into tiles."""
    return f"lanczos={config.longest_edge}"


def picture_fit(config: Config) -> str | LongestSide:
    """Returns the cut of pictures into tiles, or the rule for frames where the processor does not cut."""
    return LongestSide(config.longest_edge) if config.image_splitting else frame_fit(config)


def picture_places(
    tokenizer: HfTokenizer, config: Config, tokens: int, grid: tuple[int, int] | None, size: tuple[int, int] | None
) -> Places:
    """Returns the tokens of the tiles and of the whole picture, with the text around them."""
    return split_picture_places(tokenizer, tokens, grid or (0, 0))


# ---- vision tower: names under `vision_tower.`

LANES = 8  # numbers that torch's float32 `arange` computes together on x86 CPUs


def position_ids(side: int) -> np.ndarray:
    """Returns the learned position of each patch of a square picture that fills the grid: (side * side,) int.

    Idefics3VisionEmbeddings compares fractions in float32, whose rounding moves some patches of some grids by one
    position (of 25 × 25, for example). On grids of 26, 27 and 32, which published models have, every patch has its own
    position. `torch.arange` rounds the first of eight numbers before it adds the steps to the others, and computes the
    last numbers, fewer than sixteen, one by one.
    """
    step = 1 / side
    numbers = np.arange(int(np.ceil((1 - step) / step)))
    first = np.where(numbers < len(numbers) // (2 * LANES) * (2 * LANES), numbers // LANES * LANES, numbers)
    rounded = (step + step * first).astype(np.float32).astype(np.float64)
    boundaries = (rounded + step * (numbers - first)).astype(np.float32)
    fractions = np.arange(side, dtype=np.float32) * (np.float32(1) / np.float32(side))
    places = np.searchsorted(boundaries, np.minimum(fractions, np.float32(1 - 1e-6)), side="right")
    return (places[:, None] * side + places).reshape(-1)


class Encoder(SiglipEncoder):
    """SigLIP's vision transformer: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        places = tuple(position_ids(config.grid[0]).tolist())
        super().__init__(dataclasses.replace(config.vision, position_ids=places), rngs=rngs)


# ---- projector: names under `connector.`


class Projector(nnx.Module):
    """Pixel shuffle and a linear layer: each scale × scale region of a picture's features becomes one token.

    A feature of a sequence (length,) goes through as a region of equal features. Source: Idefics3Connector.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.scale = config.scale_factor
        self.proj = Linear(config.feature_size * self.scale**2, config.hidden_size, bias=False, rngs=rngs)

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """How the tokens lie: one for each region of (rows, cols), or for each feature of (length,).

        Raises UserError for a grid that cannot be cut into regions.
        """
        if len(layout) == 1:
            return layout
        if any(side % self.scale for side in layout):
            rows, cols = layout
            raise UserError(
                f"the video representation gives {rows} × {cols} features, SmolVLM's projector needs multiples of "
                f"{self.scale}: change the representation's fields"
            )
        return tuple(side // self.scale for side in layout)

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        if len(layout) == 1:
            return self.proj(repeat(features, "b n d -> b n (region d)", region=self.scale**2))
        region = {"p1": self.scale, "p2": self.scale, "r": layout[0] // self.scale}
        return self.proj(rearrange(features, "b (r p1 c p2) d -> b (r c) (p1 p2 d)", **region))


# ---- language model: names under `language_model.`


class LLM(LlamaDecoder):
    """SmolLM2, a LLaMA, with its output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs)


# ---- names

PREFIX = {"encoder": "vision_tower.", "projector": "connector.", "llm": "language_model."}

CANONICAL = (
    (r"^model\.vision_model\.", "vision_tower."),
    (r"^model\.connector\.modality_projection\.", "connector."),
    (r"^model\.text_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
IGNORED = (r"\.inv_freq$", r"^language_model\.lm_head\.weight$")  # a buffer; a copy of a tied embedding

SHARDING = (  # canonical name -> the mesh axes of torch's axes (out, in)
    (r"connector\.proj\.weight$", P(BATCH_AXES, None)),  # the trained weights are small
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight$", P("tensor", "fsdp")),
    (r"(o_proj|down_proj)\.weight$", P("fsdp", "tensor")),
    (r"(embed_tokens|lm_head)\.weight$", P("tensor", "fsdp")),
    (r"(input_layernorm|post_attention_layernorm|norm)\.weight$", P()),
    *VIT_SHARDING,
)

# ---- text

Tokenizer = HfTokenizer


def prompt(
    tokenizer: Tokenizer,
    config: Config,
    question: str,
    answer: str | None,
    labels: str = "answer",
    *,
    picture: bool = False,
) -> tuple[Segment, Segment]:
    """Returns the tokens before and after a video or picture, by the folder's own chat template.

    A video stands as a picture that is not cut into tiles: `<|im_start|>User:<fake_token_around_image><global-img>`,
    the visual tokens, `<fake_token_around_image>{question}<end_of_utterance>\\nAssistant: {answer}<end_of_utterance>`.
    The tokens around a picture are among its places. The answer and the token behind it are supervised, with both
    values of `labels`. Source: Idefics3Processor.
    """
    around = {} if picture else {"opening": f"{AROUND}<global-img>", "closing": AROUND}
    return chat_prompt(tokenizer, question, answer, picture_token="<image>", **around)
