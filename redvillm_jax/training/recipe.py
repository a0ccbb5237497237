"""The train step of a config: the same for a run that trains and for a plan that only compiles it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import projector_options
from redvillm_jax.model.video_llm import VideoLLM, mean_loss
from redvillm_jax.modules.attention import backend_of, choose_kernel
from redvillm_jax.runtime.chips import compiler_options
from redvillm_jax.runtime.sharding import replicated
from redvillm_jax.training.optim import FROZEN, label_tree, make_optimizer
from redvillm_jax.training.step import make_train_step, split_trainable


class Training(NamedTuple):
    """step(trainable, optimizer, frozen, batch), what it takes, and the optimizer group of each trainable leaf.

    state: {"trainable": …, "optimizer": …}, arrays, or shapes for a base without weights. frozen: the rest.
    """

    step: Callable
    state: dict[str, Any]
    frozen: Any
    labels: Any


def make_training(
    config: Mapping[str, Any],
    base: Base,
    model: VideoLLM,
    mesh: jax.sharding.Mesh,
    *,
    num_steps: int,
    row_length: int,
) -> Training:
    """The jitted train step for a model of `build.load_model` on rows of `row_length` slots, and its first state."""
    graphdef, trainable, frozen = split_trainable(model)
    labels = label_tree(trainable, group_rules(config, base))
    optimizer = make_optimizer(
        labels,
        learning_rate={k: config["learning_rate"] * v for k, v in config["learning_rate_scale"].items()},
        weight_decay=config["weight_decay"],
        total_steps=num_steps,
        warmup_ratio=config["warmup_ratio"],
        clip_norm=config["clip_norm"],
    )
    shardings = state_shardings(optimizer, trainable, mesh)
    if base.path is None:
        shapes = jax.eval_shape(optimizer.init, trainable)
        moments = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings[1])
    else:
        moments = jax.jit(optimizer.init, out_shardings=shardings[1])(trainable)
    dtype = jnp.dtype(config["dtype"])
    kernel = choose_kernel(
        config["attention"],
        backend_of(mesh.devices.flat[0]),
        dtype,
        row_length,
        base.config.head_dim,
        base.config.window,
    )
    step = make_train_step(
        graphdef,
        functools.partial(mean_loss, dtype=dtype, remat=config["remat"], kernel=kernel),
        optimizer,
        jax.tree.map(lambda label: label == FROZEN, labels),
        shardings,
        mesh,
        compiler_options(mesh.devices.flat[0]),
    )
    return Training(step, {"trainable": trainable, "optimizer": moments}, frozen, labels)


def make_encode_step(model: VideoLLM, dtype: jax.typing.DTypeLike) -> tuple[Callable, Any]:
    """A jitted step(weights, frames, num_frames) -> pooled streams by name, and the encoder's weights for it.

    frames: (B, T, H, W, 3) uint8; num_frames: (B,) int32.
    """
    graphdef, weights = nnx.split(model)

    @jax.jit
    def step(weights: Any, frames: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        return model.video.pool(model.encode(frames, dtype), num_frames)

    return step, weights


def group_rules(config: Mapping[str, Any], base: Base) -> list[tuple[str, str]]:
    """Which trainable leaf belongs to which optimizer group; the first match counts."""
    fixed = base.module.frozen_projector(**projector_options(base.module, config))
    return [
        *((rf"(spatial|temporal)\.{pattern}", FROZEN) for pattern in fixed),
        (r"spatial\.", "spatial" if config["train_spatial"] else FROZEN),
        (r"temporal\.", "temporal"),
        (r"extra_mlp_", "extra_mlp"),
    ]


def state_shardings(optimizer: optax.GradientTransformation, trainable: Any, mesh: jax.sharding.Mesh) -> tuple:
    """Shardings of (trainable, optimizer state): moments lie like their weights, counters everywhere."""
    weights = jax.tree.map(lambda x: x.sharding, trainable)

    def masked(leaf: Any) -> bool:  # what another group's part of the state has instead
        return isinstance(leaf, optax.MaskedNode)

    return weights, optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        jax.eval_shape(optimizer.init, trainable),
        weights,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=masked,
    )
