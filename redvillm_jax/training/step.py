"""Makes the train step: it computes gradients of the projectors alone and only reads all other weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from redvillm_jax.modules.layers import gather_weights
from redvillm_jax.runtime.sharding import replicated


def split_trainable(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """Splits a model into (graphdef, trainable, frozen); trainable is the nested dict of arrays below `projectors`."""
    graphdef, trainable, frozen = nnx.split(model, lambda path, _: path[0] == "projectors", ...)
    return graphdef, nnx.to_pure_dict(trainable)["projectors"], nnx.to_pure_dict(frozen)


def join(graphdef: nnx.GraphDef, trainable: dict, frozen: dict) -> nnx.Module:
    """Joins the parts of `split_trainable` to a model."""
    return nnx.merge(graphdef, {"projectors": trainable}, frozen)


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: Callable[[nnx.Module, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]],
    optimizer: optax.GradientTransformation,
    frozen_leaves: Any,
    out_shardings: tuple[Any, Any],
    mesh: jax.sharding.Mesh,
    compiler_options: Mapping[str, str],
) -> Callable:
    """Makes a jitted step(trainable, optimizer_state, frozen, batch) -> (trainable, optimizer_state, metrics).

    loss_fn: returns the loss and row_losses (R,) fp32. frozen_leaves: True for leaves of `trainable` that never train;
    the reported norm omits them. compiler_options: for XLA. metrics: loss and grad_norm, fp32 scalars, and row_losses.
    The step donates trainable weights and optimizer state.
    """

    def step(trainable, optimizer_state, frozen, batch):
        def loss_of(weights):
            return loss_fn(join(graphdef, gather_weights(weights), frozen), batch)

        (loss, row_losses), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        grad_norm = optax.tree.norm(
            jax.tree.map(lambda g, fixed: jnp.zeros_like(g) if fixed else g, grads, frozen_leaves)
        )
        updates, optimizer_state = optimizer.update(grads, optimizer_state, trainable)
        metrics = {"loss": loss, "grad_norm": grad_norm, "row_losses": row_losses}
        return optax.apply_updates(trainable, updates), optimizer_state, metrics

    return jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(*out_shardings, replicated(mesh)),
        compiler_options=dict(compiler_options),
    )
