"""The optimizer: groups, the schedule, and what frozen leaves must not do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from redvillm_jax.training.optim import FROZEN, label_tree, make_optimizer, warmup_cosine

RULES = [(r"spatial\.fixed", FROZEN), (r"spatial\.", "spatial"), (r"temporal\.", "temporal")]
PARAMS = {"spatial": {"fixed": jnp.ones(2), "weight": jnp.ones(2)}, "temporal": {"weight": jnp.ones(2)}}


def optimizer(**changes):
    settings = {
        "learning_rate": {"spatial": 1e-2, "temporal": 1e-3},
        "weight_decay": {"spatial": 0.0, "temporal": 0.0},
        "total_steps": 100,
        "warmup_ratio": 0.0,
        "clip_norm": 1.0,
    }
    return make_optimizer(label_tree(PARAMS, RULES), **settings | changes)


def test_first_rule_that_matches_labels_a_leaf():
    labels = label_tree(PARAMS, RULES)
    assert labels == {"spatial": {"fixed": FROZEN, "weight": "spatial"}, "temporal": {"weight": "temporal"}}


def test_a_leaf_without_a_rule_raises():
    with pytest.raises(ValueError, match=r"temporal\.weight"):
        label_tree(PARAMS, RULES[:2])


@pytest.mark.parametrize(
    ("steps", "ratio"), [(1, 0.0), (1, 0.03), (10, 0.0), (10, 1.0), (54, 0.03), (1000, 0.5), (9375, 0.03)]
)
def test_schedule_is_hugging_faces_cosine(steps, ratio):
    from torch import nn, optim
    from transformers import get_cosine_schedule_with_warmup

    warmup = math.ceil(ratio * steps)
    reference = get_cosine_schedule_with_warmup(optim.SGD(nn.Linear(1, 1).parameters(), lr=2e-5), warmup, steps)
    want = [2e-5 * reference.lr_lambdas[0](step) for step in range(steps)]
    ours = jax.vmap(warmup_cosine(2e-5, steps, ratio))(jnp.arange(steps))
    np.testing.assert_allclose(ours, want, rtol=0, atol=3e-7 * 2e-5)


def test_groups_have_their_own_rate_and_frozen_leaves_do_not_move():
    tx = optimizer(weight_decay={"spatial": 0.5, "temporal": 0.5})
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["spatial"]["fixed"], 0)
    np.testing.assert_allclose(updates["spatial"]["weight"], -1e-2 * 1.5, rtol=1e-5)  # Adam's first step is the rate
    np.testing.assert_allclose(updates["temporal"]["weight"], -1e-3 * 1.5, rtol=1e-5)


def test_a_frozen_gradient_does_not_count_in_the_clip():
    small = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), PARAMS)
    huge = {**small, "spatial": {**small["spatial"], "fixed": jnp.full(2, 1e6)}}
    states = [optimizer().update(grads, optimizer().init(PARAMS), PARAMS)[1] for grads in (small, huge)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_clip_is_over_all_groups_together():
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), PARAMS)
    state = optimizer().update(grads, optimizer().init(PARAMS), PARAMS)[1]
    first_moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and (leaf > 0).all()]
    clipped = 10 / np.sqrt(4 * 10**2)
    assert any(np.allclose(leaf, 0.1 * clipped) for leaf in first_moments)
    assert isinstance(optimizer(), optax.GradientTransformation)


def test_groups_have_one_order_in_every_process():
    """A set of names has another order in each process, and so would the program that each of several hosts lowers."""
    names = [f"group_{i}" for i in range(16)]
    params = {name: jnp.ones(1) for name in names}
    labels = label_tree(params, [(name + "$", name) for name in names])
    rates = dict.fromkeys(names, 1e-3)
    tx = make_optimizer(labels, learning_rate=rates, weight_decay=rates, total_steps=9, warmup_ratio=0.0, clip_norm=1.0)
    *_, groups = tx.init(params)
    assert list(groups.inner_states) == [*sorted(names), FROZEN]
