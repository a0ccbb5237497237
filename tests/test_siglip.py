"""SigLIP's vision transformer against transformers' own class, and the table of its config."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import SiglipVisionConfig, SiglipVisionModel

from data_pipeline.common.errors import UserError
from redvillm_jax.model.weights import name_table
from redvillm_jax.modules.config_fields import READ
from redvillm_jax.modules.siglip import SiglipConfig, SiglipEncoder, unused_shapes
from redvillm_jax.modules.siglip_fields import SIGLIP, read_siglip
from redvillm_jax.modules.vit import SHARDING
from tests.helpers import ParityTable, fill

LAYERS = 3
PUBLISHED = SiglipVisionConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    image_size=30,  # a border of two pixels lies outside the 4 x 4 patches
    patch_size=7,
)


@pytest.fixture(scope="module")
def model() -> SiglipVisionModel:
    """transformers' tower with large random weights, biases and norms included."""
    torch.manual_seed(0)
    model = SiglipVisionModel(PUBLISHED).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def config(**changes) -> SiglipConfig:
    """The tower up to its last layer and the norm behind it, read from the published config."""
    names = {field.name for field in dataclasses.fields(SiglipConfig)}
    values = read_siglip(json.loads(PUBLISHED.to_json_string()), "config.json")
    values = {name: value for name, value in values.items() if name in names}
    return SiglipConfig(**values | {"layers_used": LAYERS, "post_layernorm": True} | changes)


def shapes(config: SiglipConfig) -> SiglipEncoder:
    return nnx.eval_shape(lambda: SiglipEncoder(config, rngs=nnx.Rngs(0)))


def tower(model: SiglipVisionModel, **changes) -> SiglipEncoder:
    """Our tower with the weights of transformers'."""
    return fill(shapes(config(**changes)), {name: tensor.numpy() for name, tensor in model.state_dict().items()}, "")


def pictures() -> np.ndarray:
    """Normalised pixels: (2, 30, 30, 3)."""
    return np.random.default_rng(1).normal(size=(2, 30, 30, 3)).astype(np.float32)


def test_every_stage_is_transformers(model):
    pixels = pictures()
    with torch.no_grad():
        out = model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    table = ParityTable("siglip")
    run = jax.jit(lambda tower, pixels: tower(pixels))
    whole = tower(model)
    table.add("embeddings", whole.embeddings(pixels), out.hidden_states[0])
    for layer in range(1, LAYERS + 1):
        part = tower(model, layers_used=layer, post_layernorm=False)
        table.add(f"layer {layer}", run(part, pixels), out.hidden_states[layer])
    table.add("post_layernorm", run(whole, pixels), out.last_hidden_state)
    table.write()
    table.check()


def test_patches_may_have_other_positions(model):
    ids = (0, 0, 2, 3, 4, 4, 6, 7, 8, 9, 9, 11, 15, 14, 13, 12)
    with torch.no_grad():
        patches = model.embeddings.patch_embedding(torch.tensor(pictures()).permute(0, 3, 1, 2))
        want = patches.flatten(2).transpose(1, 2) + model.embeddings.position_embedding(torch.tensor(ids))
    np.testing.assert_allclose(tower(model, position_ids=ids).embeddings(jnp.asarray(pictures())), want, atol=1e-4)


@pytest.mark.parametrize(
    ("layers_used", "post_layernorm", "head"), [(3, True, True), (3, False, False), (1, False, True)]
)
def test_every_published_name_is_loaded_or_known_as_unused(layers_used, post_layernorm, head):
    published = SiglipVisionConfig(**PUBLISHED.to_dict() | {"vision_use_head": head})
    with torch.device("meta"):
        want = {name: tuple(tensor.shape) for name, tensor in SiglipVisionModel(published).state_dict().items()}
    ours = config(layers_used=layers_used, post_layernorm=post_layernorm, vision_use_head=head)
    loaded = {name: leaf.shape for name, leaf in name_table(shapes(ours), "").items()}
    unused = unused_shapes(ours, "")
    assert loaded | unused == want and not loaded.keys() & unused.keys()
    for name in loaded:
        assert any(re.search(pattern, name) for pattern, _ in SHARDING), name


def test_the_published_fields_are_read_or_refused():
    assert not SiglipVisionConfig().to_dict().keys() - SIGLIP.keys()
    defaults = SiglipVisionConfig().to_dict()
    read = {name for name, field in SIGLIP.items() if field.effect == READ}
    assert {name: read_siglip({}, "config.json")[name] for name in read} == {name: defaults[name] for name in read}
    for field, value in [
        ("hidden_act", "quick_gelu"),
        ("num_channels", 1),
        ("image_size", [224, 224]),
        ("image_size", 15),
        ("num_attention_heads", 7),
        ("tie_last_hidden_states", True),
        ("model_type", "clip_vision_model"),
        ("rope_theta", 1.0),
    ]:
        with pytest.raises(UserError, match=f"config.json: .*vision_config.{field}"):
            read_siglip({field: value}, "config.json", "vision_config.")
