"""Answers: cached decoding against full forward passes, shared prefixes, batches, sampling, shapes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, NUM_FRAMES
from flax import nnx
from helpers import without_hashes
from test_model import build

from redvillm_jax.inference.engine import Asked, Generation, Inference
from redvillm_jax.inference.prompts import make_prompt
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings
from redvillm_jax.runtime.sharding import make_mesh

QUESTIONS = {  # video -> questions; the second video is short
    0: ["What?", "Which direction does the red circle move?"],
    1: ["What colour is it?"],
    2: ["How many shapes are there in the video, and which of them is seen first?", "What?"],
}
FRAMES = {0: NUM_FRAMES, 1: NUM_FRAMES - 2, 2: NUM_FRAMES}
ASKED = [(video, question) for video, questions in QUESTIONS.items() for question in questions]


@functools.cache
def setup(folder, family, **switches):
    """(base, model, inference that never stops, prompts, videos)."""
    base, config, model = build(folder, family, **switches)
    model = with_large_weights(model)
    tokenizer, places = base.module.Tokenizer(base.path), VideoPlaces(base, model_settings(config))
    placed = {v: [(0, slot) for slot in places.slots(n)] for v, n in FRAMES.items()}
    prompts = [make_prompt(base, tokenizer, q, placed[v], places.most) for v, q in ASKED]
    frames = np.random.default_rng(0).integers(0, 256, (3, NUM_FRAMES, 32, 32, 3), np.uint8)
    videos = {v: {"frames": frames[v], "num_frames": np.int32(n)} for v, n in FRAMES.items()}
    for video, n in FRAMES.items():
        videos[video]["frames"][n:] = 0
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return base, model, Inference(model, mesh, jnp.float32, [-1]), prompts, videos


def with_large_weights(model):
    """A copy whose attention matters: a slot too many or a position too far changes what it says."""
    graphdef, weights = nnx.split(model)
    weights["llm"] = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, weights["llm"])
    return nnx.merge(graphdef, weights)


def answers(inference, prompts, videos, generation, batch_size=8, video_batch_size=2):
    """Ids of every answer."""
    asked = [Asked(p, v, videos[v], i) for i, (p, (v, _)) in enumerate(zip(prompts, ASKED, strict=True))]
    batches = list(inference.answers(asked, generation, batch_size=batch_size, video_batch_size=video_batch_size))
    assert [one.number for batch in batches for one, _ in batch] == list(range(len(prompts)))
    return [answer.ids for batch in batches for _, answer in batch]


def full_passes(model, prompts, videos, steps: int) -> list[list[int]]:
    """The same answers by `steps` passes over the whole sequences, without a cache."""
    graphdef, weights = nnx.split(model)

    @jax.jit
    def next_id(weights, tokens, ids, slots, length, context):
        model = nnx.merge(graphdef, weights)
        real = (jnp.arange(ids.shape[1]) < length).astype(jnp.int32)[None]
        positions = jnp.arange(ids.shape[1])[None]
        embeds = model.embed(ids, slots, tokens)
        masks = model.masks(real, 0 * real, positions, slots)
        hidden, _ = model.llm(embeds, positions, masks, context_length=context[None])
        return model.llm.logits(hidden[0, length - 1]).argmax()

    tokens = [model.video_tokens(jax.tree.map(lambda x: jnp.asarray(x)[None], v), jnp.float32) for v in videos]
    width = max(prompt.length for prompt in prompts) + steps
    answers = []
    for prompt, visual in zip(prompts, tokens, strict=True):
        ids = [*(token for token, _ in prompt.prefix), *prompt.question]
        slots = [slot for _, slot in prompt.prefix] + [-1] * (width - prompt.prefix_length)
        for _ in range(steps):
            padded = jnp.array([ids + [0] * (width - len(ids))])
            ids.append(int(next_id(weights, visual, padded, jnp.array([slots]), len(ids), jnp.int32(prompt.length))))
        answers.append(ids[prompt.length :])
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_full_forward_passes(family, bases):
    _, model, inference, prompts, videos = setup(bases[family], family)
    got = answers(inference, prompts, videos, Generation(max_new_tokens=6))
    assert got == full_passes(model, prompts, [videos[v] for v, _ in ASKED], 6)
    assert len({tuple(ids) for ids in got}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_change_no_answer(family, bases):
    _, _, inference, prompts, videos = setup(bases[family], family)
    for generation in (Generation(max_new_tokens=5), Generation(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=3)):
        together = answers(inference, prompts, videos, generation)
        in_parts = answers(inference, prompts, videos, generation, batch_size=3, video_batch_size=2)
        assert in_parts == together


def test_contexts_of_all_lengths_stand_side_by_side(bases, tmp_path):
    folder = shutil.copytree(bases["qwen_vl"], tmp_path / "long")
    shortest = setup(bases["qwen_vl"], "qwen_vl")[3][0].length
    config = json.loads((folder / "config.json").read_text()) | {"seq_length": shortest}
    (folder / "config.json").write_text(json.dumps(config))
    without_hashes(folder)
    _, model, inference, prompts, videos = setup(folder, "qwen_vl")
    classes = [model.llm.context_class(prompt.length) for prompt in prompts]
    assert classes[0] == classes[4] == 0 < classes[1] and classes[3] > 0  # of both classes about one video
    want = full_passes(model, prompts, [videos[v] for v, _ in ASKED], 4)
    assert answers(inference, prompts, videos, Generation(max_new_tokens=4), 2, 1) == want


def test_pictures_stand_beside_videos_of_their_length(bases):
    _, _, inference, prompts, videos = setup(bases["llava"], "llava", streams="spatial")
    picture = {"pictures": videos[0]["frames"][0]}
    asked = [Asked(prompts[0], name, arrays, 0) for name, arrays in (("video", videos[0]), ("picture", picture))]
    sizes = {"batch_size": 4, "video_batch_size": 4}
    together = [answer for batch in inference.answers(asked, Generation(4), **sizes) for _, answer in batch]
    alone = [next(inference.answers([one], Generation(4), **sizes))[0][1] for one in asked]
    assert together == alone and together[0] != together[1]


def test_settings_compile_nothing_again(bases):
    _, _, inference, prompts, videos = setup(bases["llava"], "llava")
    answers(inference, prompts, videos, Generation(max_new_tokens=5))
    compiled = inference._start._cache_size(), inference._decode._cache_size()
    for settings in ({"temperature": 1, "top_k": 2**31 - 1}, {"seed": 2**32 - 1, "repetition_penalty": 2, "top_p": 1}):
        answers(inference, prompts, videos, Generation(max_new_tokens=6, **settings))
    assert (inference._start._cache_size(), inference._decode._cache_size()) == compiled
