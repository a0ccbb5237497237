"""AdamW for the projectors: groups by regex, fixed leaves untouched, the schedule of Hugging Face's cosine."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

FROZEN = "frozen"


def label_tree(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """The group of every leaf: the first rule (regex, group) that matches its dotted path, e.g. "spatial.query".

    Raises ValueError for a leaf that no rule matches.
    """

    def label(path: tuple, _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        group = next((group for pattern, group in rules if re.match(pattern, name)), None)
        if group is None:
            raise ValueError(f"no optimizer rule matches the trainable leaf {name!r}")
        return group

    return jax.tree_util.tree_map_with_path(label, params)


def warmup_cosine(peak: float, total_steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 over ceil(warmup_ratio * total_steps) steps, then a half cosine to 0.

    As transformers' get_cosine_schedule_with_warmup, which Video-ChatGPT trained with: step 0 has rate 0.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    longer = max(total_steps, warmup + 1)  # optax needs a decay, also where the run ends with the warmup
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, longer)


def make_optimizer(
    labels: Any,
    *,
    learning_rate: Mapping[str, float],
    weight_decay: Mapping[str, float],
    total_steps: int,
    warmup_ratio: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW(0.9, 0.999, 1e-8) per group after one clip by the norm over all groups; "frozen" leaves get zero.

    labels: the groups of `label_tree`; learning_rate and weight_decay: by group. Frozen leaves are zeroed before
    the norm is taken, so they do not count in it.
    """
    groups = {
        group: optax.adamw(
            warmup_cosine(learning_rate[group], total_steps, warmup_ratio), weight_decay=weight_decay[group]
        )
        for group in set(jax.tree.leaves(labels)) - {FROZEN}
    }
    frozen = jax.tree.map(lambda label: label == FROZEN, labels)
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen),
        optax.clip_by_global_norm(clip_norm),
        optax.partition(groups | {FROZEN: optax.set_to_zero()}, labels),
    )
