"""LLaVA-OneVision of the single-image stage: SigLIP, a two-layer projector, Qwen2.

The features are the output of the last SigLIP layer that the files hold, without the norm behind it, as in
LlavaOnevisionForConditionalGeneration of transformers and in the original code. Module attributes have the names of
transformers 5's files. Checkpoints of the later stage, which was trained on videos, have the same classes and fields.
"""

import dataclasses
import re
from typing import Any

from flax import nnx

from data_pipeline.media.tiles import AnyResolution
from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.any_resolution import any_resolution_places
from redvillm_jax.modules.chat_template import chat_prompt
from redvillm_jax.modules.config_fields import READ, Field, Fields, mapping, nothing, only, read_fields
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_processor_fields import any_resolution_transform, read_transform
from redvillm_jax.modules.llama import LlamaConfig
from redvillm_jax.modules.llama_fields import QWEN2, ROPE
from redvillm_jax.modules.llava_fields import SHARED, TILED, Pinpoints, from_the_end, read_pinpoints, read_text
from redvillm_jax.modules.llava_parts import CANONICAL, LLM, PREFIX, SHARDING, Projector
from redvillm_jax.modules.picture_places import Places
from redvillm_jax.modules.siglip import SiglipConfig, SiglipEncoder, unused_shapes
from redvillm_jax.modules.siglip_fields import SIGLIP, read_siglip, siglip_config

__all__ = ["CANONICAL", "LLM", "PREFIX", "SHARDING", "Projector"]  # of the contract, beside what this file defines

PUBLISHED = "llava-hf/llava-onevision-qwen2-0.5b-si-hf or llava-hf/llava-onevision-qwen2-7b-si-hf"

MODEL_TYPES = ("llava_onevision",)  # in config.json

MEAN = STD = (0.5, 0.5, 0.5)

SO400M = {  # the SigLIP of files that omit it: so400m/14 at 384 pixels, without its last layer
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "vision_use_head": False,
}
SIDES = [384 * n for n in range(1, 7)]
ALL_PINPOINTS = [[height, width] for height in SIDES for width in SIDES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LlamaConfig):
    """Sizes and switches of one LLaVA-OneVision: those of its language model, and these."""

    vision: SiglipConfig
    image_grid_pinpoints: Pinpoints  # the resolutions of pictures in tiles
    vision_aspect_ratio: str = "anyres_max_9"  # more tiles than this number are pooled

    projector = "mlp2x_gelu"
    image_newline = True

    @property
    def image_size(self) -> int:
        """Width and height of a picture in pixels."""
        return self.vision.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's patches, in raster order."""
        return self.vision.grid

    @property
    def num_patches(self) -> int:
        return self.vision.num_patches

    @property
    def feature_size(self) -> int:
        """Width of a picture's features."""
        return self.vision.hidden_size

    @classmethod
    def from_published(cls, config: dict[str, Any], where: str = "config.json") -> "Config":
        """Reads a published config.json, transformers' LlavaOnevisionConfig.

        Omitted fields have the defaults of transformers' classes. where: the file, for messages. Raises UserError for
        an unknown field or an unsupported value.
        """
        own = read_fields(config, ONEVISION, where)
        vision = read_siglip(own["vision_config"], where, "vision_config.")
        layers = vision["num_hidden_layers"]
        return cls(
            **vars(read_text(own, where)),
            vision=siglip_config(
                vision,
                layers_used=layers + 1 + from_the_end(own, "vision_feature_layer", layers, where),
                post_layernorm=False,
            ),
            image_grid_pinpoints=read_pinpoints(
                own["image_grid_pinpoints"], ALL_PINPOINTS, vision["image_size"], where
            ),
            vision_aspect_ratio=own["vision_aspect_ratio"],
        )


def is_aspect_ratio(value: Any) -> bool:
    """Returns whether a value names the way of a tiled picture with a largest number of tiles."""
    return isinstance(value, str) and re.fullmatch(r"anyres_max_[1-9]\d{0,3}", value) is not None


ONEVISION: Fields = (
    SHARED
    | TILED
    | {
        "model_type": only("llava_onevision"),
        "vision_config": mapping(SO400M),
        "vision_feature_layer": dataclasses.replace(SHARED["vision_feature_layer"], default=-1),
        "vision_feature_select_strategy": only("full"),
        "vision_aspect_ratio": Field(READ, "anyres_max_N", is_aspect_ratio, "anyres_max_9"),
    }
    | nothing("video_token_index", "video_token_id")  # each frame of a video is a picture here
)

FIELDS = {  # tables by their file or object
    "config.json": ONEVISION,
    "`text_config`": QWEN2,
    "`rope_parameters`, `rope_scaling`": ROPE,
    "`vision_config`": SIGLIP,
    "preprocessor_config.json, processor_config.json": any_resolution_transform(
        384, 14, MEAN, STD, pinpoints=ALL_PINPOINTS, strategy="full", aspect_ratio="anyres_max_9"
    ),
}


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config; raises UserError when an image processor's file asks for another transform."""
    table = any_resolution_transform(
        config.image_size,
        config.vision.patch_size,
        MEAN,
        STD,
        pinpoints=config.image_grid_pinpoints,
        strategy="full",
        aspect_ratio=config.vision_aspect_ratio,
    )
    read_transform(published, table, where)
    return config


QWEN2_7B = {
    "vocab_size": 152128,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qkv_bias": True,
}
QWEN2_05B = QWEN2_7B | {
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
PICTURES = {
    "vision": SiglipConfig(**SO400M, layer_norm_eps=1e-6, layers_used=26, post_layernorm=False),
    "image_grid_pinpoints": tuple(map(tuple, ALL_PINPOINTS)),
}

SIZES = {
    "si-7b": Config(**QWEN2_7B, **PICTURES),
    "si-0.5b": Config(**QWEN2_05B, **PICTURES),
    "tiny": Config(
        vocab_size=640,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
        tie_word_embeddings=True,
        vision=SiglipConfig(
            image_size=32,
            patch_size=7,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            layer_norm_eps=1e-6,
            layers_used=2,
            post_layernorm=False,
        ),
        image_grid_pinpoints=((32, 32), (32, 64), (64, 32), (64, 64)),
    ),
}


def frame_fit(config: Config) -> str:
    """Returns the rule for frames: the whole picture, squashed with PIL's bicubic filter."""
    return "bicubic"


def picture_fit(config: Config) -> AnyResolution:
    """Returns the cut of pictures into tiles."""
    return AnyResolution(config.image_grid_pinpoints)


def picture_places(
    tokenizer: HfTokenizer, config: Config, tokens: int, grid: tuple[int, int], size: tuple[int, int]
) -> Places:
    """Returns the tokens of the whole picture and of its tiles; many tiles have fewer tokens each."""
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return any_resolution_places(config.grid, grid, size, most)


class Encoder(SiglipEncoder):
    """SigLIP's vision transformer: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.vision, rngs=rngs)


IGNORED = (r"^language_model\.lm_head\.weight$",)  # a copy of a tied embedding table


def unused(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns canonical names and shapes of tensors that never run: SigLIP's layers above the features, norm, head."""
    return unused_shapes(config.vision, PREFIX["encoder"])


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
    """Returns the tokens before and after the visual tokens, by the folder's chat template.

    The answer and the token behind it are supervised, with both values of `labels`.
    """
    return chat_prompt(tokenizer, question, answer, picture_token="<image>")
