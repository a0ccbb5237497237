"""Runs this project's model on the inputs of a file of PyTorch arrays and gives its own arrays the same names."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.stage_file import NEW_TOKENS
from redvillm_jax.inference import generate
from redvillm_jax.inference.sampler import Sampling
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.modules.attention import Masks
from redvillm_jax.modules.layers import normalize, rotary_angles

RENAMED = {  # what stands for both families below -> its name in the reference arrays
    "llava": {
        "pictures": "mm_projected",
        "q_t": "{kind}_mean_over_space",
        "q_z": "{kind}_mean_over_time",
        "video_embeds": "video_{kind}_embeds",
        "video_logits": "video_{kind}_logits",
        "greedy_image": "greedy",
    },
    "qwen_vl": {
        "pictures": "visual_out_frames01",
        "q_t": "align_mean_over_space_T{num_frames}",
        "q_z": "align_mean_over_time",
        "text_logits": "text_logits_eval",
        "image_logits": "image_logits_eval",
        "video_logits": "video_resample_logits",
    },
}
Arrays = dict[str, jax.Array]
FP32 = jnp.float32


def compiled(module: nnx.Module, function: Callable, *args: Any) -> Any:
    """function(module, *args) under jit, the weights as an argument instead of a constant."""
    graphdef, weights = nnx.split(module)
    return jax.jit(lambda weights, *args: function(nnx.merge(graphdef, weights), *args))(weights, *args)


def layer_outputs(stack: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """What every block of a Stack returns: (num_layers, *x.shape)."""
    graphdef, weights = nnx.split(stack.block)

    def body(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, jax.Array]:
        x, _ = nnx.merge(graphdef, weights)(x, *args, None)
        return x, x

    return jax.lax.scan(body, x, weights)[1]


# ---- rows of token ids


def causal(real: jax.Array) -> Masks:
    """real: (B, S) -> (B, S, S) bool; a padded slot is never seen but sees, as in the published code."""
    return Masks(jnp.tril(jnp.ones((real.shape[1],) * 2, bool)) & (real > 0)[:, None])


def logits(model: VideoLLM, tokens: jax.Array, ids: jax.Array, slots: jax.Array, real: jax.Array) -> jax.Array:
    """ids, slots, real: (B, S), slots -1 or an index into tokens: (B, V, K) -> (B, S, vocab_size)."""
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    embeds = model.embed(ids, slots, tokens)
    hidden, _ = model.llm(embeds, positions, causal(real), context_length=jnp.full(batch, length))
    return model.llm.logits(hidden)


def continued(model: VideoLLM, tokens: jax.Array, ids: jax.Array, slots: jax.Array) -> jax.Array:
    """The greedy ids after one row, through the functions that answer questions; nothing stops it early."""
    length = ids.shape[1]
    prefix = {"token_ids": ids[:, :-1], "video_slots": slots[:, :-1], "length": jnp.full(1, length - 1)}
    prefix["context_length"] = jnp.full(1, length)
    question = {
        "token_ids": ids[:, -1:],
        "length": jnp.ones(1, int),
        "prefix_length": prefix["length"],
        "text_ids": ids,
    }
    stop_ids, keys = jnp.full(1, -1), jax.random.split(jax.random.key(0), 1)

    def answer(model: VideoLLM) -> jax.Array:
        cache = generate.prefill(model, tokens, prefix)
        cache = generate.lay_out(cache, jnp.zeros(1, int), length + NEW_TOKENS)
        rows = generate.start(model, cache, question, Sampling(), keys, stop_ids, max_new_tokens=NEW_TOKENS)
        return generate.decode(model, rows, Sampling(), stop_ids, NEW_TOKENS).ids

    return compiled(model, answer)


# ---- stages


def llava_vision(model: VideoLLM, pixels: jax.Array) -> Arrays:
    clip = model.encoder
    first = compiled(clip, lambda clip, pixels: clip.pre_layrnorm(clip.embeddings(pixels)), pixels)
    layers = compiled(clip.encoder.layers, layer_outputs, first)
    hidden = {f"clip_hidden_{i}": x for i, x in enumerate([first, *layers])}
    return hidden | {"patch_features": compiled(clip, lambda clip, pixels: clip(pixels), pixels)}


def qwen_vision(model: VideoLLM, pixels: jax.Array) -> Arrays:
    def stages(encoder: nnx.Module, pixels: jax.Array) -> Arrays:
        x = encoder.ln_pre(encoder.embed(pixels))
        stack = encoder.transformer.resblocks
        graphdef, weights = nnx.split(stack.block)
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], weights))
        out = {"conv1": encoder.conv1(pixels), "pos_added": encoder.embed(pixels), "ln_pre": x}
        out["block0_attn"] = block.attn(block.ln_1(x))
        return out | {f"block{i}": y for i, y in enumerate(layer_outputs(stack, x))}

    def align(projector: nnx.Module, vit: jax.Array) -> Arrays:
        mask, layout = jnp.ones(vit.shape[:2], bool), (round(vit.shape[1] ** 0.5),) * 2
        x = projector.attn_pool(vit, mask, projector.key_positions(mask, layout))
        return {"attn_pool": x, "ln_post": projector.ln_post(x)}

    vit = compiled(model.encoder, lambda encoder, pixels: encoder(pixels), pixels)
    first = compiled(model.encoder, stages, pixels[:1]) | compiled(model.projectors["spatial"], align, vit[:1])
    return {f"{name}_frame0": x for name, x in first.items()} | {"vit": vit}


def project(model: VideoLLM, features: jax.Array, projector: str, layout: tuple[int, ...]) -> jax.Array:
    """features: (B, M, D), all of them valid -> (B, num_tokens, K)."""
    mask = jnp.ones(features.shape[:2], bool)
    return compiled(model.projectors[projector], lambda projector, x: projector(x, mask, layout), features)


def text_layers(model: VideoLLM, ids: jax.Array) -> Arrays:
    """The outputs of the decoder's layers for a row of text shorter than what turns on dynamic NTK and logn."""
    c, llm = model.config, model.llm
    qwen = hasattr(llm, "transformer")
    stack, base = (llm.transformer.h, c.rotary_emb_base) if qwen else (llm.model.layers, c.rope_theta)
    angles = rotary_angles(jnp.arange(ids.shape[1])[None], c.head_dim, base)
    masks = causal(jnp.ones_like(ids))
    args = (angles, None, masks.full, 0) if qwen else (angles, masks, 0, False)  # no logn scale; no window
    layers = compiled(stack, layer_outputs, llm.embed(ids, FP32), *args)
    return {f"text_layer_{i}": x for i, x in enumerate(layers)}


def streams(model: VideoLLM, features: jax.Array, frames: jax.Array | None) -> Arrays:
    """features: (T, N, D) of a clip's frames, each one a picture too -> pooled streams and visual tokens."""
    count = jnp.array([len(features)])
    grid = model.config.grid
    pooled = model.video.pool(features.reshape(1, len(features), *grid, -1), count)
    over_time, over_space = pooled["spatial"], pooled["temporal"]
    videos = pooled if frames is None else {"frames": frames[None]}  # with frames in one go, as in training
    video = compiled(model, lambda model, videos: model.video_tokens(videos | {"num_frames": count}, FP32), videos)
    return {
        "mean_over_time": over_time[0],
        "mean_over_space": over_space[0],
        "q_t": project(model, over_space, "temporal", (len(features),))[0],
        "q_z": project(model, over_time, "spatial", grid)[0],
        "pictures": project(model, features, "spatial", grid),
        "video_tokens": video[0],
    }


def visual_places(base: Base, ids: np.ndarray) -> np.ndarray:
    """Where a picture's tokens stand in rows of published ids: (B, S) bool."""
    config = json.loads((base.path / "config.json").read_text())
    if base.family == "llava":
        return ids == config.get("image_token_index", -1)
    start = config["visual"]["image_start_id"]
    return ((ids == start).cumsum(1) > (ids == start + 1).cumsum(1)) & (ids != start)


def rows_of_ids(base: Base, reference: Mapping[str, np.ndarray], made: Arrays) -> dict[str, tuple]:
    """What the decoder sees, as (visual tokens, ids, slots): a row of text, of a picture, and of the clip."""
    before, after = reference["video_prefix_ids"], reference["video_suffix_ids"]
    places = {"text": np.zeros(reference["text_ids"].shape, bool), "image": visual_places(base, reference["image_ids"])}
    num_tokens = len(made["video_tokens"])
    places["video"] = np.pad(np.ones((1, num_tokens), bool), ((0, 0), (before.shape[1], after.shape[1])))
    ids = {"text": reference["text_ids"], "image": reference["image_ids"]}
    ids["video"] = np.concatenate([before, np.zeros((1, num_tokens), np.int64), after], axis=1)
    video = made["video_tokens"][None]
    tokens = {"text": jnp.repeat(video[:, :1], len(ids["text"]), axis=0), "video": video}
    tokens["image"] = made["pictures"][: len(ids["image"])]
    slots = {name: np.where(place, place.cumsum(1) - 1, -1) for name, place in places.items()}
    return {name: (tokens[name], jnp.where(places[name], 0, ids[name]), jnp.asarray(slots[name])) for name in ids}


def stages(model: VideoLLM, base: Base, reference: Mapping[str, np.ndarray]) -> Arrays:
    """This project's arrays under the reference's names."""
    frames = jnp.asarray(reference["frames"]) if "frames" in reference else None
    if frames is None:
        pixels = jnp.asarray(reference["pixels"]).transpose(0, 2, 3, 1)
    else:
        pixels = normalize(frames, base.module.MEAN, base.module.STD, FP32)
    llava = base.family == "llava"
    kind = "lin" if llava and base.config.projector == "linear" else "mlp"
    renamed = {a: b.format(kind=kind, num_frames=len(pixels)) for a, b in RENAMED[base.family].items()}
    out = {"pixels": pixels.transpose(0, 3, 1, 2)} | (llava_vision if llava else qwen_vision)(model, pixels)
    out |= streams(model, out["patch_features" if llava else "vit"], frames)
    out |= text_layers(model, jnp.asarray(reference["text_ids"]))
    for name, row in rows_of_ids(base, reference, out).items():
        real = reference.get(f"{name}_mask", np.ones(row[1].shape))
        out[f"{name}_logits"] = compiled(model, logits, *row, jnp.asarray(real))
        if renamed.get(f"greedy_{name}", f"greedy_{name}") in reference:
            out[f"greedy_{name}"] = continued(model, *(x[:1] for x in row))
        if name == "video":
            out["video_embeds"] = model.embed(row[1], row[2], row[0])
    if not llava:  # these references hold a part only
        out["pictures"] = out["pictures"][:2]
        out["video_logits"] = out["video_logits"][:, -reference["video_suffix_ids"].shape[1] :]
    return {renamed.get(name, name): array for name, array in out.items()}
