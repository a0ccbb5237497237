"""The type and the bounds of every config field.

A base and a video representation state the values of their own fields (`build.config_fields`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipeline.common.errors import UserError, did_you_mean
from data_pipeline.media.sampling import sampling_name
from redvillm_jax.modules.attention import KERNELS
from redvillm_jax.modules.layers import KEPT

Bound = Callable[[Any], str]  # what is expected instead of a value, "" where the value is right
Fields = Mapping[str, "Bound | Fields"]


def whole(least: int, most: int) -> Bound:
    """An integer, both bounds included."""
    expected = f"a whole number from {least} to {most}"
    return lambda value: "" if type(value) is int and least <= value <= most else expected


def number(least: float, most: float, *, above: bool = False) -> Bound:
    """A number, both bounds included, or more than the lower one."""
    expected = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"

    def bound(value: Any) -> str:
        fits = type(value) in (int, float) and least <= value <= most  # nan is not
        return "" if fits and not (above and value == least) else expected

    return bound


def one_of(*values: Any) -> Bound:
    """One of a few values, of their type."""
    expected = f"one of {', '.join(map(str, values))}"
    return lambda value: "" if any(type(value) is type(one) and value == one for one in values) else expected


def text(value: Any) -> str:
    """Any string."""
    return "" if isinstance(value, str) else "a text"


def sampling(value: Any) -> str:
    """A rule of `data_pipeline.media.sampling`, as stores name it."""
    try:
        name = sampling_name(value) if isinstance(value, str) else None
    except ValueError:
        name = None
    return "" if name is not None and name == value else name or "uniform, fps=F or every=N, e.g. fps=1, every=8"


def remat(value: Any) -> str:
    """What the backward pass computes again."""
    known = isinstance(value, str) and (value in ("none", "full") or set(value.split(",")) <= set(KEPT))
    return "" if known else f"none, full, or names out of {','.join(KEPT)} to be kept"


def axis(value: Any) -> str:
    """A size of the mesh."""
    right = type(value) is int and (value == -1 or 1 <= value <= 2**20)
    return "" if right else "a number of devices, or -1 for the rest"


SWITCH = one_of(True, False)
RATE = {group: number(0, 1e4) for group in ("spatial", "temporal", "extra_mlp")}
DECAY = {group: number(0, 10) for group in ("spatial", "temporal", "extra_mlp")}

FIELDS: Fields = {
    "family": text,
    "base": text,
    "data": text,
    "seed": whole(0, 2**32 - 1),  # jax's random numbers know no more bits
    "video": text,
    "num_frames": whole(1, 10_000),
    "sampling": sampling,
    "temporal_init": one_of("copy", "random"),
    "train_spatial": SWITCH,
    "extra_mlp": SWITCH,
    "language": text,
    "labels": one_of("answer", "finetune"),
    "pack": SWITCH,
    "row_length": whole(0, 2**20),
    "num_epochs": whole(1, 10_000),
    "batch_questions": whole(1, 2**20),
    "learning_rate": number(0, 1, above=True),
    "learning_rate_scale": RATE,
    "weight_decay": DECAY,
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
    found = next(wrong(config, fields, whose, "config"), None)
    if found is not None:
        raise UserError(found)


def wrong(config: Mapping[str, Any], fields: Fields, whose: str, path: str) -> Iterator[str]:
    """What is wrong with a config, in words."""
    for name in sorted(config.keys() - fields.keys(), key=str):
        yield f"{path}.{name} is no field of {whose}{did_you_mean(str(name), fields) or '; take it out'}"
    for name, bound in fields.items():
        where, value = f"{path}.{name}", config.get(name)
        if name not in config:
            yield f"{where} is missing, which {whose} has; start from a file of configs/"
        elif isinstance(bound, Mapping):
            if isinstance(value, Mapping):
                yield from wrong(value, bound, whose, where)
            else:
                yield f"{where} is {value!r:.80}, expected values for {', '.join(bound)}"
        elif expected := bound(value):
            yield f"{where} is {value!r:.80}, expected {expected}"
