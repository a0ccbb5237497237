"""The shared decoder with every option that it has, against transformers' own classes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import fill
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.attention import Masks, row_attention, window_masks
from redvillm_jax.modules.llama import LlamaDecoder
from redvillm_jax.modules.llama_fields import read_decoder

LENGTH, PREFIX = 40, 17
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "head_dim": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=20)),
    "linear": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}),
    ),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            head_dim=16,
            rope_parameters=LLAMA_3 | {"original_max_position_embeddings": 24, "rope_theta": 1000.0},
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2 window": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
}


@functools.cache
def models(name: str) -> tuple[torch.nn.Module, LlamaDecoder]:
    """transformers' model with large random weights, biases included, and ours with the same."""
    kind, config = CASES[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 1)
    published = json.loads(json.dumps(model.config.to_dict()))
    ours = nnx.eval_shape(lambda: LlamaDecoder(read_decoder(published, "config.json"), rngs=nnx.Rngs(0)))
    return model, fill(ours, {name: tensor.numpy() for name, tensor in model.state_dict().items()}, "")


def ids(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 60, (rows, LENGTH))


@jax.jit
def logits(llm: LlamaDecoder, token_ids: jax.Array, position_ids: jax.Array, masks: Masks) -> jax.Array:
    return llm.logits(llm(llm.embed(token_ids, jnp.float32), position_ids, masks)[0])


def texts(rows: int, window: int | None, length: int = LENGTH) -> tuple[jax.Array, Masks]:
    """Positions and masks of rows that hold one text each."""
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, row_attention(0 * positions, 0 * positions, positions, window=window)


@jax.jit
def cached_logits(llm: LlamaDecoder, token_ids: jax.Array) -> jax.Array:
    """Logits behind a prefix: the prefix at once, then token by token, into slots that lie 9 further on."""
    rows, length = token_ids.shape
    gap, slots = 9, jnp.arange(length + 9)
    embeds = llm.embed(token_ids, jnp.float32)
    cache = llm.init_cache(rows, length + gap, jnp.float32)
    window, positions = llm.config.window, jnp.broadcast_to(jnp.arange(length), (rows, length))
    _, cache = llm(embeds[:, :PREFIX], *texts(rows, window, PREFIX), cache=cache)
    keys = jnp.broadcast_to(jnp.where(slots < PREFIX, slots, slots - gap), (rows, length + gap))

    def step(cache, at):
        seen = (slots < PREFIX) | ((slots >= PREFIX + gap) & (slots <= at + gap))
        mask = jnp.broadcast_to(seen, (rows, 1, length + gap))
        one, place = (jax.lax.dynamic_slice_in_dim(x, at, 1, axis=1) for x in (embeds, positions))
        masks = window_masks(mask, place, keys, window)
        hidden, cache = llm(one, place, masks, cache=cache, cache_index=at + gap)
        return cache, llm.logits(hidden)[:, 0]

    return jnp.moveaxis(jax.lax.scan(step, cache, jnp.arange(PREFIX, length))[1], 0, 1)


@pytest.mark.parametrize("name", CASES)
def test_every_option_computes_what_transformers_computes(name):
    theirs, ours = models(name)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids())).logits.numpy()
    scale = np.abs(want).max()
    np.testing.assert_allclose(logits(ours, ids(), *texts(2, ours.config.window)), want, atol=1e-4 * scale)
    np.testing.assert_allclose(cached_logits(ours, ids()), want[:, PREFIX:], atol=1e-4 * scale)


def test_the_options_matter():
    """A case whose option did nothing would prove nothing."""
    for name, changes in {
        "llama3": {"rope_scaling": None},
        "mistral": {"layer_kinds": ()},
        "qwen2 window": {"layer_kinds": ("window",) * 3},
    }.items():
        _, ours = models(name)
        rows = texts(2, ours.config.window)
        want = logits(ours, ids(), *rows)
        graphdef, weights = nnx.split(ours)
        changed = nnx.merge(graphdef, weights)
        changed.config = type(ours.config)(**{**vars(ours.config), **changes})
        assert np.abs(logits(changed, ids(), *rows) - want).max() > 1, name


PACKED = [(1, 0, 11), (1, 1, 6), (1, 2, 9), (2, 0, 5), (2, 3, 12), (0, 0, 3)]  # group, question, length


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """group_ids, question_ids and position_ids of a row: two groups, the first with two questions, and padding."""
    groups, questions = (np.concatenate([[part[i]] * part[2] for part in PACKED]) for i in (0, 1))
    starts = {1: 11, 2: 11, 3: 5}  # a question goes on where its prefix ends
    positions = np.concatenate([np.arange(n) + starts.get(question, 0) for _, question, n in PACKED])
    return groups, questions, positions


@pytest.mark.parametrize("name", ["mistral", "qwen2 window"])
def test_packed_questions_are_answered_as_if_alone(name):
    _, ours = models(name)
    groups, questions, positions = packed()
    token_ids = ids(1)[0].repeat(2)[: len(groups)]
    window, ids_of_row = ours.config.window, (jnp.array(x)[None] for x in (groups, questions, positions))
    masks = row_attention(*ids_of_row, window=window)
    got = np.asarray(logits(ours, token_ids[None], positions[None], masks))[0]
    for group, question in ((1, 2), (2, 3)):
        prefix, own = (groups == group) & (questions == 0), (groups == group) & (questions == question)
        alone = np.concatenate([token_ids[prefix], token_ids[own]])
        n = len(alone)
        want = logits(ours, alone[None], *texts(1, window, n))[0]
        np.testing.assert_allclose(got[own], want[prefix.sum() :], atol=1e-3)


def test_layers_of_both_kinds_are_one_traced_block():
    _, ours = models("qwen2 window")
    program = logits.trace(ours, ids(), *texts(2, 7)).lower().as_text()
    assert program.count("stablehlo.while") == 1
    assert program.count("stablehlo.exponential") == 2  # of one softmax and one SiLU


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rope_parameters.rope_type is "yarn"'),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ("llama3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters and rope_scaling differ"),
        ("llama", {"attention_bias": True}, "attention_bias is true, supported: false"),
        ("llama", {"sliding_window": 5}, "sliding_window is 5, supported: null"),
        ("head_dim", {"head_dim": 7}, "head_dim is 7, supported: an even number above 2"),
        ("qwen2 window", {"layer_types": ["full_attention"]}, "layer_types has 1 layers, supported: 3"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is "),
        ("qwen2", {"model_type": "gemma"}, 'model_type is "gemma", supported: "llama" or "mistral" or "qwen2"'),
        ("qwen2", {"new_field": 1}, "not known: new_field"),
    ],
)
def test_what_it_does_not_compute_is_refused(name, change, message):
    published = json.loads(json.dumps(CASES[name][1].to_dict()))
    with pytest.raises(UserError, match=message) as caught:
        read_decoder(published | change, "config.json")
    assert "\n" not in str(caught.value)
