"""Qwen-VL and Qwen-VL-Chat: ViT-bigG, a resampler of 256 queries, the Qwen language model.

Module attributes carry the published names, so no name needs a rule.
"""

import base64
import dataclasses
import math
import unicodedata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.config_fields import (
    COMMON,
    REQUIRED,
    Fields,
    count,
    equal_to,
    flag,
    mapping,
    nothing,
    number,
    only,
    read_fields,
    require,
    text,
)
from redvillm_jax.modules.layers import (
    BATCH_AXES,
    Embedding,
    LayerNorm,
    Linear,
    PatchEmbedding,
    RMSNorm,
    Stack,
    attention,
    broadcast_rows,
    gelu,
    keep,
    merge_heads,
    product,
    rotary_angles,
    rotate,
    split_heads,
    update_cache,
)
from redvillm_jax.modules.published_tables import (
    EPS,
    HEADS,
    LAYERS,
    PIXELS,
    POSITIONS,
    THETA,
    VOCABULARY,
    WIDTH,
    check_multiple,
    head_size,
)

PUBLISHED = "Qwen/Qwen-VL-Chat"

MODEL_TYPES = ("qwen",)  # what config.json calls it

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE = "bicubic"  # Qwen-VL squashes pictures with PIL's bicubic filter

SYSTEM_PROMPT = "You are a helpful assistant."
VISION_LAYER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of one Qwen-VL; the defaults are Qwen-VL-Chat."""

    image_size: int = 448
    patch_size: int = 14
    vision_hidden_size: int = 1664
    vision_intermediate_size: int = 8192
    vision_num_hidden_layers: int = 48
    vision_num_attention_heads: int = 16
    n_queries: int = 256  # also the number of positions that the vision transformer has learned
    resampler_num_attention_heads: int = 32
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    seq_length: int = 2048  # the trained length, beyond which dynamic NTK and logn act
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    system_prompt: str = SYSTEM_PROMPT

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's patches, which come in raster order."""
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

    @classmethod
    def from_published(
        cls,
        config: dict[str, Any],
        where: str = "config.json",
    ) -> "Config":
        """Reads a published config.json; the vision tower's numbers are in its `visual`.

        `visual.n_queries` and `visual.n_heads` (the resampler's) are optional: the published code fixes them to
        256 and output_dim / 128. `intermediate_size` counts both branches of the gated MLP, so half of it is the
        width. where: the file, for messages. Raises UserError for a field that the tables refuse or do not know, and
        for visual tokens that do not have the language model's width.
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
        "layer_norm_epsilon": number(REQUIRED, EPS),
        "rotary_emb_base": number(REQUIRED, THETA),
        "use_dynamic_ntk": flag(REQUIRED),
        "use_logn_attn": flag(REQUIRED),
        "system_prompt": text(SYSTEM_PROMPT),  # this project's; the published value without it
        "kv_channels": equal_to("hidden_size / num_attention_heads"),
        "rotary_pct": only(1.0),
        "no_bias": only(True),
        "scale_attn_weights": only(True),
        "tie_word_embeddings": only(False),
        "use_cache_quantization": only(False),
    }
    # the precision that the published code computes in (here the run's own `dtype`), and its kernels
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

FIELDS = {  # the tables by the files and objects that they are for
    "config.json": QWEN,
    "`visual`": VISUAL,
}


def check_numbers(llm: dict[str, Any], visual: dict[str, Any], where: str) -> None:
    """Raises UserError when fields do not go together."""
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


def check_image_processor(config: Config, published: dict[str, Any], where: str) -> None:
    """Nothing: Qwen-VL's transform is fixed in its code, which reads no such file."""


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


# ---- positions


def bicubic_weights(index: jax.Array, target: int | jax.Array, source: int) -> jax.Array:
    """Rows `index` of torch's bicubic resampling from `source` to `target` points: (...) -> (..., source) fp32.

    torch's kernel has a = -0.75 (jax.image's -0.5), no antialiasing, and repeats the border. `target` may be
    traced and broadcasts against `index`.
    """
    a = -0.75
    x = (index + 0.5) * (source / target) - 0.5
    left = jnp.floor(x)
    weights = 0.0
    for tap in (-1, 0, 1, 2):
        s = jnp.abs(x - left - tap)
        near = ((a + 2) * s - (a + 3)) * s**2 + 1
        far = ((a * s - 5 * a) * s + 8 * a) * s - 4 * a
        column = jnp.clip(left + tap, 0, source - 1).astype(jnp.int32)
        weights += jnp.where(s <= 1, near, far)[..., None] * jax.nn.one_hot(column, source)
    return weights


def interpolate(weights: jax.Array, table: jax.Array) -> jax.Array:
    """weights: (..., S) fp32 times table: (S, D) -> (..., D) fp32."""
    return product("...s,sd->...d", weights, table.astype(jnp.float32))


def grid_positions(table: jax.Array, index: jax.Array, rows: int | jax.Array, cols: int | jax.Array) -> jax.Array:
    """Cells `index` (raster order) of a square position table resized to rows x cols: (...) -> (..., D) fp32."""
    side = math.isqrt(len(table))
    down = bicubic_weights(index // cols, rows, side)
    across = bicubic_weights(index % cols, cols, side)
    weights = down[..., :, None] * across[..., None, :]
    return interpolate(weights.reshape(*weights.shape[:-2], side * side), table)


def sin_cos_positions(num_positions: int, features: int) -> jax.Array:
    """The resampler's fixed table for a square grid: [sin c, cos c, sin r, cos r] per cell, (N, features)."""
    side = math.isqrt(num_positions)
    frequency = 10000.0 ** -(jnp.arange(features // 4) / (features // 4))
    row, col = jnp.divmod(jnp.arange(num_positions), side)
    angles = [axis[:, None] * frequency for axis in (col, row)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


# ---- vision tower: names under `transformer.visual.`


class VisionAttention(nnx.Module):
    """Full self-attention with one packed projection: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.in_proj = Linear(width, 3 * width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        # the rows of in_proj are interleaved: q, k, v of head 0, then q, k, v of head 1, …
        q, k, v = jnp.split(split_heads(self.in_proj(x), self.num_heads), 3, axis=-1)
        return self.out_proj(merge_heads(attention(q, k, v)))


class VisionMLP(nnx.Module):
    """Two layers around an exact GELU: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, intermediate_size: int, *, rngs: nnx.Rngs):
        self.c_fc = Linear(width, intermediate_size, rngs=rngs)
        self.c_proj = Linear(intermediate_size, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(gelu(self.c_fc(x)))


class VisionBlock(nnx.Module):
    """One pre-norm transformer block: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.vision_hidden_size
        self.ln_1 = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)
        self.attn = VisionAttention(width, config.vision_num_attention_heads, rngs=rngs)
        self.ln_2 = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)
        self.mlp = VisionMLP(width, config.vision_intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)), None


class VisionBlocks(nnx.Module):
    """The level that the vision tower calls `transformer` in its names."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        make_block = lambda rngs: VisionBlock(config, rngs=rngs)  # noqa: E731
        self.resblocks = Stack(make_block, config.vision_num_hidden_layers, rngs=rngs)


class Encoder(nnx.Module):
    """Qwen-VL's vision transformer: no class token, no final norm, positions resized to the picture's grid.

    pixels: (B, H, W, 3) normalised -> (B, N, D) in the dtype of `pixels`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.vision_hidden_size
        self.conv1 = PatchEmbedding(width, config.patch_size, rngs=rngs)
        self.positional_embedding = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (config.n_queries, width)))
        self.ln_pre = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)
        self.transformer = VisionBlocks(config, rngs=rngs)
        self.patch_size = config.patch_size

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Patches with their positions, before the first norm: (B, N, D)."""
        rows, cols = (side // self.patch_size for side in pixels.shape[1:3])
        positions = grid_positions(self.positional_embedding[...], jnp.arange(rows * cols), rows, cols)
        return self.conv1(pixels) + positions.astype(pixels.dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.transformer.resblocks(self.ln_pre(self.embed(pixels)))[0]


# ---- projector: names under `transformer.visual.`

PROJECTOR_OPTIONS = {  # switches of the projector and their values
    "qwen_align": ("resample", "per_token"),
    "temporal_positions": ("grid", "1d"),
}


def frozen_projector(qwen_align: str = "resample", temporal_positions: str = "grid") -> tuple[str, ...]:
    """Leaf paths of the projector that never train: the fixed positions, and what per_token leaves unused."""
    unused = (r"attn_pool\.query$", r"attn_pool\.ln_q\.") if qwen_align == "per_token" else ()
    return (r"attn_pool\.pos_embed$", *unused)


class MultiheadAttention(nnx.Module):
    """torch.nn.MultiheadAttention: in_proj_weight (3 * width, width) holds q | k | v as contiguous blocks."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        bound = (6 / (4 * width)) ** 0.5
        self.in_proj_weight = nnx.Param(
            jax.random.uniform(rngs.params(), (3 * width, width), minval=-bound, maxval=bound)
        )
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def project_in(self, x: jax.Array, block: int) -> jax.Array:
        """x through block 0 (query), 1 (key) or 2 (value) of the packed weights."""
        width = x.shape[-1]
        rows = slice(block * width, (block + 1) * width)
        weight, bias = (param[rows].astype(x.dtype) for param in (self.in_proj_weight, self.in_proj_bias))
        return product("...i,oi->...o", x, weight) + bias

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (
            split_heads(self.project_in(x, block), self.num_heads) for block, x in enumerate((query, key, value))
        )
        return self.out_proj(merge_heads(attention(q, k, v, mask)))

    def values(self, x: jax.Array) -> jax.Array:
        """What attention over the single key x returns, for each x: (..., width)."""
        return self.out_proj(self.project_in(x, 2))


class Resampler(nnx.Module):
    """n_queries learned queries attend to any number of features; keys carry positions, values do not."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.pos_embed = nnx.Param(sin_cos_positions(config.n_queries, width))
        self.query = nnx.Param(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, (config.n_queries, width)))
        self.kv_proj = Linear(config.vision_hidden_size, width, bias=False, rngs=rngs)
        self.attn = MultiheadAttention(width, config.resampler_num_attention_heads, rngs=rngs)
        self.ln_q = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)
        self.ln_kv = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)

    def position_table(self) -> jax.Array:
        """The fixed positions of the queries' grid: (n_queries, K); no gradient reaches them."""
        return jax.lax.stop_gradient(self.pos_embed[...])

    def __call__(self, features: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        """features: (B, M, D), mask: (B, M) bool, positions of the keys: (M, K) or (B, M, K) -> (B, n_queries, K)."""
        batch, dtype = len(features), features.dtype
        kv = self.ln_kv(self.kv_proj(features))
        query = self.ln_q(self.query[...].astype(dtype)) + self.position_table().astype(dtype)
        mask = jnp.broadcast_to(mask[:, None], (batch, len(query), mask.shape[1]))
        return self.attn(broadcast_rows(query, batch), kv + positions.astype(dtype), kv, mask)

    def values(self, features: jax.Array) -> jax.Array:
        """Every feature alone, as the only key: features: (B, M, D) -> (B, M, K)."""
        return self.attn.values(self.ln_kv(self.kv_proj(features)))


class Projector(nnx.Module):
    """The resampler, its output norm and projection.

    `qwen_align="resample"` gives n_queries tokens whatever the number of features; `"per_token"` makes every
    feature its own one-key picture and gives a token each. `temporal_positions` places the features of a
    sequence: `"grid"` in raster order on the smallest square grid that holds them (what the published code does
    for square numbers), `"1d"` on the flattened position table resized to their number.
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
        self.attn_pool = Resampler(config, rngs=rngs)
        self.ln_post = LayerNorm(width, eps=VISION_LAYER_NORM_EPS)
        self.proj = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width, width)))  # (in, out)
        self.n_queries = config.n_queries
        self.qwen_align = qwen_align
        self.temporal_positions = temporal_positions

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        """How the tokens of a picture (rows, cols) or a sequence (length,) lie: the queries stand in a square grid."""
        if self.qwen_align == "per_token":
            return layout
        side = math.isqrt(self.n_queries)
        return (side, side) if len(layout) == 2 else (self.n_queries,)

    def key_positions(self, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        """Positions of the features: (M, K) of a picture, (B, M, K) of sequences, fp32.

        Those of a sequence depend on how many of its features are valid, so that a padded one gets the
        positions of its own length.
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
        """features: (B, M, D); mask: (B, M) bool, valid features first -> tokens (B, their number, K).

        layout: (rows, cols) of a picture or (length,) of a sequence, M features either way.
        """
        if self.qwen_align == "resample":
            x = self.attn_pool(features, mask, self.key_positions(mask, layout))
        else:
            x = self.attn_pool.values(features)
        return product("...i,io->...o", self.ln_post(x), self.proj[...].astype(x.dtype))


# ---- language model: names at the top level


class QwenAttention(nnx.Module):
    """Causal self-attention with rotary positions and an optional scale of the queries (logn)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=False, rngs=rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x, angles, query_scale, attention_mask, cache_index, cache):
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.c_attn(x), 3, axis=-1))
        q, k = rotate(q, angles), rotate(k, angles)
        if query_scale is not None:
            q = q * query_scale[:, :, None, None].astype(q.dtype)
        if cache is not None:
            cache, k, v = update_cache(cache, k, v, cache_index, attention_mask.shape[-1])
        return self.c_proj(merge_heads(attention(q, k, v, attention_mask))), cache


class QwenMLP(nnx.Module):
    """The gated MLP: c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.w1 = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.w2 = Linear(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = keep(self.w2(x), "gate"), keep(self.w1(x), "up")
        return self.c_proj(up * jax.nn.silu(gate))


class QwenBlock(nnx.Module):
    """One pre-norm decoder block: (B, S, K) -> (B, S, K) and the updated cache."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QwenAttention(config, rngs=rngs)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QwenMLP(config, rngs=rngs)

    def __call__(self, x, angles, query_scale, attention_mask, cache_index, cache):
        y, cache = self.attn(self.ln_1(x), angles, query_scale, attention_mask, cache_index, cache)
        x = keep(x + y, "residual")
        return x + self.mlp(self.ln_2(x)), cache


class QwenModel(nnx.Module):
    """The level that Qwen calls `transformer` in its names."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.wte = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.h = Stack(lambda rngs: QwenBlock(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.ln_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


def ntk_base(config: Config, context_length: jax.Array) -> jax.Array:
    """The rotary base for prompts of context_length: (B,) tokens, as (B, 1, 1) fp32.

    Published rule: alpha = max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1), base * alpha ** (d / (d - 2)).
    Counting the doublings of seq_length that fit gives the exponent in integers.
    """
    doublings = (context_length[:, None] > config.seq_length * 2 ** jnp.arange(16)).sum(-1)
    alpha = 2.0 ** (doublings + 1) - 1
    return (config.rotary_emb_base * alpha ** (config.head_dim / (config.head_dim - 2)))[:, None, None]


class LLM(nnx.Module):
    """Qwen with its output head."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.transformer = QwenModel(config, rngs=rngs)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        self.config = config

    @property
    def head(self) -> Linear:
        """What makes the logits."""
        return self.lm_head

    def embed(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """token_ids: (B, S) int32 -> (B, S, K) in `dtype`."""
        return self.transformer.wte(token_ids).astype(dtype)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Empty keys and values: (num_layers, batch, num_attention_heads, head_dim, length) each."""
        c = self.config
        shape = (c.num_hidden_layers, batch, c.num_attention_heads, c.head_dim, length)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def context_class(self, context_length: int) -> int:
        """Prompts of one class share the keys of what they share: those with one rotary base."""
        c = self.config
        return sum(context_length > c.seq_length * 2**i for i in range(16)) if c.use_dynamic_ntk else 0

    def __call__(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        attention_mask: jax.Array,
        *,
        cache: tuple[jax.Array, jax.Array] | None = None,
        cache_index: int | jax.Array = 0,
        context_length: jax.Array | None = None,
        remat: str = "none",
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Decoder body and final norm.

        embeds: (B, S, K); position_ids: (B, S); attention_mask: (B, S, S_kv) bool, where S_kv is S or, with a
        cache, how many of its slots are seen; the new keys and values go to slots cache_index … cache_index + S - 1.
        context_length: (B,) int32, the length of the prompt, while prefilling and decoding alike: turns on
        dynamic NTK (by that length) and logn (queries at positions from seq_length on are scaled), which the
        published model uses outside training. Returns hidden states (B, S, K) and the updated cache.
        """
        c = self.config
        base, query_scale = c.rotary_emb_base, None
        if context_length is not None and c.use_dynamic_ntk:
            base = ntk_base(c, context_length)
        if context_length is not None and c.use_logn_attn:
            query_scale = jnp.maximum(jnp.log(position_ids + 1.0) / math.log(c.seq_length), 1.0)
        angles = rotary_angles(position_ids, c.head_dim, base)
        x, cache = self.transformer.h(
            embeds, angles, query_scale, attention_mask, cache_index, cache=cache, remat=remat
        )
        return self.transformer.ln_f(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: (..., K) -> (..., vocab_size) fp32."""
        return self.lm_head(hidden, jnp.float32)


# ---- names

PREFIX = {"encoder": "transformer.visual.", "projector": "transformer.visual.", "llm": ""}

IGNORED = (r"\.rotary_emb\.inv_freq$",)  # a buffer that some exports carry


SHARDING = (  # canonical name -> how torch's axes (out, in) lie on the mesh
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

# Qwen's pre-split: like OpenAI's cl100k, but digits one at a time.
PATTERN = "|".join(
    (
        r"(?i:'(?:[stmd]|re|ve|ll))",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

SPECIAL_TOKENS = (  # their ids follow the ranks of the file
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)


class Tokenizer:
    """Byte-level BPE from the folder's qwen.tiktoken; strings that look like special tokens are plain text.

    Raises UserError when the file is missing or not in tiktoken's format.
    """

    def __init__(self, folder: str | Path):
        import tiktoken  # only text needs it

        file = Path(folder) / "qwen.tiktoken"
        if not file.is_file():
            raise UserError(f"{file}: not found; copy Qwen-VL's qwen.tiktoken next to its config.json")
        try:
            lines = (line.split() for line in file.read_bytes().splitlines() if line)
            pairs = [(base64.b64decode(token, validate=True), int(rank)) for token, rank in lines]
        except (ValueError, OSError) as error:
            raise UserError(f"{file}: expected lines of 'base64 rank' ({error}); copy it again") from None
        ranks = dict(pairs)
        whole = sorted(ranks.values()) == list(range(len(pairs))) and all(bytes([i]) in ranks for i in range(256))
        require(whole, str(file), "expected each rank from 0 on once, and all 256 single bytes; copy it again")
        self.num_ranks = len(ranks)
        self.specials = {token: self.num_ranks + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.specials)
        self.size = self.encoding.n_vocab  # ids that text can become, special ones included
        self.stop_ids = tuple(map(self.special, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without markers at its ends."""
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        """The text of ids; special tokens are dropped, or spelled out with `keep_special`.

        Ids of the vocabulary's rows that belong to no token are dropped.
        """
        last = self.encoding.max_token_value if keep_special else self.num_ranks - 1
        return self.encoding.decode([i for i in token_ids if i <= last])

    def special(self, token: str) -> int:
        """The id of a special token such as "<|im_end|>"."""
        return self.specials[token]


def check_tokenizer(tokenizer: Tokenizer, config: Config, published: dict[str, Any], where: str) -> None:
    """Raises UserError when the tokenizer's <img> is not where `published`, config.json, lets pictures begin."""
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
    """What stands before and after the visual tokens: ChatML, the video between <img> and </img> in the user's turn.

    A picture has `Picture 1: ` before <img>, as in Qwen-VL's own chat format, where it tells pictures apart; a video
    has <img> alone, as pictures have in Qwen-VL's pre-training. Nothing else differs.
    Each segment is tokenised on its own. Without an answer the second part ends where the model starts to
    write. `labels="answer"` counts the answer and its <|im_end|>; `"finetune"` is the convention of Qwen's own
    script, which also counts <|im_start|>, <|im_end|> and the newline after it in every turn. The first token
    of a row has no slot that predicts it, whatever its mark. An empty system prompt leaves its turn out.
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
