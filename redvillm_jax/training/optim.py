"""Makes AdamW for the projectors: groups by regex, frozen leaves, warm-up and cosine as Hugging Face has them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

FROZEN = "frozen"


def label_tree(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """Returns the group of every leaf, by the first rule (regex, group) that matches its dotted path ("spatial.query").

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
    """Returns a schedule: linear from 0 over ceil(warmup_ratio * total_steps) steps, then a half cosine to 0.

    Step 0 has rate 0, as in transformers' get_cosine_schedule_with_warmup, the schedule of Video-ChatGPT.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    longer = max(total_steps, warmup + 1)  # optax needs a decay step, even if the run ends with the warm-up
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
    """Makes AdamW(0.9, 0.999, 1e-8) per group, after one clip by the norm over all groups.

    labels: of `label_tree`. learning_rate, weight_decay: by group. The gradients of "frozen" leaves are set to zero
    before the norm is computed, and their updates are zero.
    """
    groups = {
        group: optax.adamw(
            warmup_cosine(learning_rate[group], total_steps, warmup_ratio), weight_decay=weight_decay[group]
        )
        for group in sorted(set(jax.tree.leaves(labels)) - {FROZEN})
    }
    frozen = jax.tree.map(lambda label: label == FROZEN, labels)
    return optax.chain(
        optax.masked(optax.set_to_zero(), frozen),
        optax.clip_by_global_norm(clip_norm),
        optax.partition(groups | {FROZEN: optax.set_to_zero()}, labels),
    )
