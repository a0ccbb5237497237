"""LLaVA v1 and v1.5: CLIP ViT-L/14, a linear or two-layer projector, LLaMA.

Module attributes have the names of transformers 5's files; `CANONICAL` maps the other published names to them.
"""

import dataclasses
import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.chat_template import chat_prompt
from redvillm_jax.modules.clip import ClipConfig, ClipEncoder, unused_shapes
from redvillm_jax.modules.clip_fields import CLIP, KNOWN_CLIPS, WHOLE_CLIP, read_clip
from redvillm_jax.modules.config_fields import (
    COMMON,
    LAYERS,
    READ,
    REQUIRED,
    THETA,
    WIDTH,
    Field,
    Fields,
    count,
    equal_to,
    flag,
    head_size,
    is_count,
    mapping,
    nothing,
    number,
    one_of,
    only,
    read_fields,
    require,
    shown,
    text,
)
from redvillm_jax.modules.hf_tokenizer import HfTokenizer
from redvillm_jax.modules.image_processor_fields import clip_transform, read_transform
from redvillm_jax.modules.layers import BATCH_AXES, Linear, gelu
from redvillm_jax.modules.llama import LlamaConfig, LlamaDecoder
from redvillm_jax.modules.llama_fields import LLAMA as ANY_LLAMA
from redvillm_jax.modules.llama_fields import MISTRAL as ANY_MISTRAL
from redvillm_jax.modules.llama_fields import model_table, read_llama

PUBLISHED = "mmaaz60/LLaVA-7B-Lightening-v1-1 with openai/clip-vit-large-patch14, or llava-hf/llava-1.5-7b-hf"

MODEL_TYPES = ("llava", "llava_llama")  # in config.json
VISION_FIELD = "mm_vision_tower"  # v1 is published without its CLIP; this field names it

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of one LLaVA; the defaults are LLaVA-1.5-7B."""

    image_size: int = 336
    patch_size: int = 14
    vision_hidden_size: int = 1024
    vision_intermediate_size: int = 4096
    vision_num_hidden_layers: int = 24
    vision_num_attention_heads: int = 16
    vision_layer_norm_eps: float = 1e-5
    vision_feature_layer: int = -2
    projector: str = "mlp2x_gelu"  # or "linear"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
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
    def window(self) -> None:
        """Every layer of the language model sees all keys before a query."""
        return None

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the language model."""
        return self.hidden_size // self.num_attention_heads

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

    @property
    def llama(self) -> LlamaConfig:
        """The language model."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
        )

    @classmethod
    def from_published(
        cls,
        config: dict[str, Any],
        vision_config: dict[str, Any] | None = None,
        where: str = "config.json",
        vision_where: str = "the CLIP's config.json",
    ) -> "Config":
        """Reads a published config.json: transformers' LlavaConfig (has `text_config`) or an original one.

        An original config names its CLIP in `mm_vision_tower`; the CLIP's fields come from `vision_config`, its
        config.json, or from the name if the CLIP is known. Omitted fields have the defaults of transformers' classes.
        where, vision_where: the files, for messages. Raises UserError for an unknown field or an unsupported value.
        """
        apart = None if vision_config is None else read_clip(vision_config, vision_where)
        if "text_config" in config:
            own = read_fields(config, TRANSFORMERS, where)
            llm = read_plain(own["text_config"], where, "text_config.")
            vision = read_clip(own["vision_config"], where, "vision_config.")
            own |= {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
            layer = "vision_feature_layer"
            same = apart is None or apart == vision
            require(same, vision_where, f"not the CLIP that vision_config of {where} describes")
        else:
            own = llm = read_plain(config, where, fields=ORIGINAL)
            vision = named_clip(own, where) if apart is None else apart
            check_clip(own, vision, where, vision_where)
            check_fit(own, where)
            layer = "mm_vision_select_layer"
        return cls(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_hidden_size=vision["hidden_size"],
            vision_intermediate_size=vision["intermediate_size"],
            vision_num_hidden_layers=vision["num_hidden_layers"],
            vision_num_attention_heads=vision["num_attention_heads"],
            vision_layer_norm_eps=vision["layer_norm_eps"],
            vision_feature_layer=from_the_end(own, layer, vision["num_hidden_layers"], where),
            projector=own["mm_projector_type"],
            vocab_size=llm["vocab_size"],
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"],
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            num_key_value_heads=llm["num_key_value_heads"],
            max_position_embeddings=llm["max_position_embeddings"],
            rms_norm_eps=llm["rms_norm_eps"],
            rope_theta=llm["rope_theta"],
            image_markers=own["mm_use_im_start_end"],
            system_prompt=own["system_prompt"],
        )


# ---- the fields of config.json

PLAIN: Fields = {  # a decoder without options, as in LLaVA 1 and 1.5
    "tie_word_embeddings": only(False),
    "head_dim": equal_to("hidden_size / num_attention_heads, or null"),
    "sliding_window": only(None),
}
LLAMA: Fields = ANY_LLAMA | PLAIN
MISTRAL: Fields = ANY_MISTRAL | PLAIN | {"sliding_window": only(None, default=4096)}
ROPE: Fields = {
    "rope_type": only("default"),
    "type": only("default"),
    "rope_theta": number(None, THETA),
    "partial_rotary_factor": only(1.0),
}
FEATURE_LAYER = Field(READ, "a whole number, one layer", lambda value: is_count(value, -LAYERS, LAYERS), -2)
OWN: Fields = {"system_prompt": text(SYSTEM_PROMPT)}  # a field of this project; without it the published value

TRANSFORMERS: Fields = (  # LlavaConfig's own fields
    COMMON
    | OWN
    | {
        "model_type": only(*MODEL_TYPES[:1]),
        "text_config": mapping(REQUIRED),
        "vision_config": mapping(KNOWN_CLIPS["clip-vit-large-patch14-336"]),
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": only("default"),
        "projector_hidden_act": only("gelu"),
        "multimodal_projector_bias": only(True),
        "tie_word_embeddings": only(False),
    }
    # this project's prompt places a picture's tokens; vocab_size repeats the language model's
    | nothing("image_token_index", "image_token_id", "image_seq_length", "ignore_index", "vocab_size")
    | nothing("mm_vision_tower")  # in exports of this project
)

ORIGINAL: Fields = (  # LLaVA's own repository: LLaMA's fields and these
    LLAMA
    | OWN
    | {
        "model_type": only(*MODEL_TYPES),
        "mm_vision_tower": text(""),
        "mm_hidden_size": count(None, WIDTH),
        "mm_vision_select_layer": FEATURE_LAYER,
        "mm_vision_select_feature": only("patch"),
        "mm_projector_type": one_of("linear", "mlp2x_gelu", default="linear"),
        "mm_use_im_start_end": flag(False),
        "image_aspect_ratio": one_of("square", "pad", None, default=None),
        "use_mm_proj": only(True),
        "mm_resampler_type": only(None),
        "mm_patch_merge_type": only("flat"),
        "sep_image_conv_front": only(False),
    }
    # settings of its training, and of other values of image_aspect_ratio
    | nothing("mm_use_im_patch_token", "image_grid_pinpoints", "pretrain_mm_mlp_adapter", "max_sequence_length")
    | nothing("tokenizer_model_max_length", "tokenizer_padding_side", "mm_projector_lr", "mm_vision_tower_lr")
    | nothing("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_vision_resampler")
    | nothing("unfreeze_mm_vision_tower", "tune_mm_vision_tower", "freeze_backbone")
)

FIELDS = {  # tables by their file or object
    "config.json, transformers' form": TRANSFORMERS,
    "`text_config`, a LLaMA": LLAMA,
    "`text_config`, a Mistral": MISTRAL,
    "`rope_parameters`, `rope_scaling`": ROPE,
    "`vision_config`, or config.json of a CLIP's vision tower": CLIP,
    "config.json of a whole CLIP": WHOLE_CLIP,
    "config.json, original form": ORIGINAL,
    "preprocessor_config.json, processor_config.json of LLaVA-1.5": clip_transform(336, 14, MEAN, STD, pads=True),
}


def read_plain(config: Any, where: str, path: str = "", fields: Fields | None = None) -> dict[str, Any]:
    """Reads a decoder without options. fields: its table, by default the table that `model_type` names."""
    table = fields or model_table(config, {"llama": LLAMA, "mistral": MISTRAL}, where, path)
    values = read_llama(config, where, path, table, ROPE)
    said, size = values["head_dim"], head_size(values, where, path)
    require(said == size, where, f"{path}head_dim is {said}, supported: hidden_size / num_attention_heads = {size}")
    return values


def named_clip(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of the CLIP that an original config names. Raises UserError for an unknown name."""
    name = values["mm_vision_tower"]
    known = KNOWN_CLIPS.get(name.rpartition("/")[2])
    supported = f"{' or '.join(KNOWN_CLIPS)} by name, any other CLIP with its folder given by --vision"
    require(known is not None, where, f"mm_vision_tower is {shown(name)}, supported: {supported}")
    return read_clip(known, where)


def check_clip(values: dict[str, Any], vision: dict[str, Any], where: str, vision_where: str) -> None:
    """Raises UserError when a CLIP has another size than the CLIP that an original config was trained with."""
    named = values["mm_vision_tower"]
    size = re.search(r"patch(\d+)(?:-(\d+))?$", named)  # openai/clip-vit-large-patch14-336
    wanted = {"hidden_size": values["mm_hidden_size"]}
    if size:
        wanted |= {"patch_size": int(size[1]), "image_size": int(size[2] or 224)}
    for key, value in wanted.items():
        trained = f"{where} was trained with {value}" + (f" ({named})" if size else "")
        require(value in (None, vision[key]), vision_where, f"a CLIP with {key} {vision[key]}, but {trained}")


def check_fit(values: dict[str, Any], where: str) -> None:
    """Raises UserError when the model was trained with another `picture_fit`."""
    fit, kind = values["image_aspect_ratio"], values["mm_projector_type"]
    supported = ("square", None) if kind == "linear" else ("pad",)
    said = f"image_aspect_ratio is {shown(fit)} (square and null crop pictures)"
    choices = " or ".join(map(shown, supported))
    require(fit in supported, where, f"{said}, supported with mm_projector_type {kind}: {choices}")


def from_the_end(values: dict[str, Any], name: str, num_layers: int, where: str) -> int:
    """Returns the feature layer as a negative index into the embeddings and layer outputs. Raises UserError."""
    layer = values[name]
    counted = layer if layer < 0 else layer - num_layers - 1
    supported = f"1 to {num_layers}, or -{num_layers} to -1"
    require(-num_layers <= counted <= -1, where, f"{name} is {layer}, supported: {supported}")
    return counted


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config; raises UserError when an image processor's file asks for another transform."""
    pads = picture_fit(config) == "pad"
    read_transform(published, clip_transform(config.image_size, config.patch_size, MEAN, STD, pads=pads), where)
    return config


SIZES = {
    "v1-7b": Config(
        image_size=224,
        projector="linear",
        vocab_size=32003,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        image_markers=True,
    ),
    "v1.5-7b": Config(),
    "v1.5-7b-hf": Config(vocab_size=32064),
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
        max_position_embeddings=2048,
        system_prompt="",
    ),
}


def frame_fit(config: Config) -> str:
    """Returns the rule for frames: Video-ChatGPT squashes them with torch's nearest neighbour."""
    return "nearest"


def picture_fit(config: Config) -> str:
    """Returns the way to a square picture: v1.5 pads, v1 crops as CLIP does."""
    return "crop" if config.projector == "linear" else "pad"


# ---- vision tower: names under `vision_tower.`


class Encoder(ClipEncoder):
    """CLIP's vision transformer: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.clip, rngs=rngs)


# ---- projector: names under `multi_modal_projector.`


class Projector(nnx.Module):
    """Maps every feature to one token: features (B, M, D) -> (B, M, K); the mask and the layout do not matter."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        if config.projector == "linear":
            self.linear = Linear(config.vision_hidden_size, config.hidden_size, rngs=rngs)
        else:
            self.linear_1 = Linear(config.vision_hidden_size, config.hidden_size, rngs=rngs)
            self.linear_2 = Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.kind = config.projector

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """How the tokens of a picture (rows, cols) or a sequence (length,) lie: one for each feature."""
        return layout

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        if self.kind == "linear":
            return self.linear(features)
        return self.linear_2(gelu(self.linear_1(features)))


# ---- language model: names under `language_model.`


class LLM(LlamaDecoder):
    """LLaMA with its output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.llama, rngs=rngs)


# ---- names

PREFIX = {"encoder": "vision_tower.", "projector": "multi_modal_projector.", "llm": "language_model."}

CANONICAL = (  # published name -> canonical name: original repository, transformers 4 and 5, a separate CLIP
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "vision_tower."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
    (r"^vision_model\.", "vision_tower."),
    (r"^(model\.mm_projector|multi_modal_projector)\.(weight|bias)$", r"multi_modal_projector.linear.\2"),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)

IGNORED = (  # buffers, and the text half of a full CLIP: kept in the base folder, never loaded
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


SHARDING = (  # canonical name -> the mesh axes of torch's axes (out, in)
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)\.weight$", P("tensor", "fsdp")),
    (r"(o_proj|out_proj|down_proj|fc2)\.weight$", P("fsdp", "tensor")),
    (r"(embed_tokens|lm_head)\.weight$", P("tensor", "fsdp")),
    (r"multi_modal_projector\.linear(_1|_2)?\.weight$", P(BATCH_AXES, None)),  # the trained weights are small
    (r"patch_embedding\.weight$", P()),
    (r"(class_embedding|position_embedding\.weight)$", P()),
    (r"(layer_?norm\d?|layrnorm|norm)\.(weight|bias)$", P()),
    (r"\.bias$", P()),
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
