"""The choice of a token, against transformers' processors and by counting draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from redvillm_jax.inference.sampler import Sampling, choose, keep_likely

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(scale=3, size=(4, 50)).astype(np.float32)
SEEN = RANDOM.random((4, 50)) < 0.3
KEYS = jax.random.split(jax.random.key(0), 4)


def reference(sampling: Sampling) -> np.ndarray:
    """Probabilities by transformers, its processors in the order in which `generate` applies them."""
    import torch
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.tensor(LOGITS)
    ids = [torch.tensor(np.flatnonzero(row))[None] for row in SEEN]
    penalize = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    scores = torch.cat([penalize(i, row[None]) for i, row in zip(ids, scores, strict=True)])
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, scores).softmax(-1).numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=2.0, top_k=20, top_p=0.5, repetition_penalty=1.3),
        Sampling(temperature=0.2, top_p=1e-6),
    ],
)
def test_tokens_are_drawn_as_transformers_would(sampling):
    want = reference(sampling)
    penalized = np.where(LOGITS > 0, LOGITS / sampling.repetition_penalty, LOGITS * sampling.repetition_penalty)
    logits = np.where(SEEN, penalized, LOGITS)
    order = np.argsort(-logits, axis=-1)
    likely = keep_likely(jnp.take_along_axis(jnp.asarray(logits), order, axis=-1), sampling)
    got = np.zeros_like(want)
    np.put_along_axis(got, order, np.asarray(jax.nn.softmax(likely)), axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-5)

    draws = 3000
    keys = jax.random.split(jax.random.key(1), draws)
    row = jnp.broadcast_to(LOGITS[0], (draws, 50)), jnp.broadcast_to(SEEN[0], (draws, 50))
    drawn = np.bincount(np.asarray(choose(*row, sampling, keys)), minlength=50) / draws
    assert (drawn[want[0] == 0] == 0).all()
    np.testing.assert_allclose(drawn, want[0], atol=0.04)


def test_without_a_temperature_the_most_likely_token_wins():
    assert choose(LOGITS, SEEN, Sampling(), KEYS).tolist() == LOGITS.argmax(-1).tolist()
    penalized = np.where(SEEN, np.where(LOGITS > 0, LOGITS / 5, LOGITS * 5), LOGITS).argmax(-1)
    assert choose(LOGITS, SEEN, Sampling(repetition_penalty=5.0), KEYS).tolist() == penalized.tolist()
    assert penalized.tolist() != LOGITS.argmax(-1).tolist()


def test_a_row_draws_the_same_beside_other_rows():
    sampling = Sampling(temperature=3.0)
    together = choose(LOGITS, SEEN, sampling, KEYS).tolist()
    alone = [int(choose(LOGITS[i : i + 1], SEEN[i : i + 1], sampling, KEYS[i : i + 1])[0]) for i in range(4)]
    assert together == alone
