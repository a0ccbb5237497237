"""Runs this project's model on the inputs of conversion.compare, with the reference's names for its stages."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.demo import family_config
from conversion.stage_file import NEW_TOKENS, ROWS, sample
from redvillm_jax.inference import generate
from redvillm_jax.inference.sampler import Sampling
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.modules.layers import Stack, normalize
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.video.contract import image_projector

Arrays = dict[str, Any]
FP32 = jnp.float32


@contextlib.contextmanager
def recorded() -> Iterator[list[jax.Array]]:
    """Yields a list to which every Stack adds its input and the outputs of its blocks, which then run one by one."""
    outputs: list[jax.Array] = []
    scanned = Stack.__call__

    def one_by_one(stack: Stack, x: jax.Array, *args: Any, of_layer: tuple = (), cache: None = None, remat: str = ""):
        graphdef, weights = nnx.split(stack.block)
        outputs.append(x)
        for i in range(stack.num_layers):
            layer, own = jax.tree.map(lambda leaf, i=i: leaf[i], (weights, of_layer))
            x, _ = nnx.merge(graphdef, layer)(x, *args, *own, None)
            outputs.append(x)
        return x, None

    Stack.__call__ = one_by_one  # type: ignore[method-assign]
    try:
        yield outputs
    finally:
        Stack.__call__ = scanned  # type: ignore[method-assign]


def compiled(module: nnx.Module, function: Callable, *args: Any) -> Any:
    """function(module, *args) under jit, the weights as an argument instead of a constant."""
    graphdef, weights = nnx.split(module)
    return jax.jit(lambda weights, *args: function(nnx.merge(graphdef, weights), *args))(weights, *args)


def named(name: str, outputs: list[jax.Array]) -> Arrays:
    """The recorded arrays of a stack by name."""
    return {f"{name}_embeds": outputs[0]} | {f"{name}_layer_{i}": x for i, x in enumerate(outputs[1:])}


def run_ours(base: Base, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the stages of a base by name, large ones as samples; fp32, on one device.

    The encoder with the projectors, and the language model, are in memory one after the other.
    """
    config = plain_config(family_config(base.family)) | {"num_frames": len(inputs["frames"])}
    settings = model_settings(config)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        model = load_model(base, settings, mesh, dtype=FP32, parts=("encoder", "projector"))
        pixels = normalize(jnp.asarray(inputs["frames"]), base.module.MEAN, base.module.STD, FP32)
        out = compiled(model, visual_stages, pixels)
        pictures, clip = out["pictures"][:1], out["clip_tokens"][None]
        tiles = compiled(model, square_tokens, jnp.asarray(inputs["tiles"])) if "tiles" in inputs else None
        del model
        model = load_model(base, settings, mesh, dtype=FP32, parts=("llm",))
        tokens = {"text": jnp.zeros((1, 1, base.config.hidden_size)), "picture": pictures, "clip": clip}
        rows = [row_of_ids(inputs, name, tokens[name]) for name in ROWS]
        for name, row in zip(ROWS, rows, strict=True):
            out |= compiled(model, lambda model, *row, name=name: text_stages(model, name, *row), *row)
        if tiles is not None:
            row = row_of_tiles(inputs, model, tiles)
            out |= compiled(model, lambda model, *row: text_stages(model, "tiles", *row), *row)
        new = compiled(model, continued, *padded(rows))
        out |= {f"{name}_greedy": ids[None] for name, ids in zip(ROWS, new, strict=True)}
    out["clip_tokens"] = clip[0]
    return {name: sample(np.asarray(array)) for name, array in out.items()}


def visual_stages(model: VideoLLM, pixels: jax.Array) -> Arrays:
    """From pixels (T, H, W, 3) to the visual tokens of each frame as a picture, and of the clip."""
    with recorded() as layers:
        features = model.encoder(pixels)
    grid, count = model.config.grid, jnp.array([len(pixels)])
    pooled = model.video.pool(features.reshape(1, len(pixels), *grid, -1), count)
    picture = model.projectors[image_projector(model.video)]
    return named("encoder", layers) | {
        "features": features,
        "pictures": picture(features, jnp.ones(features.shape[:2], bool), grid),
        "mean_over_space": pooled["temporal"][0],
        "mean_over_time": pooled["spatial"][0],
        "clip_tokens": model.project(pooled, count)[0],
    }


def square_tokens(model: VideoLLM, squares: jax.Array) -> jax.Array:
    """The visual tokens of a picture's squares (n, S, S, 3) uint8 in one row: (1, n * V, K)."""
    return model.picture_tokens(squares, FP32).reshape(1, -1, model.config.hidden_size)


def row_of_tiles(inputs: dict[str, np.ndarray], model: VideoLLM, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """`row_of_ids` for a picture in tiles, whose table of tokens `Places` describes."""
    newline = getattr(model.llm, "image_newline", None)
    table = tokens if newline is None else jnp.concatenate([newline[...][None, None].astype(FP32), tokens], axis=1)
    if "tiles_sources" in inputs:
        table = generate.weighted(table, jnp.asarray(inputs["tiles_sources"]), jnp.asarray(inputs["tiles_weights"]))
    return table, jnp.maximum(jnp.asarray(inputs["tiles_ids"]), 0), jnp.asarray(inputs["tiles_slots"])


def row_of_ids(inputs: dict[str, np.ndarray], name: str, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """What the language model reads, as (visual tokens (1, V, K), ids (1, S), slots (1, S))."""
    if name == "text":
        ids = inputs["text_ids"]
        return tokens, jnp.asarray(ids), jnp.full(ids.shape, -1)
    before, behind = inputs["before_ids"], inputs["behind_ids"]
    count = tokens.shape[1]
    ids = np.concatenate([before, np.zeros((1, count), np.int64), behind], axis=1)
    slots = np.full(ids.shape, -1)
    slots[0, before.shape[1] : before.shape[1] + count] = np.arange(count)
    return tokens, jnp.asarray(ids), jnp.asarray(slots)


def text_stages(model: VideoLLM, name: str, tokens: jax.Array, ids: jax.Array, slots: jax.Array) -> Arrays:
    """From the embeddings of a row to its logits, through the functions of training."""
    length = ids.shape[1]
    positions = jnp.arange(length)[None]
    embeds = model.embed(ids, slots, tokens)
    masks = model.masks(jnp.ones_like(ids), jnp.zeros_like(ids), positions, slots)
    with recorded() as layers:
        hidden, _ = model.llm(embeds, positions, masks, context_length=jnp.full(1, length))
    return named(name, layers) | {f"{name}_logits": model.llm.logits(hidden)}


def padded(rows: list[tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """Rows of `row_of_ids` as one batch, padded on the right: (tokens, ids, slots, lengths (R,))."""
    lengths = jnp.array([ids.shape[1] for _, ids, _ in rows])
    arrays = []
    for parts, fill in zip(zip(*rows, strict=True), (0, 0, -1), strict=True):
        longest = max(part.shape[1] for part in parts)
        room = [((0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)) for part in parts]
        padded_parts = [jnp.pad(part, pad, constant_values=fill) for part, pad in zip(parts, room, strict=True)]
        arrays.append(jnp.concatenate(padded_parts))
    return (*arrays, lengths)


def continued(model: VideoLLM, tokens: jax.Array, ids: jax.Array, slots: jax.Array, lengths: jax.Array) -> jax.Array:
    """The greedy ids (R, NEW_TOKENS) behind rows, by the functions that answer questions; nothing stops them early."""
    prefixes = {"token_ids": ids, "video_slots": slots, "length": lengths - 1, "context_length": lengths}
    questions = {
        "token_ids": jnp.take_along_axis(ids, lengths[:, None] - 1, axis=1),
        "length": jnp.ones_like(lengths),
        "prefix_length": lengths - 1,
        "text_ids": ids,
    }
    rows, width = ids.shape
    stop_ids, keys = jnp.full(1, -1), jax.random.split(jax.random.key(0), rows)
    cache = generate.prefill(model, tokens, prefixes)
    cache = generate.lay_out(cache, jnp.arange(rows), width + 1 + NEW_TOKENS)
    state = generate.start(model, cache, questions, Sampling(), keys, stop_ids, max_new_tokens=NEW_TOKENS)
    return generate.decode(model, state, Sampling(), stop_ids, NEW_TOKENS).ids
