"""This project's side of benchmarks/train_vs_torch.py and benchmarks/encode_vs_torch.py.

A `folder` is a base folder; without one the weights are random, made on the device.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.demo import family_config
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import Base, open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.modules.layers import Stack
from redvillm_jax.runtime.sharding import make_mesh, to_global
from redvillm_jax.training.recipe import make_training, recipe_of


def make_step(
    *,
    family: str,
    config: Any,
    folder: Path | None,
    frames: int,
    batch: Mapping[str, np.ndarray],
    device: str,
    dtype: str,
    learning_rate: float,
    num_steps: int,
    remat: str,
) -> tuple[Callable[[], float], Callable[[], int | None]]:
    """The train step on the rows of `batch`, and its peak memory (see `variants`)."""
    mesh = open_mesh(device)
    switches = plain_config(family_config(family))
    switches |= {"num_frames": frames, "dtype": dtype, "learning_rate": learning_rate, "remat": remat}
    base = open_sized(family, config, folder)
    visual = int((batch["video_tokens"][0] >= 0).sum()) // groups(batch)
    assert len(VideoPlaces(base, model_settings(switches)).slots(frames)) == visual
    with jax.set_mesh(mesh):
        base, model = load(base, switches, mesh, dtype, ("projector", "llm"))
        row_length = batch["token_ids"].shape[1]
        training = make_training(
            recipe_of(switches), base, model_settings(switches), model, mesh, num_steps=num_steps, row_length=row_length
        )
        rows = to_global({name: x.astype(dtype) if x.ndim == 4 else x for name, x in batch.items()}, mesh)
    trainable, optimizer = training.state["trainable"], training.state["optimizer"]

    def step() -> float:
        nonlocal trainable, optimizer
        with jax.set_mesh(mesh):
            trainable, optimizer, metrics = training.step(trainable, optimizer, training.frozen, rows)
        jax.block_until_ready((trainable, optimizer))
        return float(metrics["loss"])

    return step, peak_memory


def groups(batch: Mapping[str, np.ndarray]) -> int:
    """How many videos the first row holds."""
    return int((batch["videos"][0] >= 0).sum())


def open_mesh(device: str) -> jax.sharding.Mesh:
    """A mesh of one device of this kind; RuntimeError when JAX has none."""
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices(device)[:1])


def open_sized(family: str, config: Any, folder: Path | None) -> Base:
    """The base in a folder, or one of this config without weights."""
    if folder:
        return open_base(folder)
    return Base(None, family, load_family(family), config, "", None, {})


def load(
    base: Base, switches: Mapping[str, Any], mesh: jax.sharding.Mesh, dtype: str, parts: tuple[str, ...]
) -> tuple[Base, VideoLLM]:
    """A model with real or random weights, and a base that counts as one with weights."""
    model = load_model(base, model_settings(switches), mesh, dtype=jnp.dtype(dtype), parts=parts)
    if base.path is not None:
        return base, model
    return dataclasses.replace(base, path=Path("random")), fill_random(model)


def fill_random(model: nnx.Module) -> nnx.Module:
    """The model with its shapes made arrays: norms and input scales one, biases zero, int8 uniform, else N(0, 0.02)."""
    stacks = {path for path, module in nnx.iter_modules(model) if isinstance(module, Stack)}
    graphdef, state = nnx.split(model)
    flat = {}
    for number, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        stacked = any(path[:i] in stacks for i in range(len(path)))
        vector = len(leaf.shape) - stacked < 2

        def make(shape=leaf.shape, dtype=leaf.dtype, vector=vector, name=path[-1], number=number) -> jax.Array:
            key = jax.random.key(number, impl="rbg")
            if dtype == jnp.int8:
                return jax.random.randint(key, shape, -127, 128, jnp.int8)
            if vector or name == "input_scale":
                fixed = {"weight": 1.0, "scale": 0.02 / 119, "input_scale": 1.0}
                return jnp.full(shape, fixed.get(name, 0.0), dtype)
            return 0.02 * jax.random.normal(key, shape, dtype)

        flat[path] = leaf.replace(jax.jit(make, out_shardings=leaf.sharding)())
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def peak_memory() -> int | None:
    """The most memory that the process has used on its device."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def make_encoder(
    *, family: str, config: Any, folder: Path | None, frames: np.ndarray, device: str, dtype: str
) -> tuple[Callable[[], np.ndarray], Callable[[], int | None]]:
    """Frames (B, T, H, W, 3) uint8 through the encoder; a step returns one patch's features (see `variants`)."""
    mesh = open_mesh(device)
    switches = plain_config(family_config(family))
    with jax.set_mesh(mesh):
        _, model = load(open_sized(family, config, folder), switches, mesh, dtype, ("encoder",))
        graphdef, weights = nnx.split(model)
        pictures = to_global({"frames": frames}, mesh)["frames"]

    @jax.jit
    def encode(weights: Any, pictures: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, weights).encode(pictures, jnp.dtype(dtype))

    def step() -> np.ndarray:
        with jax.set_mesh(mesh):
            features = jax.block_until_ready(encode(weights, pictures))
        return np.asarray(features[0, 0, 0], np.float32)

    return step, peak_memory
