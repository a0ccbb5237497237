"""An image LLM that is like none of the project's: the family `tests.toy_base`, which docs/new_base.md explains.

Its patches are twice as wide as high, its projector makes one token of two features, its language model has tied
embeddings, grouped keys, heads of their own width and layers that see a window, and its tokenizer has its own file.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import Segment
from redvillm_jax.modules.config_fields import (
    COMMON,
    PIXELS,
    REQUIRED,
    WIDTH,
    Fields,
    count,
    mapping,
    only,
    read_fields,
)
from redvillm_jax.modules.layers import BATCH_AXES, Embedding, LayerNorm, Linear, PatchEmbedding, Stack, gelu
from redvillm_jax.modules.llama import LlamaConfig, LlamaDecoder
from redvillm_jax.modules.llama_fields import QWEN2, read_decoder

PUBLISHED = "nothing, it is made by tests/toy_base.py"
MODEL_TYPES = ("toy",)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

# ---- config.json

TOY: Fields = COMMON | {"model_type": only("toy"), "eye": mapping(REQUIRED), "text_config": mapping(REQUIRED)}
EYE: Fields = {
    "image_size": count(REQUIRED, PIXELS),
    "patch_height": count(REQUIRED, PIXELS),
    "patch_width": count(REQUIRED, PIXELS),
    "width": count(REQUIRED, WIDTH),
    "layers": count(REQUIRED, 100),
}
FIELDS = {"config.json": TOY, "`eye`": EYE, "`text_config`": QWEN2}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the vision tower, and the language model's own config."""

    text: LlamaConfig
    image_size: int = 32
    patch_height: int = 8
    patch_width: int = 16
    feature_size: int = 40
    layers: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size // self.patch_height, self.image_size // self.patch_width

    hidden_size = property(lambda self: self.text.hidden_size)
    vocab_size = property(lambda self: self.text.vocab_size)
    max_position_embeddings = property(lambda self: self.text.max_position_embeddings)
    num_attention_heads = property(lambda self: self.text.num_attention_heads)
    head_dim = property(lambda self: self.text.head_dim)
    window = property(lambda self: self.text.window)

    @classmethod
    def from_published(cls, config: dict[str, Any], where: str = "config.json") -> "Config":
        values = read_fields(config, TOY, where)
        eye = read_fields(values["eye"], EYE, where, "eye.")
        sizes = {"feature_size": eye.pop("width"), **eye}
        return cls(text=read_decoder(values["text_config"], where, "text_config."), **sizes)


def read_image_processor(config: Config, published: dict[str, Any], where: str) -> Config:
    """There is no such file."""
    raise UserError(f"{where}: not a file of this model; remove it")


def frame_fit(config: Config) -> str:
    """PIL's bicubic filter."""
    return "bicubic"


TEXT = LlamaConfig(
    vocab_size=640,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not 48 / 4
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
    tie_word_embeddings=True,
    layer_kinds=("full", "window", "window"),
    sliding_window=6,
)
SIZES = {"tiny": Config(TEXT)}

# ---- the model


class EyeLayer(nnx.Module):
    """Mixes the patches of a picture, then the features of each patch."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        patches = config.grid[0] * config.grid[1]
        self.norm = LayerNorm(config.feature_size, eps=1e-5)
        self.across = Linear(patches, patches, rngs=rngs)
        self.within = Linear(config.feature_size, config.feature_size, rngs=rngs)

    def __call__(self, x: jax.Array, cache: None) -> tuple[jax.Array, None]:
        y = self.norm(x)
        return x + gelu(self.within(y + self.across(y.swapaxes(1, 2)).swapaxes(1, 2))), None


class Encoder(nnx.Module):
    """Patches, their places, and a few mixing layers: (B, H, W, 3) -> (B, rows * cols, D)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.patches = PatchEmbedding(config.feature_size, (config.patch_height, config.patch_width), rngs=rngs)
        self.places = Embedding(config.grid[0] * config.grid[1], config.feature_size, rngs=rngs)
        self.blocks = Stack(lambda rngs: EyeLayer(config, rngs=rngs), config.layers, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.patches(pixels)
        return self.blocks(x + self.places.weight[...].astype(x.dtype))[0]


PROJECTOR_OPTIONS = {"toy_pairs": ("mean", "max")}


class Projector(nnx.Module):
    """One token of two neighbours: two rows of a picture, two frames of a sequence; the last may be alone."""

    def __init__(self, config: Config, *, toy_pairs: str = "mean", rngs: nnx.Rngs):
        self.core = Linear(config.feature_size, config.hidden_size, rngs=rngs)
        self.norm = LayerNorm(config.hidden_size, eps=1e-5)
        self.toy_pairs = toy_pairs

    def token_layout(self, layout: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-layout[0] // 2), *layout[1:])

    def __call__(self, features: jax.Array, mask: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        batch, width = len(features), features.shape[-1]
        odd = ((0, 0), (0, layout[0] % 2), (0, 0), (0, 0))
        x = jnp.pad(features.reshape(batch, layout[0], -1, width), odd).reshape(batch, -(-layout[0] // 2), 2, -1, width)
        real = jnp.pad(mask.reshape(batch, layout[0], -1, 1), odd).reshape(*x.shape[:-1], 1)
        if self.toy_pairs == "max":
            pooled = jnp.where(real.any(2), jnp.where(real, x, -1e9).max(2), 0)
        else:
            pooled = (x * real).sum(2) / jnp.maximum(real.sum(2), 1)
        return self.norm(self.core(pooled.reshape(batch, -1, width)))


def frozen_projector(toy_pairs: str = "mean") -> tuple[str, ...]:
    """The norm's bias stays as it is."""
    return (r"norm\.bias$",)


class LLM(LlamaDecoder):
    """The shared decoder."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs)


# ---- names

PREFIX = {"encoder": "eye.", "projector": "bridge.", "llm": "text."}
CANONICAL = (
    (r"^vision\.blk\.", "eye.blocks."),
    (r"^vision\.", "eye."),
    (r"^connector\.", "bridge."),
    (r"^decoder\.tok\.", "text.model.embed_tokens."),
    (r"^decoder\.", "text.model."),
)
IGNORED = (r"^eye\.counter$",)
SHARDING = (
    (r"bridge\.core\.weight$", P(BATCH_AXES, None)),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|within|across)\.weight$", P("tensor", "fsdp")),
    (r"(o_proj|down_proj)\.weight$", P("fsdp", "tensor")),
    (r"embed_tokens\.weight$", P("tensor", "fsdp")),
    (r"(places\.weight|patches\.weight|norm\.weight|\.bias)$", P()),
)

# ---- text

SPECIAL = ("<start>", "<see>", "<end>")


class Tokenizer:
    """The longest piece of `pieces.json` that fits, else a byte; special tokens come last."""

    def __init__(self, folder: str | Path):
        file = Path(folder) / "pieces.json"
        if not file.is_file():
            raise UserError(f"{file}: not found; copy the toy's own")
        self.pieces = [bytes([i]) for i in range(256)] + [piece.encode() for piece in json.loads(file.read_text())]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        longest_first = sorted(self.pieces, key=len, reverse=True)
        self.pattern = re.compile(b"|".join(map(re.escape, longest_first)), re.DOTALL)
        self.size = len(self.pieces) + len(SPECIAL)
        self.stop_ids = (self.special("<end>"),)

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for piece in self.pattern.findall(text.encode())]

    def decode(self, token_ids: list[int], keep_special: bool = False) -> str:
        shown = [*self.pieces, *(token.encode() if keep_special else b"" for token in SPECIAL)]
        return b"".join(shown[i] for i in token_ids if i < len(shown)).decode(errors="replace")

    def special(self, token: str) -> int:
        return len(self.pieces) + SPECIAL.index(token)


def prompt(
    tokenizer: Tokenizer,
    config: Config,
    question: str,
    answer: str | None,
    labels: str = "answer",
    *,
    picture: bool = False,
) -> tuple[Segment, Segment]:
    """`<start><see>`, the visual tokens, `{question} | {answer}<end>`; both values of `labels` give the same."""
    before = [(tokenizer.special(token), False) for token in ("<start>", "<see>")]
    after = [(i, False) for i in tokenizer.encode(f"{question} | ")]
    reply = [] if answer is None else [*tokenizer.encode(answer), tokenizer.special("<end>")]
    return before, after + [(i, True) for i in reply]


# ---- what stands in for a published checkpoint


def write_text_files(folder: Path) -> dict[str, Any]:
    """Writes config.json and the tokenizer's file as they would be published; returns the config."""
    from redvillm_jax.demo.tokenizers import chinese_words, english_words

    first, following = english_words()
    pieces = sorted(first | {f" {word}" for word in following} | chinese_words())
    (folder / "pieces.json").write_text(json.dumps(pieces))
    text = dataclasses.asdict(TEXT) | {"model_type": "qwen2", "max_window_layers": 1, "use_sliding_window": True}
    for name in ("qkv_bias", "layer_kinds", "rope_scaling"):
        text.pop(name)
    eye = {"image_size": 32, "patch_height": 8, "patch_width": 16, "width": 40, "layers": 2}
    config = {"model_type": "toy", "eye": eye, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def published_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the names of the published files, with a buffer that nothing loads."""
    back = [(r"^eye\.blocks\.", "vision.blk."), (r"^eye\.", "vision."), (r"^bridge\.", "connector.")]
    back += [(r"^text\.model\.embed_tokens\.", "decoder.tok."), (r"^text\.model\.", "decoder.")]
    published = {"vision.counter": np.zeros(1, np.float32)}
    for name, array in tensors.items():
        for pattern, replacement in back:
            name, found = re.subn(pattern, replacement, name, count=1)
            if found:
                break
        published[name] = array
    return published
