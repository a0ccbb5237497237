"""The Gemma 3 decoder against transformers' Gemma3ForCausalLM, and the table of its config."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Gemma3ForCausalLM
from transformers import Gemma3TextConfig as Published

from data_pipeline.common.errors import UserError
from redvillm_jax.modules.attention import Masks, row_attention, window_masks
from redvillm_jax.modules.config_fields import READ
from redvillm_jax.modules.gemma3 import Gemma3Decoder, Rope, angles_of
from redvillm_jax.modules.gemma3_fields import GEMMA3_TEXT, read_gemma3_text
from redvillm_jax.modules.llama import RopeScaling
from tests.helpers import ParityTable, fill

LENGTH, PREFIX = 20, 11
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def published() -> dict:
    return json.loads(Published(**SIZES).to_json_string())


@functools.cache
def models() -> tuple[Gemma3ForCausalLM, Gemma3Decoder]:
    """transformers' model with random weights, norms included, and ours with the same."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Published(**SIZES, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    ours = nnx.eval_shape(lambda: Gemma3Decoder(read_gemma3_text(published(), "config.json"), rngs=nnx.Rngs(0)))
    return model, fill(ours, tensors, "")


def ids(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 60, (rows, LENGTH))


def texts(rows: int, length: int = LENGTH) -> tuple[jax.Array, Masks]:
    """Positions and masks of rows that hold one text each."""
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, row_attention(0 * positions, 0 * positions, positions, window=SIZES["sliding_window"])


@jax.jit
def layer_outputs(llm: Gemma3Decoder, embeds: jax.Array, positions: jax.Array, masks: Masks) -> jax.Array:
    """The outputs of all layers: (layers, B, S, K)."""
    graphdef, weights = nnx.split(llm.model.layers.block)
    ropes = llm.config.full_rope, llm.config.window_rope
    angles = [angles_of(rope, positions, llm.config.head_dim) for rope in ropes]

    def body(x, layer):
        x, _ = nnx.merge(graphdef, layer[0])(x, angles, masks, 0, layer[1], None)
        return x, x

    windowed = jnp.array([kind == "window" for kind in llm.config.layer_kinds])
    return jax.lax.scan(body, embeds, (weights, windowed))[1]


def test_every_stage_computes_what_transformers_computes():
    theirs, ours = models()
    tokens, table = torch.from_numpy(ids()), ParityTable("gemma3_text")
    embeds = theirs.model.embed_tokens(tokens).detach().requires_grad_()
    out = theirs(inputs_embeds=embeds, output_hidden_states=True)
    weights = torch.from_numpy(np.random.default_rng(2).standard_normal(out.logits.shape).astype(np.float32))
    (out.logits * weights).sum().backward()

    ours_embeds = ours.embed(jnp.asarray(ids()), jnp.float32)
    table.add("embeddings", ours_embeds, embeds.detach().numpy())
    layers = layer_outputs(ours, ours_embeds, *texts(2))
    for i in (0, 1):  # transformers shows the last layer's output behind the norm
        table.add(f"layer {i}", layers[i], out.hidden_states[i + 1].detach().numpy())

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def total(llm, embeds):
        hidden, _ = llm(embeds, *texts(2))
        logits = llm.logits(hidden)
        return (logits * weights.numpy()).sum(), (hidden, logits)

    (_, (hidden, logits)), gradient = total(ours, ours_embeds)
    table.add("last norm", hidden, out.hidden_states[-1].detach().numpy())
    table.add("logits", logits, out.logits.detach().numpy())
    table.add_gradient("gradient of the embeddings", gradient, embeds.grad.numpy())
    table.write()
    table.check()


@jax.jit
def cached_logits(llm: Gemma3Decoder, token_ids: jax.Array) -> jax.Array:
    """Logits behind a prefix: the prefix at once, then token by token, into slots that lie 9 further on."""
    rows, length = token_ids.shape
    gap, slots, window = 9, jnp.arange(length + 9), SIZES["sliding_window"]
    embeds = llm.embed(token_ids, jnp.float32)
    cache = llm.init_cache(rows, length + gap, jnp.float32)
    _, cache = llm(embeds[:, :PREFIX], *texts(rows, PREFIX), cache=cache)
    keys = jnp.broadcast_to(jnp.where(slots < PREFIX, slots, slots - gap), (rows, length + gap))

    def step(cache, at):
        seen = (slots < PREFIX) | ((slots >= PREFIX + gap) & (slots <= at + gap))
        one = jax.lax.dynamic_slice_in_dim(embeds, at, 1, axis=1)
        position = jnp.broadcast_to(at, (rows, 1))
        masks = window_masks(jnp.broadcast_to(seen, (rows, 1, length + gap)), position, keys, window)
        hidden, cache = llm(one, position, masks, cache=cache, cache_index=at + gap)
        return cache, llm.logits(hidden)[:, 0]

    return jnp.moveaxis(jax.lax.scan(step, cache, jnp.arange(PREFIX, length))[1], 0, 1)


def test_decoding_with_a_cache_equals_transformers():
    theirs, ours = models()
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids())).logits.numpy()[:, PREFIX:]
    np.testing.assert_allclose(cached_logits(ours, ids()), want, atol=1e-4)


def test_packed_questions_are_answered_as_if_alone():
    _, ours = models()
    parts = [(1, 0, 8), (1, 1, 5), (1, 2, 4), (2, 0, 3), (0, 0, 2)]  # group, question, length
    groups, questions = (np.concatenate([[part[i]] * part[2] for part in parts]) for i in (0, 1))
    positions = np.concatenate([np.arange(n) + 8 * (question > 0) for _, question, n in parts])
    tokens = np.random.default_rng(3).integers(0, 60, len(groups))

    @jax.jit
    def logits(*row):
        masks = row_attention(*row[:3], window=SIZES["sliding_window"])
        return ours.logits(ours(ours.embed(row[3], jnp.float32), row[2], masks)[0])

    got = np.asarray(logits(*(jnp.asarray(x)[None] for x in (groups, questions, positions, tokens))))[0]
    for question in (1, 2):
        own = (groups == 1) & (questions == question)
        alone = np.concatenate([tokens[:8], tokens[own]])[None]
        row = 0 * alone + 1, 0 * alone, np.arange(alone.shape[1])[None], alone
        np.testing.assert_allclose(got[own], logits(*map(jnp.asarray, row))[0, 8:], atol=1e-4)


def test_bfloat16_rounds_embeddings_as_transformers():
    theirs, ours = models()
    embed = Gemma3ForCausalLM(Published(**SIZES)).to(torch.bfloat16).model.embed_tokens
    embed.weight.data.copy_(theirs.model.embed_tokens.weight)
    want = embed(torch.from_numpy(ids())).detach().float().numpy()
    np.testing.assert_array_equal(ours.embed(jnp.asarray(ids()), jnp.bfloat16).astype(jnp.float32), want)


# ---- config.json


def test_a_config_is_read():
    config = read_gemma3_text(published(), "config.json")
    assert config.layer_kinds == ("window", "full", "window") and config.window == 5
    assert config.full_rope == Rope(1e6, RopeScaling("linear", 8.0)) and config.window_rope == Rope(1e4)
    old = {k: v for k, v in published().items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert read_gemma3_text(old, "config.json") == config
    defaults = read_gemma3_text({"model_type": "gemma3_text"}, "config.json")
    assert defaults == read_gemma3_text(json.loads(Published().to_json_string()), "config.json")
    assert defaults.layer_kinds.count("full") == 4 and defaults.full_rope == Rope(1e6)


def test_the_table_has_every_field_of_the_class():
    written = Published().to_dict() | {field.name: 0 for field in dataclasses.fields(Published)}
    unknown = set(written) - set(GEMMA3_TEXT) - {"default_theta", "transformers_version", "keys_to_ignore_at_inference"}
    assert not {name for name in unknown if not name.startswith("base_model_")}
    defaults = Published()
    for name, field in GEMMA3_TEXT.items():
        if field.effect == READ and name in written and name not in ("rope_parameters", "layer_types"):
            assert field.default == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, supported: null"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, supported: null"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true, supported: false or null"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, supported: true"),
        ({"attention_bias": True}, "attention_bias is true, supported: false"),
        ({"hidden_activation": "silu"}, 'hidden_activation is "silu", supported: "gelu_pytorch_tanh"'),
        ({"sliding_window": None}, "sliding_window is null, supported: a whole number from 1"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, supported: 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, supported: a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim is 7, supported: an even number above 2"),
        ({"rope_theta": 5e5}, "rope_theta is 500000 but rope_parameters.full_attention.rope_theta is 1e+06"),
        ({"rope_local_base_freq": 5.0}, "rope_parameters.sliding_attention.rope_theta is 10000, supported: one value"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "full_attention and rope_scaling differ"),
        ({"rope_parameters": {"rope_type": "default"}}, 'not known: rope_parameters.rope_type ("default")'),
        ({"a_new_field": 1}, "not known: a_new_field (1)"),
    ],
)
def test_what_it_does_not_compute_is_refused(change, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_gemma3_text(published() | change, "config.json")
    assert "\n" not in str(caught.value)
