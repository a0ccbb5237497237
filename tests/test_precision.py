"""What a program multiplies in fp32 says so, for TPUs whose default is bf16, and so do its gradients."""

import re

import jax
import jax.numpy as jnp
import pytest
from conftest import FAMILIES

from configs.common import get_common
from redvillm_jax.checks import model_checks
from redvillm_jax.model.base_folder import sized_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.planning.programs import abstract_batch
from redvillm_jax.planning.workload import Workload
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training.recipe import make_encode_step, make_training, recipe_of

ROWS = Workload(questions=4, rows=2, row_length=128, groups=2, targets=16, tokens=0, supervised=0, steps=1)
PRODUCT = re.compile(r"dot_general .*precision = \[(\w+), .*\](, algorithm.*)? : \(tensor<(.*?)>, tensor<(.*?)>\)")


def products(program: str) -> list[tuple[str, bool, str, str]]:
    """Of each product in a program's StableHLO: precision, whether its algorithm is said, the operands' types."""
    found = [(p, bool(a), *(t.split("x")[-1] for t in types)) for p, a, *types in PRODUCT.findall(program)]
    assert len(found) == program.count("stablehlo.dot_general") > 0
    return found


def lower(step, *arguments) -> str:
    """The program for a TPU as text."""
    return step.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def settings(family: str, **changes) -> dict:
    config = get_common()
    config.family = family
    return plain_config(config) | {"num_frames": 5} | changes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"dtype": "float32"}, {"int8": True, "extra_mlp": True}], ids=str)
def test_every_fp32_product_of_a_train_step_says_so(family, changes):
    base, config = sized_base(family, "tiny"), settings(family, **changes)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load_model(
            base, model_settings(config), mesh, dtype=jnp.dtype(config["dtype"]), parts=("projector", "llm")
        )
        training = make_training(
            recipe_of(config), base, model_settings(config), model, mesh, num_steps=2, row_length=ROWS.row_length
        )
        batch = abstract_batch(model_settings(config), base, mesh, ROWS)
        program = lower(training.step, *training.state.values(), training.frozen, batch)
    kinds = set(products(program))
    wide = {kind for kind in kinds if "f32" in kind[2:]}
    stated = {("HIGHEST", False, "f32", "f32")}
    if config["dtype"] == "bfloat16":
        stated.add(("DEFAULT", True, "f32", "bf16"))  # the logits' gradient meets the halves of the head as halves
    assert wide <= stated and ("HIGHEST", False, "f32", "f32") in wide
    assert all(kind[2:] == ("bf16", "bf16") for kind in kinds - wide)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_encoding_in_fp32_says_so(family):
    base, config = sized_base(family, "tiny"), settings(family)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    side = base.config.image_size
    frames = jax.ShapeDtypeStruct((1, 5, side, side, 3), jnp.uint8), jax.ShapeDtypeStruct((1,), jnp.int32)
    with jax.set_mesh(mesh):
        step, weights = make_encode_step(
            load_model(base, model_settings(config), mesh, dtype=jnp.float32, parts=("encoder",)), jnp.float32
        )
        assert set(products(lower(step, weights, *frames))) == {("HIGHEST", False, "f32", "f32")}


@pytest.mark.parametrize("check", ["encoder", "training"])
def test_the_self_check_computes_as_training_does(check, monkeypatch):
    """Its programs are traced with the precision that every other program has."""
    found = []

    def note(*arguments, **options):
        found.append(jax.config.jax_default_matmul_precision)
        raise InterruptedError

    monkeypatch.setattr(model_checks, {"encoder": "make_encode_step", "training": "make_training"}[check], note)
    with pytest.raises(InterruptedError):
        getattr(model_checks, f"check_{check}")()
    assert found == [None]
