"""The contract of a base: everything that other code needs of an image LLM, and the check of a base at load.

A base is one module with the attributes of `Family`: a file of this folder, or a module of your own package, named by
its dotted path. docs/new_base.md shows a complete one.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.media.tiles import Cut
from redvillm_jax.modules.picture_places import Places, whole_picture

Segment = list[tuple[int, bool]]  # (token id, whether it is supervised)
Rules = Sequence[tuple[str, Any]]  # (regex, value); the first regex that is found in a name applies


def no_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Default of `unused`: all tensors run."""
    return {}


def any_tokenizer(tokenizer: Any, config: Any, published: dict[str, Any], where: str) -> None:
    """`check_tokenizer` of a base whose tokenizer only has to make a prompt."""


def nothing_frozen(**options: Any) -> tuple[str, ...]:
    """`frozen_projector` of a base whose whole projector trains."""
    return ()


@dataclasses.dataclass(frozen=True)
class Family:
    """The attributes of a base's module; a module may omit a field with a default.

    The model
      Config             a frozen dataclass; `CONFIG` below lists its attributes
      SIZES              Config by name of a size; `selfcheck` and tests use "tiny", `plan` the first
      Encoder            Encoder(config, rngs=): pixels (B, H, W, 3), normalised -> features (B, rows * cols, D)
      Projector          Projector(config, rngs=, **options): (features (B, M, D), mask (B, M) bool, layout) -> tokens
                         (B, N, K); layout: (rows, cols) of a picture, (length,) of a sequence.
                         `token_layout(layout)`: the layout of the tokens; it may depend on nothing else
      LLM                LLM(config, rngs=): the language model; `LLM_METHODS` below lists its methods
      PROJECTOR_OPTIONS  switches of the projector with their values, the default first; they are config fields
      frozen_projector   (**options) -> regexes of the projector's leaves that never train

    Published files
      PUBLISHED          the model to download, for messages
      MODEL_TYPES        the values of `model_type` in its config.json
      FIELDS             the tables of fields of its files, by title (docs/config_fields.md)
      VISION_FIELD       the field of config.json that names a separately published vision tower; None: no field
      read_image_processor   (config, the file's content, its path) -> the config with the values of the image
                         processor's file; raises UserError for another image transform
      PREFIX             of canonical names, by "encoder", "projector" and "llm"; an attribute path follows it
      CANONICAL          published name -> canonical name, as (regex, replacement)
      IGNORED            regexes of canonical names of tensors that base folders keep but no code loads
      identity           (config) -> what the fingerprint of a base says of its config, for JSON
      unused             (config) -> shapes, by canonical name, of weights that base folders keep but never run
      SHARDING           canonical name -> PartitionSpec of the tensor, as (regex, spec)

    Pictures and text
      MEAN, STD          of RGB pixels / 255
      frame_fit          (config) -> how a frame becomes a square: a rule of `data_pipeline.media.resizing.resizer`
      picture_fit        (config) -> how a picture becomes a square: a key of `data_pipeline.media.pictures.FIT` or a
                         rule of frames; or how it becomes several squares: a cut of `data_pipeline.media.tiles`. By
                         default the frames' rule
      picture_places     (tokenizer, config, tokens of a square, grid, size) -> `Places`, all that a picture is in a
                         prompt. grid: rows and columns of its tiles, size: height and width in pixels; None for a
                         family that makes one square. By default the tokens of one square in their own order
      BOTH_DIRECTIONS    whether adjacent visual tokens see each other in both directions, in all layers
      Tokenizer          Tokenizer(folder): encode(text), decode(ids, keep_special=), special(token), size, stop_ids
      check_tokenizer    (tokenizer, config, content of config.json, folder): raises UserError for another model's; a
                         tokenizer that can make no prompt is refused before
      prompt             (tokenizer, config, question, answer or None, labels, picture=) -> the segments before and
                         behind a video's part of the prompt, or a picture's (`picture_places`)
    """

    name: str
    Config: type
    SIZES: Mapping[str, Any]
    Encoder: type
    Projector: type
    LLM: type
    PUBLISHED: str
    MODEL_TYPES: Sequence[str]
    read_image_processor: Callable[[Any, dict[str, Any], str], Any]
    PREFIX: Mapping[str, str]
    SHARDING: Rules
    MEAN: tuple[float, float, float]
    STD: tuple[float, float, float]
    frame_fit: Callable[[Any], str]
    Tokenizer: type
    prompt: Callable[..., tuple[Segment, Segment]]
    PROJECTOR_OPTIONS: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    frozen_projector: Callable[..., tuple[str, ...]] = nothing_frozen
    FIELDS: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    VISION_FIELD: str | None = None
    CANONICAL: Rules = ()
    IGNORED: Sequence[str] = ()
    identity: Callable[[Any], dict[str, Any]] = dataclasses.asdict
    unused: Callable[[Any], dict[str, tuple[int, ...]]] = no_tensors
    picture_fit: Callable[[Any], str | Cut] | None = None
    picture_places: Callable[..., Places] = whole_picture
    check_tokenizer: Callable[[Any, Any, dict[str, Any], str], None] = any_tokenizer
    BOTH_DIRECTIONS: bool = False

    def __post_init__(self):
        if self.picture_fit is None:
            object.__setattr__(self, "picture_fit", self.frame_fit)


CONFIG = {  # attribute of a Config -> its meaning
    "image_size": "width and height of a picture in pixels",
    "grid": "rows and columns of a picture's features, in raster order",
    "feature_size": "width D of a feature",
    "hidden_size": "width K of a token",
    "vocab_size": "rows of the embedding table",
    "max_position_embeddings": "tokens of the longest text",
    "num_attention_heads": "heads of the language model",
    "head_dim": "width of such a head",
    "window": "number of positions that its window layers see, None: all layers see all before a query",
}
LLM_METHODS = {  # method or property of an LLM -> its meaning
    "embed": "(token_ids (B, S), dtype) -> (B, S, K)",
    "init_cache": "(batch, length, dtype) -> empty keys and values, (layers, batch, heads, head_dim, length) each",
    "context_class": "(length of a prompt) -> its class; prompts of one class can share the cache of a prefix",
    "__call__": "(embeds, position_ids, masks, cache=, cache_index=, context_length=, remat=) -> (B, S, K), cache",
    "logits": "(hidden (..., K)) -> (..., vocab_size) fp32",
    "head": "the module whose weight makes the logits: a Linear, or a tied Embedding; never in 8 bits",
}  # and, where pictures need it, the weight `image_newline` (K,), the first token of a picture's table (`Places`)
METHODS = {  # class -> its required methods
    "Config": ("from_published",),
    "Encoder": ("__call__",),
    "Projector": ("__call__", "token_layout"),
    "LLM": tuple(LLM_METHODS),
    "Tokenizer": ("encode", "decode", "special"),
}


def known_families() -> list[str]:
    """Returns the names of the bases in this folder."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(p.stem for p in files if p.stem not in ("__init__", "contract"))


def load_family(name: str) -> Family:
    """Loads a family by its name or its dotted path.

    Raises UserError for an unknown name, a module that cannot be imported, and missing attributes of the contract.
    """
    module = import_family(name)
    fields = {field.name: field for field in dataclasses.fields(Family) if field.name != "name"}
    found = {name: getattr(module, name) for name in fields if hasattr(module, name)}
    if lacking := missing(fields, found):
        raise UserError(f"{module.__name__}: no base, it lacks {', '.join(lacking)} (see docs/new_base.md)")
    return Family(name=name, **found)


def missing(fields: Mapping[str, dataclasses.Field], found: Mapping[str, Any]) -> list[str]:
    """Returns the names in the contract that are missing in a module with the attributes `found`."""
    no_default = dataclasses.MISSING
    lacking = [f.name for f in fields.values() if f.default is f.default_factory is no_default and f.name not in found]
    for name, methods in METHODS.items():
        own = {attribute for kind in getattr(found.get(name), "__mro__", ()) for attribute in vars(kind)}
        lacking += [f"{name}.{method}" for method in methods if name in found and method not in own]
    sizes = found.get("SIZES", {"tiny": None})
    lacking += [f"SIZES[{name!r}]" for name in ("tiny",) if name not in sizes]
    if "SIZES" in found:
        lacking += [f"Config.{name}" for name in CONFIG if any(not hasattr(size, name) for size in sizes.values())]
    parts = ("encoder", "projector", "llm")
    return lacking + [f"PREFIX[{part!r}]" for part in parts if part not in found.get("PREFIX", parts)]


def import_family(name: str) -> ModuleType:
    """Imports the module of a family, by its name in this folder or its dotted path. Raises UserError."""
    if not isinstance(name, str) or "." not in name:
        if name not in known_families():
            own = "or the dotted path of your own module (docs/new_base.md)"
            raise UserError(f"unknown family {name!r:.80}: expected one of {', '.join(known_families())}, {own}")
        name = f"redvillm_jax.bases.{name}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "install its package, or start in the folder that holds it"
        raise UserError(f"family {name:.80}: cannot be imported ({in_one_line(error)}); {hint}") from error
    except Exception as error:  # a user's module may raise any exception
        kind = type(error).__name__
        raise UserError(f"family {name:.80}: its module raises {kind}: {in_one_line(error)}; correct it") from error


def in_one_line(error: Exception) -> str:
    """An exception's message in one line, shortened."""
    return " ".join(str(error).split())[:200]
