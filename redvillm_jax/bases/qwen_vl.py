"""Qwen-VL and Qwen-VL-Chat: ViT-bigG, a resampler of 256 queries, the Qwen language model.

Module attributes have the published names, so `CANONICAL` is not needed.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.config_fields import (
    COMMON,
    HEADS,
    LAYERS,
    PIXELS,
    POSITIONS,
    REQUIRED,
    THETA,
    VOCABULARY,
    WIDTH,
    Fields,
    check_multiple,
    count,
    equal_to,
    flag,
    head_size,
    mapping,
    nothing,
    number,
    only,
    read_fields,
    require,
    text,
)
from redvillm_jax.modules.config_fields import (
    EPS as MOST_EPS,
)
from redvillm_jax.modules.layers import BATCH_AXES, LayerNorm, product
from redvillm_jax.modules.open_clip import OpenClipConfig, OpenClipEncoder
from redvillm_jax.modules.qwen import QwenConfig, QwenDecoder
from redvillm_jax.modules.qwen_tokenizer import QwenTokenizer
from redvillm_jax.modules.resampler import EPS, Resampler, bicubic_weights, grid_positions, interpolate

PUBLISHED = "Qwen/Qwen-VL-Chat"

MODEL_TYPES = ("qwen",)  # in config.json

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

SYSTEM_PROMPT = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of one Qwen-VL; the defaults are Qwen-VL-Chat."""

    image_size: int = 448
    patch_size: int = 14
    vision_hidden_size: int = 1664
    vision_intermediate_size: int = 8192
    vision_num_hidden_layers: int = 48
    vision_num_attention_heads: int = 16
    n_queries: int = 256  # also the number of the vision transformer's learned positions
    resampler_num_attention_heads: int = 32
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    seq_length: int = 2048  # the trained length; dynamic NTK and logn act beyond it
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
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
    def vision(self) -> OpenClipConfig:
        """The vision tower."""
        return OpenClipConfig(
            patch_size=self.patch_size,
            num_positions=self.n_queries,
            hidden_size=self.vision_hidden_size,
            intermediate_size=self.vision_intermediate_size,
            num_hidden_layers=self.vision_num_hidden_layers,
            num_attention_heads=self.vision_num_attention_heads,
        )

    @property
    def decoder(self) -> QwenConfig:
        """The language model."""
        return QwenConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(QwenConfig)})

    @classmethod
    def from_published(
        cls,
        config: dict[str, Any],
        where: str = "config.json",
    ) -> "Config":
        """Reads a published config.json; the vision tower's fields are in its `visual`.

        `visual.n_queries` and `visual.n_heads` (of the resampler) are optional; the published code fixes them to 256
        and output_dim / 128. `intermediate_size` counts both branches of the gated MLP; the width is half of it. where:
        the file, for messages. Raises UserError for an unknown field or an unsupported value, and if visual tokens do
        not have the language model's width.
        """
        llm = read_fields(config, QWEN, where)
        visual = read_fields(llm["visual"], VISUAL, where, "visual.")
        check_numbers(llm, visual, where)
        return cls(
            image_size=visual["image_size"],
            patch_size=visual["patch_size"],
            vision_hidden_size=visual["width"],
            vision_intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
            vision_num_hidden_layers=visual["layers"],
            vision_num_attention_heads=visual["heads"],
            n_queries=visual["n_queries"],
            resampler_num_attention_heads=visual["n_heads"] or visual["output_dim"] // 128,
            vocab_size=llm["vocab_size"],
            hidden_size=llm["hidden_size"],
            intermediate_size=llm["intermediate_size"] // 2,
            num_hidden_layers=llm["num_hidden_layers"],
            num_attention_heads=llm["num_attention_heads"],
            seq_length=llm["seq_length"],
            max_position_embeddings=llm["max_position_embeddings"],
            layer_norm_epsilon=llm["layer_norm_epsilon"],
            rotary_emb_base=float(llm["rotary_emb_base"]),
            use_dynamic_ntk=llm["use_dynamic_ntk"],
            use_logn_attn=llm["use_logn_attn"],
            system_prompt=llm["system_prompt"],
        )


# ---- the fields of config.json

QWEN: Fields = (
    COMMON
    | {
        "model_type": only(*MODEL_TYPES),
        "visual": mapping(REQUIRED),
        "vocab_size": count(REQUIRED, VOCABULARY),
        "hidden_size": count(REQUIRED, WIDTH),
        "intermediate_size": count(REQUIRED, WIDTH),
        "num_hidden_layers": count(REQUIRED, LAYERS),
        "num_attention_heads": count(REQUIRED, HEADS),
        "seq_length": count(REQUIRED, POSITIONS, least=2),
        "max_position_embeddings": count(REQUIRED, POSITIONS),
        "layer_norm_epsilon": number(REQUIRED, MOST_EPS),
        "rotary_emb_base": number(REQUIRED, THETA),
        "use_dynamic_ntk": flag(REQUIRED),
        "use_logn_attn": flag(REQUIRED),
        "system_prompt": text(SYSTEM_PROMPT),  # a field of this project; without it the published value
        "kv_channels": equal_to("hidden_size / num_attention_heads"),
        "rotary_pct": only(1.0),
        "no_bias": only(True),
        "scale_attn_weights": only(True),
        "tie_word_embeddings": only(False),
        "use_cache_quantization": only(False),
    }
    # the precision of the published code (here the run's `dtype`), and its kernels
    | nothing("bf16", "fp16", "fp32", "softmax_in_fp32", "use_flash_attn", "use_cache_kernel", "onnx_safe")
    | nothing("attn_dropout_prob", "emb_dropout_prob", "tokenizer_type")
)

VISUAL: Fields = {
    "image_size": count(REQUIRED, PIXELS),
    "patch_size": count(REQUIRED, PIXELS),
    "width": count(REQUIRED, WIDTH),
    "layers": count(REQUIRED, LAYERS),
    "heads": count(REQUIRED, HEADS),
    "mlp_ratio": number(REQUIRED, 1024),
    "output_dim": count(REQUIRED, WIDTH),
    "image_start_id": count(REQUIRED, VOCABULARY),
    "n_queries": count(256, PIXELS),
    "n_heads": count(None, HEADS, null="output_dim / 128"),
}

FIELDS = {  # tables by their file or object
    "config.json": QWEN,
    "`visual`": VISUAL,
}


def check_numbers(llm: dict[str, Any], visual: dict[str, Any], where: str) -> None:
    """Raises UserError when fields contradict each other."""
    head_dim = head_size(llm, where, "")
    supported = f"hidden_size / num_attention_heads = {head_dim}"
    said = llm["kv_channels"]
    require(said in (None, head_dim), where, f"kv_channels is {said}, supported: {supported}")
    size = llm["intermediate_size"]
    require(size % 2 == 0, where, f"intermediate_size is {size}, supported: an even number (two branches)")
    width = visual["output_dim"]
    supported = f"hidden_size = {llm['hidden_size']}"
    require(width == llm["hidden_size"], where, f"visual.output_dim is {width}, supported: {supported}")
    require(width % 4 == 0, where, f"visual.output_dim is {width}, supported: a multiple of 4 (sines and cosines)")
    check_multiple(visual, "width", "heads", where, "visual.")
    check_multiple(visual, "image_size", "patch_size", where, "visual.")
    heads = visual["n_heads"] or width // 128
    divides = heads > 0 and width % heads == 0
    require(divides, where, f"visual.n_heads is {heads}, supported: a number that divides output_dim = {width}")
    queries = visual["n_queries"]
    square = math.isqrt(queries) ** 2 == queries
    require(square, where, f"visual.n_queries is {queries}, supported: a square number (a grid of positions)")


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """Returns the config as it is: the transform is fixed in Qwen-VL's code, which reads no such file."""
    return config


def frame_fit(config: Config) -> str:
    """Returns the rule for frames and pictures: Qwen-VL squashes both with PIL's bicubic filter."""
    return "bicubic"


SIZES = {
    "7b": Config(),
    "tiny": Config(
        image_size=32,
        patch_size=8,
        vision_hidden_size=96,
        vision_intermediate_size=384,
        vision_num_hidden_layers=3,
        vision_num_attention_heads=4,
        n_queries=16,
        resampler_num_attention_heads=4,
        vocab_size=768,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        system_prompt="",
    ),
}


# ---- vision tower: names under `transformer.visual.`


class Encoder(OpenClipEncoder):
    """Qwen-VL's vision transformer: pixels (B, H, W, 3), normalised -> (B, N, D) in the dtype of `pixels`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.vision, rngs=rngs)


# ---- projector: names under `transformer.visual.`

PROJECTOR_OPTIONS = {  # switches of the projector and their values
    "qwen_align": ("resample", "per_token"),
    "temporal_positions": ("grid", "1d"),
}


def frozen_projector(qwen_align: str = "resample", temporal_positions: str = "grid") -> tuple[str, ...]:
    """Returns regexes of leaves that never train: the fixed positions, and with per_token the unused queries."""
    unused = (r"attn_pool\.query$", r"attn_pool\.ln_q\.") if qwen_align == "per_token" else ()
    return (r"attn_pool\.pos_embed$", *unused)


class Projector(nnx.Module):
    """The resampler, its output norm and projection.

    qwen_align: "resample" gives n_queries tokens for any number of features; "per_token" gives one token per feature,
    as if each were the only key. temporal_positions: the positions of the features of a sequence; "grid": in raster
    order on the smallest square grid that holds them (as in the published code for square numbers); "1d": on the
    flattened position table, resized to their number.
    """

    def __init__(
        self,
        config: Config,
        *,
        qwen_align: str = "resample",
        temporal_positions: str = "grid",
        rngs: nnx.Rngs,
    ):
        width = config.hidden_size
        sizes = config.n_queries, config.vision_hidden_size, width, config.resampler_num_attention_heads
        self.attn_pool = Resampler(*sizes, rngs=rngs)
        self.ln_post = LayerNorm(width, eps=EPS)
        self.proj = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width, width)))  # (in, out)
        self.n_queries = config.n_queries
        self.qwen_align = qwen_align
        self.temporal_positions = temporal_positions

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the layout of the tokens of a picture (rows, cols) or a sequence (length,)."""
        if self.qwen_align == "per_token":
            return layout
        side = math.isqrt(self.n_queries)
        return (side, side) if len(layout) == 2 else (self.n_queries,)

    def key_positions(self, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        """Returns the positions of the features: (M, K) for pictures, (B, M, K) for sequences, fp32.

        A padded sequence gets the positions of its own length, the number of its valid features.
        """
        table = self.attn_pool.position_table()
        index = jnp.arange(math.prod(layout))
        if len(layout) == 2:
            return grid_positions(table, index, *layout)
        length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        if self.temporal_positions == "1d":
            return interpolate(bicubic_weights(index, length, len(table)), table)
        side = (index**2 < length).sum(-1, keepdims=True)  # ceil(sqrt(length)) in integers
        return grid_positions(table, index, side, side)

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        """features: (B, M, D); mask: (B, M) bool, valid features first -> tokens (B, N, K).

        layout: (rows, cols) of a picture or (length,) of a sequence, with M features.
        """
        if self.qwen_align == "resample":
            x = self.attn_pool(features, mask, self.key_positions(mask, layout))
        else:
            x = self.attn_pool.values(features)
        return product("...i,io->...o", self.ln_post(x), self.proj[...].astype(x.dtype))


# ---- language model: names at the top level


class LLM(QwenDecoder):
    """Qwen with its output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.decoder, rngs=rngs)


# ---- names

PREFIX = {"encoder": "transformer.visual.", "projector": "transformer.visual.", "llm": ""}

IGNORED = (r"\.rotary_emb\.inv_freq$",)  # a buffer in some published files


SHARDING = (  # canonical name -> the mesh axes of torch's axes (out, in)
    (r"attn_pool\.(kv_proj\.weight|attn\.in_proj_weight|attn\.out_proj\.weight)$", P(BATCH_AXES, None)),  # trains
    (r"visual\.proj$", P(BATCH_AXES, None)),
    (r"attn_pool\.(query|pos_embed|attn\.in_proj_bias)$", P()),
    (r"(c_attn|in_proj|c_fc|w1|w2)\.weight$", P("tensor", "fsdp")),
    (r"(c_proj|out_proj)\.weight$", P("fsdp", "tensor")),
    (r"(wte|lm_head)\.weight$", P("tensor", "fsdp")),
    (r"(conv1\.weight|positional_embedding)$", P()),
    (r"ln_(1|2|f|q|kv|pre|post)\.(weight|bias)$", P()),
    (r"\.bias$", P()),
)

# ---- text

Tokenizer = QwenTokenizer


def check_tokenizer(tokenizer: Tokenizer, config: Config, published: dict[str, Any], where: str) -> None:
    """Raises UserError when the tokenizer's id of <img> is not `visual.image_start_id` of config.json, `published`."""
    said, found = published["visual"]["image_start_id"], tokenizer.special("<img>")
    problem = f"visual.image_start_id is {said}, supported: {found}, the id of <img> in qwen.tiktoken"
    require(said == found, f"{where}/config.json", problem)


def prompt(
    tokenizer: Tokenizer,
    config: Config,
    question: str,
    answer: str | None,
    labels: str = "answer",
    *,
    picture: bool = False,
) -> tuple[Segment, Segment]:
    """Returns the tokens before and after the visual tokens: ChatML, the video in <img> … </img> in the user's turn.

    A picture has `Picture 1: ` before <img>, as in Qwen-VL's own chat format, which numbers pictures; a video has <img>
    alone, as pictures in Qwen-VL's pre-training. Each segment is tokenized on its own. Without an answer the second
    part ends at the start of the answer. labels: "answer" supervises the answer and its <|im_end|>; "finetune", as
    Qwen's own script, also supervises <|im_start|>, <|im_end|> and the newline after it in every turn. The first token
    of a row has no slot that predicts it, so its mark has no effect. An empty system prompt has no turn.
    """
    structure = labels == "finetune"

    def plain(*tokens: int) -> Segment:
        return [(token, False) for token in tokens]

    def turn(role: str) -> Segment:
        return [(start, structure), *plain(*tokenizer.encode(role), *newline)]

    start, end, img, img_end = map(tokenizer.special, ("<|im_start|>", "<|im_end|>", "<img>", "</img>"))
    newline = tokenizer.encode("\n")
    close = [(token, structure) for token in (end, *newline)]
    system = [*turn("system"), *plain(*tokenizer.encode(config.system_prompt)), *close]
    number = tokenizer.encode("Picture 1: ") if picture else []
    before = [*(system if config.system_prompt else []), *turn("user"), *plain(*number, img)]
    after = [*plain(img_end, *tokenizer.encode(f"\n{question}")), *close, *turn("assistant")]
    if answer is not None:
        after += [(token, True) for token in (*tokenizer.encode(answer), end, *newline * structure)]
    return before, after
