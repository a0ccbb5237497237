"""The contract of a base: everything that the rest of the code asks of an image LLM, and the check of it at load.

A base is one module: a file of this folder, or a module of the user's own package, named by its dotted path. It has
the attributes of `Family` by their names; docs/new_base.md shows a whole one.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from data_pipeline.common.errors import UserError

Segment = list[tuple[int, bool]]  # token id, whether the loss counts it
Rules = Sequence[tuple[str, Any]]  # (regex, what it stands for); the first that is found in a name applies


def no_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """`unused` of a base that runs all of its tensors."""
    return {}


def squash(config: Any) -> str:
    """`picture_fit` of a base that sees the whole picture, its aspect ratio not kept."""
    return "squash"


def nothing_frozen(**options: Any) -> tuple[str, ...]:
    """`frozen_projector` of a base whose whole projector trains."""
    return ()


@dataclasses.dataclass(frozen=True)
class Family:
    """What a base's module says, under the same names; a field with a default may be left out.

    The model
      Config             a frozen dataclass; `CONFIG` below lists what it has
      SIZES              Config by name of a size; "tiny" for tests and `selfcheck`, the first for `plan`
      Encoder            Encoder(config, rngs=): pixels (B, H, W, 3), normalised -> features (B, rows * cols, D)
      Projector          Projector(config, rngs=, **options): (features (B, M, D), mask (B, M) bool, layout) -> tokens
                         (B, their number, K); layout: (rows, cols) of a picture, (length,) of a sequence.
                         `token_layout(layout)`: the layout of the tokens, which depends on nothing else
      LLM                LLM(config, rngs=): the language model; `LLM_METHODS` below lists its methods
      PROJECTOR_OPTIONS  switches of the projector and their values: fields of the run's config
      frozen_projector   (**options) -> regexes of the projector's leaves that never train

    Published files
      PUBLISHED          which model to download, for messages
      MODEL_TYPES        what its config.json has as `model_type`
      FIELDS             the tables of its files' fields by title (docs/config_fields.md)
      VISION_FIELD       the field of config.json that names a vision tower that is published apart; None: there is none
      check_image_processor  (config, the file's content, its path): raises UserError for another image transform
      PREFIX             of canonical names, by "encoder", "projector" and "llm"; behind it stand attribute paths
      CANONICAL          published name -> canonical name, as (regex, replacement)
      IGNORED            regexes of canonical names of tensors that are kept but never loaded
      unused             (config) -> shapes, by canonical name, of weights that are kept but never run
      SHARDING           canonical name -> PartitionSpec of the tensor, as (regex, spec)

    Pictures and text
      MEAN, STD          of RGB pixels / 255
      RESIZE             how a frame becomes a square: a key of `data_pipeline.media.decode.RESIZE`
      picture_fit        (config) -> how a picture does: a key of `data_pipeline.media.pictures.FIT`
      Tokenizer          Tokenizer(folder): encode(text), decode(ids, keep_special=), special(token), size, stop_ids
      check_tokenizer    (tokenizer, config, content of config.json, folder): raises UserError for another model's
      prompt             (tokenizer, config, question, answer or None, labels, picture=) -> the segments before and
                         behind the visual tokens
    """

    name: str
    Config: type
    SIZES: Mapping[str, Any]
    Encoder: type
    Projector: type
    LLM: type
    PUBLISHED: str
    MODEL_TYPES: Sequence[str]
    check_image_processor: Callable[[Any, dict[str, Any], str], None]
    PREFIX: Mapping[str, str]
    SHARDING: Rules
    MEAN: tuple[float, float, float]
    STD: tuple[float, float, float]
    RESIZE: str
    Tokenizer: type
    prompt: Callable[..., tuple[Segment, Segment]]
    PROJECTOR_OPTIONS: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    frozen_projector: Callable[..., tuple[str, ...]] = nothing_frozen
    FIELDS: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    VISION_FIELD: str | None = None
    CANONICAL: Rules = ()
    IGNORED: Sequence[str] = ()
    unused: Callable[[Any], dict[str, tuple[int, ...]]] = no_tensors
    picture_fit: Callable[[Any], str] = squash
    check_tokenizer: Callable[[Any, Any, dict[str, Any], str], None] = lambda *_: None


CONFIG = {  # attributes of a Config -> what they are
    "image_size": "width and height of a picture in pixels",
    "grid": "rows and columns of a picture's features, which come in raster order",
    "feature_size": "width D of a feature",
    "hidden_size": "width K of a token",
    "vocab_size": "rows of the embedding table",
    "max_position_embeddings": "tokens of the longest text",
    "num_attention_heads": "heads of the language model",
    "head_dim": "width of such a head",
    "window": "how many keys its narrowest layer sees, None: all before a query",
}
LLM_METHODS = {  # methods and properties of an LLM -> what they are
    "embed": "(token_ids (B, S), dtype) -> (B, S, K)",
    "init_cache": "(batch, length, dtype) -> empty keys and values, (layers, batch, heads, head_dim, length) each",
    "context_class": "(length of a prompt) -> prompts of one class share the keys of what they share",
    "__call__": "(embeds, position_ids, mask, cache=, cache_index=, context_length=, remat=) -> (B, S, K), cache",
    "logits": "(hidden (..., K)) -> (..., vocab_size) fp32",
    "head": "the module whose weight makes the logits: a Linear, or an Embedding that is tied; never in 8 bits",
}
METHODS = {  # class -> what it must have
    "Config": ("from_published",),
    "Encoder": ("__call__",),
    "Projector": ("__call__", "token_layout"),
    "LLM": tuple(LLM_METHODS),
    "Tokenizer": ("encode", "decode", "special"),
}


def known_families() -> list[str]:
    """The image LLMs that the project has: the files of this folder."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(p.stem for p in files if p.stem not in ("__init__", "contract"))


def load_family(name: str) -> Family:
    """The family of that name, or at that dotted path.

    Raises UserError, in one line, for a name that is not known, a module that cannot be imported, and everything that
    its module lacks of the contract.
    """
    module = import_family(name)
    fields = {field.name: field for field in dataclasses.fields(Family) if field.name != "name"}
    found = {name: getattr(module, name) for name in fields if hasattr(module, name)}
    if lacking := missing(fields, found):
        raise UserError(f"{module.__name__}: no base, it lacks {', '.join(lacking)} (see docs/new_base.md)")
    return Family(name=name, **({"check_tokenizer": functools.partial(try_prompt, found["prompt"])} | found))


def missing(fields: Mapping[str, dataclasses.Field], found: Mapping[str, Any]) -> list[str]:
    """What a module whose attributes are `found` lacks of the contract."""
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
    """The module of a family, by the name of a file of this folder or by its dotted path."""
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
    except Exception as error:  # a user's module may raise anything
        kind = type(error).__name__
        raise UserError(f"family {name:.80}: its module raises {kind}: {in_one_line(error)}; correct it") from error


def in_one_line(error: Exception) -> str:
    """What an exception says, shortened."""
    return " ".join(str(error).split())[:200]


def try_prompt(prompt: Callable, tokenizer: Any, config: Any, published: dict[str, Any], where: str) -> None:
    """`check_tokenizer` by default: making a prompt raises UserError where the tokenizer lacks one of its markers."""
    prompt(tokenizer, config, "What happens?", None)
