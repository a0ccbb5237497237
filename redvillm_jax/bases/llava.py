"""LLaVA v1, v1.5 and NeXT (1.6): CLIP ViT-L/14, a linear or two-layer projector, LLaMA, Mistral or Qwen2.

Module attributes have the names of transformers 5's files; `CANONICAL` maps the other published names to them.
"""

import dataclasses
from typing import Any

from flax import nnx

from data_pipeline.media.tiles import AnyResolution
from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.any_resolution import any_resolution_places
from redvillm_jax.modules.chat_template import FILES, chat_prompt
from redvillm_jax.modules.clip import ClipConfig, ClipEncoder, unused_shapes
from redvillm_jax.modules.clip_fields import CLIP, WHOLE_CLIP, read_clip
from redvillm_jax.modules.config_fields import read_fields, require
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_processor_fields import any_resolution_transform, clip_transform, read_transform
from redvillm_jax.modules.llama import LlamaConfig
from redvillm_jax.modules.llama_fields import LLAMA, MISTRAL, QWEN2, ROPE
from redvillm_jax.modules.llava_fields import (
    LLAVA,
    NEXT,
    NEXT_PINPOINTS,
    ORIGINAL,
    SYSTEM_PROMPT,
    Pinpoints,
    check_clip,
    check_fit,
    from_the_end,
    named_clip,
    original_pinpoints,
    read_original,
    read_pinpoints,
    read_text,
)
from redvillm_jax.modules.llava_parts import CANONICAL, LLM, PREFIX, SHARDING, Projector
from redvillm_jax.modules.picture_places import Places, whole_picture

__all__ = ["CANONICAL", "LLM", "PREFIX", "SHARDING", "Projector"]  # of the contract, beside what this file defines

PUBLISHED = (
    "llava-hf/llava-v1.6-mistral-7b-hf, llava-hf/llava-1.5-7b-hf, "
    "or mmaaz60/LLaVA-7B-Lightening-v1-1 with openai/clip-vit-large-patch14"
)

MODEL_TYPES = ("llava", "llava_llama", "llava_mistral", "llava_next")  # in config.json
VISION_FIELD = "mm_vision_tower"  # v1 is published without its CLIP; this field names it

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LlamaConfig):
    """Sizes and switches of one LLaVA: those of its language model, and these; the defaults have CLIP-L/14-336."""

    image_size: int = 336
    patch_size: int = 14
    vision_hidden_size: int = 1024
    vision_intermediate_size: int = 4096
    vision_num_hidden_layers: int = 24
    vision_num_attention_heads: int = 16
    vision_layer_norm_eps: float = 1e-5
    vision_feature_layer: int = -2
    projector: str = "mlp2x_gelu"  # or "linear"
    image_newline: bool = False  # the weights have the token behind every row of a tiled picture
    image_grid_pinpoints: Pinpoints = ()  # the resolutions of pictures in tiles; (): pictures are one square
    image_markers: bool = False  # <im_start> and <im_end> around the visual tokens (v1)
    system_prompt: str = SYSTEM_PROMPT

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's patches, in raster order."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def feature_size(self) -> int:
        """Width of a picture's features."""
        return self.vision_hidden_size

    @property
    def vision_layers_used(self) -> int:
        """The number of CLIP layers that run; with feature layer -2 the last one does not."""
        return self.vision_num_hidden_layers + 1 + self.vision_feature_layer

    @property
    def clip(self) -> ClipConfig:
        """The vision tower."""
        return ClipConfig(
            num_patches=self.num_patches,
            patch_size=self.patch_size,
            hidden_size=self.vision_hidden_size,
            intermediate_size=self.vision_intermediate_size,
            num_hidden_layers=self.vision_num_hidden_layers,
            num_attention_heads=self.vision_num_attention_heads,
            layer_norm_eps=self.vision_layer_norm_eps,
            layers_used=self.vision_layers_used,
        )

    @classmethod
    def from_published(
        cls,
        config: dict[str, Any],
        vision_config: dict[str, Any] | None = None,
        where: str = "config.json",
        vision_where: str = "the CLIP's config.json",
    ) -> "Config":
        """Reads a published config.json: transformers' LlavaConfig or LlavaNextConfig (has `text_config`), or original.

        An original config names its CLIP in `mm_vision_tower`; the CLIP's fields come from `vision_config`, its
        config.json, or from the name if the CLIP is known. Omitted fields have the defaults of transformers' classes.
        where, vision_where: the files, for messages. Raises UserError for an unknown field or an unsupported value.
        """
        apart = None if vision_config is None else read_clip(vision_config, vision_where)
        if "text_config" in config:
            tiled = config.get("model_type") == "llava_next"
            own = read_fields(config, NEXT if tiled else LLAVA, where)
            decoder = read_text(own, where)
            vision = read_clip(own["vision_config"], where, "vision_config.")
            same = apart is None or apart == vision
            require(same, vision_where, f"not the CLIP that vision_config of {where} describes")
            own |= {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
            layer, newline, pinpoints = "vision_feature_layer", tiled, ()
            if tiled:
                pairs = own["image_grid_pinpoints"]
                pinpoints = read_pinpoints(pairs, NEXT_PINPOINTS, vision["image_size"], where)
        else:
            own, decoder = read_original(config, where)
            vision = named_clip(own, where) if apart is None else apart
            check_clip(own, vision, where, vision_where)
            check_fit(own, where)
            layer, newline = "mm_vision_select_layer", own["mm_patch_merge_type"] == "spatial_unpad"
            pinpoints = original_pinpoints(own, vision["image_size"], where)
        return cls(
            **vars(decoder),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_hidden_size=vision["hidden_size"],
            vision_intermediate_size=vision["intermediate_size"],
            vision_num_hidden_layers=vision["num_hidden_layers"],
            vision_num_attention_heads=vision["num_attention_heads"],
            vision_layer_norm_eps=vision["layer_norm_eps"],
            vision_feature_layer=from_the_end(own, layer, vision["num_hidden_layers"], where),
            projector=own["mm_projector_type"],
            image_newline=newline,
            image_grid_pinpoints=pinpoints,
            image_markers=own["mm_use_im_start_end"],
            system_prompt=own["system_prompt"],
        )


def identity(config: Config) -> dict[str, Any]:
    """Returns what the fingerprint of a base says of its config.

    Fields that LLaVA v1 and v1.5 do not need are left out where they have the values of those models, so that a base
    of theirs has one fingerprint, whenever it was made.
    """
    plain = {f.name: f.default for f in dataclasses.fields(LlamaConfig) if f.default is not dataclasses.MISSING}
    plain |= {"image_newline": False, "image_grid_pinpoints": ()}
    plain |= {"head_dim": config.hidden_size // config.num_attention_heads}
    own = dataclasses.asdict(config)
    return {name: value for name, value in own.items() if name not in plain or value != plain[name]}


FIELDS = {  # tables by their file or object
    "config.json, transformers' LlavaConfig": LLAVA,
    "config.json, transformers' LlavaNextConfig": NEXT,
    "config.json, original form, beside the fields of its language model": ORIGINAL,
    "`text_config`, a LLaMA": LLAMA,
    "`text_config`, a Mistral": MISTRAL,
    "`text_config`, a Qwen2": QWEN2,
    "`rope_parameters`, `rope_scaling`": ROPE,
    "`vision_config`, or config.json of a CLIP's vision tower": CLIP,
    "config.json of a whole CLIP": WHOLE_CLIP,
    "preprocessor_config.json, processor_config.json of LLaVA-1.5": clip_transform(336, 14, MEAN, STD, pads=True),
    "preprocessor_config.json, processor_config.json of LLaVA-NeXT": any_resolution_transform(
        336, 14, MEAN, STD, pinpoints=NEXT_PINPOINTS, strategy="default"
    ),
}


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config; raises UserError when an image processor's file asks for another transform.

    The file of a separate CLIP describes what the original LLaVA-NeXT does with each tile.
    """
    sizes = config.image_size, config.patch_size, MEAN, STD
    kind = published.get("image_processor_type", published.get("feature_extractor_type"))
    if config.image_grid_pinpoints and not str(kind).startswith("CLIP"):
        table = any_resolution_transform(*sizes, pinpoints=config.image_grid_pinpoints, strategy="default")
    else:
        table = clip_transform(*sizes, pads=picture_fit(config) != "crop")
    read_transform(published, table, where)
    return config


LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MISTRAL_7B = LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
LLAMA3_8B = MISTRAL_7B | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
TILED = {"image_newline": True, "image_grid_pinpoints": tuple(map(tuple, NEXT_PINPOINTS))}

SIZES = {
    "v1-7b": Config(
        **LLAMA_7B | {"vocab_size": 32003, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        image_size=224,
        projector="linear",
        image_markers=True,
    ),
    "v1.5-7b": Config(**LLAMA_7B),
    "v1.5-7b-hf": Config(**LLAMA_7B | {"vocab_size": 32064}),
    "next-mistral-7b": Config(**MISTRAL_7B | {"vocab_size": 32064}, **TILED),
    "next-vicuna-7b": Config(**LLAMA_7B | {"vocab_size": 32064}, **TILED),
    "next-llama3-8b": Config(**LLAMA3_8B | {"vocab_size": 128320}, **TILED),
    "tiny": Config(
        image_size=32,
        patch_size=8,
        vision_hidden_size=96,
        vision_intermediate_size=384,
        vision_num_hidden_layers=4,
        vision_num_attention_heads=4,
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        system_prompt="",
    ),
}


def frame_fit(config: Config) -> str:
    """Returns the rule for frames: NeXT squashes pictures; Video-ChatGPT took the nearest pixels for LLaVA v1."""
    return "bicubic" if config.image_grid_pinpoints else "nearest"


def picture_fit(config: Config) -> str | AnyResolution:
    """Returns the way to a square picture, v1.5 pads, v1 crops as CLIP does; or NeXT's cut into tiles."""
    if config.image_grid_pinpoints:
        return AnyResolution(config.image_grid_pinpoints)
    return "crop" if config.projector == "linear" else "pad"


def picture_places(
    tokenizer: HfTokenizer,
    config: Config,
    tokens: int,
    grid: tuple[int, int] | None,
    size: tuple[int, int] | None,
) -> Places:
    """Returns the tokens of a square picture, or of NeXT's whole picture and of its tiles."""
    if grid is None or size is None:
        return whole_picture(tokenizer, config, tokens, grid, size)
    return any_resolution_places(config.grid, grid, size)


class Encoder(ClipEncoder):
    """CLIP's vision transformer: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.clip, rngs=rngs)


IGNORED = (  # buffers, a copy of a tied embedding table, and the text half of a full CLIP
    r"^language_model\.lm_head\.weight$",
    r"\.inv_freq$",
    r"\.position_ids$",
    r"^text_model\.",
    r"^(logit_scale|text_projection\.weight|visual_projection\.weight)$",
)


def unused(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns canonical names and shapes of tensors that never run; a published model may lack them.

    They are CLIP's layers above the feature layer and its post-norm.
    """
    return unused_shapes(config.clip, PREFIX["encoder"])


# ---- text


Tokenizer = HfTokenizer


def check_tokenizer(tokenizer: Tokenizer, config: Config, published: dict[str, Any], where: str) -> None:
    """Raises UserError for a folder without a chat template whose language model is not the LLaMA of v1 and v1.5."""
    kind = published.get("text_config", published).get("model_type", "llama")
    other = any(name in kind for name in ("mistral", "qwen"))
    supported = f"LLaMA, or a chat template in {', '.join(FILES)}; copy the model's own files"
    require(tokenizer.template is not None or not other, where, f"its language model is {kind}, supported: {supported}")


def prompt(
    tokenizer: Tokenizer,
    config: Config,
    question: str,
    answer: str | None,
    labels: str = "answer",
    *,
    picture: bool = False,
) -> tuple[Segment, Segment]:
    """Returns the tokens before and after the visual tokens, for videos and pictures alike.

    A folder's own chat template goes first. Without one, LLaVA-1.5 has
    `{system} USER: <video>\\n{question} ASSISTANT: {answer}</s>`; the blank before the video is a token. v1:
    `{system} USER:<im_start><video><im_end>{question} ASSISTANT: {answer}</s>`; the tokenizer of its training drops
    blanks and line breaks beside its markers. Without an answer the second part ends at the start of the answer. The
    answer and the token behind it are supervised, with both values of `labels`, because LLaVA's own fine-tuning
    supervises the same.
    """
    if tokenizer.template is not None:
        return chat_prompt(tokenizer, question, answer, picture_token="<image>")
    system = f"{config.system_prompt} USER:" if config.system_prompt else "USER:"
    if config.image_markers:
        start, end = ([tokenizer.special(marker)] for marker in ("<im_start>", "<im_end>"))
        before = [*tokenizer.encode(system), *start]
        after = [*end, *tokenizer.encode(f"{question.lstrip()} ASSISTANT:")]
    else:
        before = tokenizer.encode(f"{system} ")
        after = tokenizer.encode(f"\n{question} ASSISTANT:")
    reply = [] if answer is None else [*tokenizer.encode(answer), tokenizer.eos_id]
    return [(i, False) for i in (tokenizer.bos_id, *before)], [(i, False) for i in after] + [(i, True) for i in reply]
