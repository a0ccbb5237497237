"""Makes the train step and the encode step of a config, for runs and for plans that only compile them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from data_pipeline.common.errors import UserError
from redvillm_jax.model.base_folder import EXTRA_PREFIX, Base
from redvillm_jax.model.settings import ModelSettings
from redvillm_jax.model.video_llm import VideoLLM, mean_loss
from redvillm_jax.modules.attention import backend_of, choose_kernel
from redvillm_jax.runtime.chips import compiler_options
from redvillm_jax.runtime.sharding import replicated
from redvillm_jax.training.optim import FROZEN, label_tree, make_optimizer
from redvillm_jax.training.step import make_train_step, split_trainable
from redvillm_jax.video.contract import EXTRA_GROUP


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The config fields that decide the steps of a run; `configs/common.py` explains each.

    learning_rate_scale, weight_decay: by optimizer group.
    """

    learning_rate: float
    learning_rate_scale: Mapping[str, float]
    weight_decay: Mapping[str, float]
    warmup_ratio: float
    clip_norm: float
    dtype: str
    remat: str
    attention: str


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """Reads the recipe from a checked config."""
    return Recipe(**{field.name: config[field.name] for field in dataclasses.fields(Recipe)})


class Training(NamedTuple):
    """A train step with its first state.

    step(trainable, optimizer, frozen, batch): the jitted step. state: {"trainable": …, "optimizer": …}, arrays, or
    shapes for a base without weights. frozen: all other weights. labels: the optimizer group of each trainable leaf.
    """

    step: Callable
    state: dict[str, Any]
    frozen: Any
    labels: Any


def make_training(
    recipe: Recipe,
    base: Base,
    settings: ModelSettings,
    model: VideoLLM,
    mesh: jax.sharding.Mesh,
    *,
    num_steps: int,
    row_length: int,
) -> Training:
    """Makes the train step, with its first state, for a model of `build.load_model` on rows of `row_length` slots.

    Raises UserError when no weight would train.
    """
    graphdef, trainable, frozen = split_trainable(model)
    labels = label_tree(trainable, group_rules(base, settings))
    if set(jax.tree.leaves(labels)) <= {FROZEN}:
        raise UserError(
            f"nothing of config.video={settings.representation} trains with these fields: use it untrained, or let a "
            "projector train"
        )
    optimizer = make_optimizer(
        labels,
        learning_rate={k: recipe.learning_rate * v for k, v in recipe.learning_rate_scale.items()},
        weight_decay=recipe.weight_decay,
        total_steps=num_steps,
        warmup_ratio=recipe.warmup_ratio,
        clip_norm=recipe.clip_norm,
    )
    shardings = state_shardings(optimizer, trainable, mesh)
    if base.path is None:
        shapes = jax.eval_shape(optimizer.init, trainable)
        moments = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings[1])
    else:
        moments = jax.jit(optimizer.init, out_shardings=shardings[1])(trainable)
    dtype = jnp.dtype(recipe.dtype)
    backend = backend_of(mesh.devices.flat[0])
    kernel = choose_kernel(recipe.attention, backend, dtype, row_length, base.config.head_dim)
    step = make_train_step(
        graphdef,
        functools.partial(mean_loss, dtype=dtype, remat=recipe.remat, kernel=kernel),
        optimizer,
        jax.tree.map(lambda label: label == FROZEN, labels),
        shardings,
        mesh,
        compiler_options(mesh.devices.flat[0]),
    )
    return Training(step, {"trainable": trainable, "optimizer": moments}, frozen, labels)


def make_encode_step(model: VideoLLM, dtype: jax.typing.DTypeLike) -> tuple[Callable, Any]:
    """Makes a jitted step(weights, frames, num_frames) that returns pooled streams by name; returns it and its weights.

    frames: (B, T, H, W, 3) uint8; num_frames: (B,) int32.
    """
    graphdef, weights = nnx.split(model)

    @jax.jit
    def step(weights: Any, frames: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        return model.pool(frames, num_frames, dtype)

    return step, weights


def group_rules(base: Base, settings: ModelSettings) -> list[tuple[str, str]]:
    """Returns (pattern of a trainable leaf's path, optimizer group); the first match counts."""
    fixed = base.module.frozen_projector(**settings.projector_options)
    video = settings.video
    return [
        *((rf"{name}\.{pattern}", FROZEN) for name in video.projectors() for pattern in fixed),
        *((rf"{name}\.", name if name in video.trained() else FROZEN) for name in video.projectors()),
        (EXTRA_PREFIX, EXTRA_GROUP),
    ]


def state_shardings(optimizer: optax.GradientTransformation, trainable: Any, mesh: jax.sharding.Mesh) -> tuple:
    """Returns shardings of (trainable, optimizer state): moments as their weights, counters replicated."""
    weights = jax.tree.map(lambda x: x.sharding, trainable)

    def masked(leaf: Any) -> bool:  # in place of a leaf of another group
        return isinstance(leaf, optax.MaskedNode)

    return weights, optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        jax.eval_shape(optimizer.init, trainable),
        weights,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=masked,
    )
