"""The type and the bounds of every common config field.

Bases and video representations state the bounds of their own fields; `settings.config_fields` puts all together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.common.errors import UserError, did_you_mean
from data_pipeline.media.sampling import sampling_name
from redvillm_jax.modules.attention import KERNELS
from redvillm_jax.modules.bounds import Bound, number, one_of, text, whole
from redvillm_jax.modules.layers import KEPT

Fields = Mapping[str, "Bound | Fields"]


def sampling(value: Any) -> str:
    """Bounds `sampling`: a rule of `data_pipeline.media.sampling`, in the spelling of stores."""
    try:
        name = sampling_name(value) if isinstance(value, str) else None
    except ValueError:
        name = None
    return "" if name is not None and name == value else name or "uniform, fps=F or every=N, e.g. fps=1, every=8"


def remat(value: Any) -> str:
    """Bounds `remat`: none, full, or the names of the activations that are kept."""
    known = isinstance(value, str) and (value in ("none", "full") or set(value.split(",")) <= set(KEPT))
    return "" if known else f"none, full, or names out of {','.join(KEPT)} to be kept"


def axis(value: Any) -> str:
    """Bounds the size of a mesh axis."""
    right = type(value) is int and (value == -1 or 1 <= value <= 2**20)
    return "" if right else "a number of devices, or -1 for the rest"


SWITCH = one_of(True, False)
RATE, DECAY = number(0, 1e4), number(0, 10)  # the bounds for each optimizer group

FIELDS: Fields = {
    "family": text,
    "base": text,
    "data": text,
    "seed": whole(0, 2**32 - 1),  # a jax random key takes 32 bits
    "video": text,
    "num_frames": whole(1, 10_000),
    "sampling": sampling,
    "language": text,
    "labels": one_of("answer", "finetune"),
    "pack": SWITCH,
    "row_length": whole(0, 2**20),
    "num_epochs": whole(1, 10_000),
    "batch_questions": whole(1, 2**20),
    "learning_rate": number(0, 1, above=True),
    "warmup_ratio": number(0, 1),
    "clip_norm": number(0, 1e9, above=True),
    "dtype": one_of("bfloat16", "float32"),
    "remat": remat,
    "int8": SWITCH,
    "attention": one_of(*KERNELS),
    "mesh": {"data": axis, "fsdp": axis, "tensor": axis},
    "num_workers": whole(0, 1024),
    "log_every": whole(1, 10**9),
    "checkpoint_every": whole(1, 10**9),
    "keep_checkpoints": whole(1, 10**6),
}


def check_fields(config: Mapping[str, Any], fields: Fields, whose: str = "this config") -> None:
    """Raises UserError unless the config has these fields and no others, each within its bounds."""
    found = next(problems(config, fields, whose, "config"), None)
    if found is not None:
        raise UserError(found)


def problems(config: Mapping[str, Any], fields: Fields, whose: str, path: str) -> Iterator[str]:
    """Yields a message for each field that is unknown, missing or out of bounds."""
    for name in sorted(config.keys() - fields.keys(), key=str):
        yield f"{path}.{name} is no field of {whose}{did_you_mean(str(name), fields) or '; take it out'}"
    for name, bound in fields.items():
        where, value = f"{path}.{name}", config.get(name)
        if name not in config:
            yield f"{where} is missing, which {whose} has; start from a file of configs/"
        elif isinstance(bound, Mapping):
            if isinstance(value, Mapping):
                yield from problems(value, bound, whose, where)
            else:
                yield f"{where} is {value!r:.80}, expected values for {', '.join(bound)}"
        elif expected := bound(value):
            yield f"{where} is {value!r:.80}, expected {expected}"
