"""Tables of the fields of published config.json files: a base reads a field, requires its value, or ignores it.

A table maps a field's name to its `Field`; `read_fields` checks a file against it. A field with an unsupported value,
and a field without an entry, raise UserError. Add an entry for a new field here or in the table of its base.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.common.errors import UserError

# Bounds far above all models: a larger value means a damaged file, which is refused before a module is built.
LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS, PIXELS, EPS, THETA = 1024, 4096, 2**20, 2**24, 2**31 - 1, 2**14, 1.0, 1e12

REQUIRED = object()  # the default of a field that every file must have

READ, FIXED, NOTHING = "read", "must be", "changes nothing"


@dataclasses.dataclass(frozen=True)
class Field:
    """The treatment of one field.

    effect: READ, the base computes with the value; FIXED, the base supports only these values and refuses others;
    NOTHING, the value does not change the computation. accepts: whether a value is supported. values: the supported
    values in words. default: the value of files that omit the field, `REQUIRED` if none may omit it.
    """

    effect: str
    values: str
    accepts: Callable[[Any], bool] = lambda value: True
    default: Any = None


Fields = Mapping[str, Field]


# ---- kinds of fields


def is_count(value: Any, least: int, most: int) -> bool:
    """Returns whether a value is a whole number (no boolean, no text) from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def count(default: Any, most: int, *, least: int = 1, null: str = "") -> Field:
    """A whole number that is read. null: the meaning of null, if it is allowed."""
    values = f"a whole number from {least} to {most}" + (f", or null ({null})" if null else "")
    return Field(READ, values, lambda v: (bool(null) and v is None) or is_count(v, least, most), default)


def number(default: Any, most: float) -> Field:
    """A finite number above 0 that is read."""

    def accepts(value: Any) -> bool:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and 0 < value <= most  # false for NaN, too

    return Field(READ, f"a number above 0, at most {most:g}", accepts, default)


def flag(default: Any) -> Field:
    """True or false, read."""
    return Field(READ, "true or false", lambda v: isinstance(v, bool), default)


def text(default: Any) -> Field:
    """A text that is read."""
    return Field(READ, "a text", lambda v: isinstance(v, str), default)


def mapping(default: Any, *, null: bool = False) -> Field:
    """An object with a table of its own."""
    values = "an object" + (" or null" if null else "")
    return Field(READ, values, lambda v: isinstance(v, dict) or (null and v is None), default)


def one_of(*choices: Any, default: Any) -> Field:
    """One of several values, read."""
    return Field(READ, " or ".join(map(shown, choices)), lambda v: any(same(v, c) for c in choices), default)


def only(*choices: Any, default: Any = REQUIRED, values: str = "") -> Field:
    """One of `choices`; other values are refused. The default is the first choice."""
    words = values or " or ".join(map(shown, choices))
    default = choices[0] if default is REQUIRED else default
    return Field(FIXED, words, lambda v: any(same(v, c) for c in choices), default)


def equal_to(words: str) -> Field:
    """A whole number or null; the base compares it with other fields after reading."""
    return Field(FIXED, words, lambda v: v is None or is_count(v, 1, 2**31), None)


def nothing(*names: str) -> dict[str, Field]:
    """Fields that change nothing."""
    return dict.fromkeys(names, Field(NOTHING, "anything"))


def same(value: Any, choice: Any) -> bool:
    """Returns whether two values are equal; true is not 1, and false is not 0."""
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def shown(value: Any) -> str:
    """Formats a value as in the file, shortened."""
    written = json.dumps(value, ensure_ascii=False, default=str)
    return written if len(written) <= 100 else written[:100] + "…"


# ---- reading


def read_fields(config: Any, fields: Fields, where: str, path: str = "") -> dict[str, Any]:
    """Returns the values of all read and fixed fields by name, with defaults for omitted fields.

    where: the file. path: the keys that lead to `config` in it, such as "text_config.". Raises one UserError that names
    all refused fields with their values and the supported ones, or else all fields without an entry in the table.
    """
    if not isinstance(config, dict):
        raise UserError(
            f"{where}: {path.rstrip('.') or 'it'} is {shown(config)}, expected an object; copy the file again"
        )
    wrong, values = [], {}
    for name, field in fields.items():
        if field.effect == NOTHING:
            continue
        values[name] = value = config.get(name, field.default)
        if value is REQUIRED:
            wrong.append(f"{path}{name} is missing, expected {field.values}")
        elif not field.accepts(value) and (name in config or field.effect == FIXED):
            absent = "" if name in config else "absent, which means "
            wrong.append(f"{path}{name} is {absent}{shown(value)}, supported: {field.values}")
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
    if unknown := sorted(config.keys() - fields.keys()):
        named = ", ".join(f"{path}{name} ({shown(config[name])})" for name in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(
            f"{where}: not known: {named}{more}; an unknown field may change the computation: report it, or remove it "
            "from the file if you know that it changes nothing"
        )
    return values


def require(holds: bool, where: str, problem: str) -> None:
    """Raises UserError with `problem` unless a condition on several fields holds."""
    if not holds:
        raise UserError(f"{where}: {problem}")


def check_multiple(values: dict[str, Any], name: str, of: str, where: str, path: str) -> None:
    """Raises UserError unless one field is a multiple of another."""
    fits = values[name] % values[of] == 0
    require(fits, where, f"{path}{name} is {values[name]}, supported: a multiple of {path}{of} = {values[of]}")


def head_size(values: dict[str, Any], where: str, path: str) -> int:
    """Returns hidden_size / num_attention_heads. Raises UserError unless rotary positions can rotate such heads."""
    check_multiple(values, "hidden_size", "num_attention_heads", where, path)
    heads = values["num_attention_heads"]
    size = values["hidden_size"] // heads
    fits = size % 2 == 0 and size > 2
    require(fits, where, f"{path}num_attention_heads is {heads}, supported: heads of an even size above 2, not {size}")
    return size


# ---- fields that transformers writes into every config.json

COMMON = nothing(
    *("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    *("_from_model_config", "_flash_attn_2_enabled", "_experts_implementation", "experts_implementation"),
    *("architectures", "auto_map", "custom_pipelines", "finetuning_task", "gradient_checkpointing", "name_or_path"),
    *("transformers_version", "torch_dtype", "dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "use_cache"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "xla_device"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "is_decoder"),
    *("cross_attention_hidden_size", "tie_encoder_decoder", "initializer_range", "initializer_factor"),
    # settings of sampling; this project's commands have their own
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    # dropout acts only in training of the encoder and the language model, which are frozen here
    *("attention_dropout", "dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
) | {
    "quantization_config": only(None, values="null (the weights as they were before they were quantised)"),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "pruned_heads": only({}),
}
