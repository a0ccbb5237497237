"""The video LLM as a whole: what it keeps of the image LLM, packing, short videos, and every switch."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, NUM_FRAMES
from flax import nnx
from helpers import config_of, plan_of

from data_pipeline.packing import Question, fill_row
from data_pipeline.pipeline import batches
from data_pipeline.store import finish_store, open_store, write_shards
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings
from redvillm_jax.model.video_llm import mean_loss
from redvillm_jax.modules.layers import KEPT
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training.optim import make_optimizer
from redvillm_jax.training.recipe import state_shardings
from redvillm_jax.training.rows import make_prefix, tokenize
from redvillm_jax.training.step import join, make_train_step, split_trainable

DTYPE = jnp.float32


@functools.cache
def build(folder, family, **switches):
    """(base, config, model) of a base folder with some switches set, on one device."""
    config = {"num_frames": NUM_FRAMES} | switches
    config = config_of(family, switches.get("video", "red_villm")) | config
    base = open_base(folder)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return base, config, load_model(base, model_settings(config), mesh, dtype=DTYPE)


@pytest.fixture
def frames(bases) -> np.ndarray:
    """(2, T, 32, 32, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (2, NUM_FRAMES, 32, 32, 3), np.uint8)


def tokens(model, frames, num_frames=None) -> np.ndarray:
    counts = np.full(len(frames), frames.shape[1], np.int32) if num_frames is None else np.array(num_frames, np.int32)
    return np.asarray(model.video_tokens({"frames": jnp.asarray(frames), "num_frames": jnp.asarray(counts)}, DTYPE))


def logits(model, base, visual: np.ndarray, question: str) -> np.ndarray:
    """Logits of every position of one prompt around visual tokens (V, K)."""
    tokenizer = base.module.Tokenizer(base.path)
    before, after = base.module.prompt(tokenizer, base.config, question, None)
    slots = [-1] * len(before) + list(range(len(visual))) + [-1] * len(after)
    ids = [i for i, _ in before] + [0] * len(visual) + [i for i, _ in after]
    embeds = model.embed(jnp.array([ids]), jnp.array([slots]), jnp.asarray(visual)[None])
    ones = jnp.ones((1, len(ids)), jnp.int32)
    positions = jnp.arange(len(ids))[None]
    hidden, _ = model.llm(embeds, positions, model.masks(ones, 0 * ones, positions, jnp.array([slots])))
    return np.asarray(model.llm.logits(hidden))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_llm_stays_one(family, bases, frames):
    base, _, model = build(bases[family], family, streams="spatial")
    still = np.repeat(frames[:1, :1], NUM_FRAMES, axis=1)
    picture = model.picture_tokens(jnp.asarray(still[:, 0]), DTYPE)
    want = logits(model, base, np.asarray(picture)[0], "What is this?")
    got = logits(model, base, tokens(model, still)[0], "What is this?")
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert not np.allclose(got, logits(model, base, tokens(model, frames)[0], "What is this?"), atol=1e-4)


def whole_epoch(base, config, store) -> dict[str, np.ndarray]:
    """All questions of a store as one batch."""
    plan = plan_of(config, base, store)
    return next(batches(plan.steps, plan.row_fn, store, rows_per_step=plan.bounds.rows_per_step))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_video_equals_a_run_with_fewer_frames(family, bases, frames):
    base, config, model = build(bases[family], family)
    short = frames[:1, :3].copy()
    padded = np.concatenate([short, np.zeros_like(short[:, :1])], axis=1)
    slots = VideoPlaces(base, model_settings(config)).slots(3)
    want = tokens(build(bases[family], family, num_frames=3)[2], short)[0]
    got = tokens(model, padded, [3])[0][slots]
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(
        logits(model, base, got, "What moves?"), logits(model, base, want, "What moves?"), atol=1e-5
    )


def test_zero_is_video_chatgpts_way_with_short_videos(bases, frames):
    base, config, model = build(bases["llava"], "llava", short_video="zero")
    padded = np.concatenate([frames[:, :3], np.zeros_like(frames[:, :1])], axis=1)
    assert VideoPlaces(base, model_settings(config)).slots(3) == list(range(NUM_FRAMES + 16))
    zero = jnp.zeros((1, 1, base.config.vision_hidden_size))
    want = np.asarray(model.projectors["temporal"](zero, jnp.ones((1, 1), bool), (1,)))[0, 0]
    np.testing.assert_allclose(tokens(model, padded, [3, 3])[1, 3], want, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_temporal_module_starts_as_an_untied_bit_equal_copy(family, bases):
    _, _, model = build(bases[family], family)
    spatial, temporal = (nnx.to_pure_dict(nnx.state(model.projectors[name])) for name in ("spatial", "temporal"))
    jax.tree.map(np.testing.assert_array_equal, spatial, temporal)
    leaves = zip(*(jax.tree.leaves(nnx.state(model.projectors[name])) for name in ("spatial", "temporal")), strict=True)
    assert all(a is not b for a, b in leaves)


def test_streams_and_their_order(bases, frames):
    both = tokens(build(bases["llava"], "llava")[2], frames)
    spatial = tokens(build(bases["llava"], "llava", streams="spatial")[2], frames)
    temporal = tokens(build(bases["llava"], "llava", streams="temporal")[2], frames)
    swapped = tokens(build(bases["llava"], "llava", stream_order="spatial_first")[2], frames)
    assert spatial.shape[1] == 16 and temporal.shape[1] == NUM_FRAMES
    np.testing.assert_allclose(both, np.concatenate([temporal, spatial], 1), atol=1e-6)
    np.testing.assert_allclose(swapped, np.concatenate([spatial, temporal], 1), atol=1e-6)


def test_a_shared_projector_serves_both_streams(bases, frames):
    shared, own = (build(bases["llava"], "llava", temporal_module=flag)[2] for flag in (False, True))
    assert set(shared.projectors) == {"spatial"} and set(own.projectors) == {"spatial", "temporal"}
    np.testing.assert_allclose(tokens(shared, frames), tokens(own, frames), atol=1e-6)
    graphdef, trainable, frozen = split_trainable(shared)
    moved = join(graphdef, jax.tree.map(lambda x: x * 1.1, trainable), frozen)
    assert (tokens(moved, frames)[:, :NUM_FRAMES] != tokens(own, frames)[:, :NUM_FRAMES]).any(-1).all()


def test_a_random_temporal_module_leaves_the_spatial_one(bases, frames):
    model, copied = (build(bases["llava"], "llava", temporal_init=init)[2] for init in ("random", "copy"))
    random, copy = tokens(model, frames), tokens(copied, frames)
    np.testing.assert_allclose(random[:, NUM_FRAMES:], copy[:, NUM_FRAMES:], atol=1e-6)
    assert not np.allclose(random[:, :NUM_FRAMES], copy[:, :NUM_FRAMES], atol=1e-4)


def test_extra_mlps_stand_behind_both_projectors(bases, frames):
    model, plain = (build(bases["llava"], "llava", extra_mlp=flag)[2] for flag in (True, False))
    assert {"extra_mlp_spatial", "extra_mlp_temporal"} <= set(model.projectors)
    want = tokens(plain, frames)
    want = np.concatenate(
        [
            model.projectors["extra_mlp_temporal"](want[:, :NUM_FRAMES]),
            model.projectors["extra_mlp_spatial"](want[:, NUM_FRAMES:]),
        ],
        axis=1,
    )
    np.testing.assert_allclose(tokens(model, frames), want, atol=1e-6)


def test_window_pooling_shortens_only_the_spatial_stream(bases, frames):
    small, full = (tokens(build(bases["llava"], "llava", spatial_pool=p)[2], frames) for p in (2, 1))
    assert small.shape[1] == NUM_FRAMES + 4 and full.shape[1] == NUM_FRAMES + 16
    np.testing.assert_allclose(small[:, :NUM_FRAMES], full[:, :NUM_FRAMES], atol=1e-6)


def test_qwen_alignments_and_temporal_positions(bases, frames):
    resample = tokens(build(bases["qwen_vl"], "qwen_vl")[2], frames)
    flat = tokens(build(bases["qwen_vl"], "qwen_vl", temporal_positions="1d")[2], frames)
    per_token = tokens(build(bases["qwen_vl"], "qwen_vl", qwen_align="per_token")[2], frames)
    assert resample.shape[1] == 16 + 16 and per_token.shape[1] == NUM_FRAMES + 16
    assert not np.allclose(flat[:, :16], resample[:, :16], atol=1e-6)
    np.testing.assert_allclose(flat[:, 16:], resample[:, 16:], atol=1e-6)


def test_finetune_labels_supervise_qwens_structural_tokens_too(bases, stores):
    base, *_ = build(bases["qwen_vl"], "qwen_vl")
    rows, tokenizer = open_store(stores["qwen_vl"]).instructions[:3], base.module.Tokenizer(base.path)
    (before, answer), (full_before, full) = (
        tokenize(base.module, tokenizer, base.config, rows, labels=labels) for labels in ("answer", "finetune")
    )
    assert not any(flag for _, flag in before) and any(flag for _, flag in full_before)
    for a, b in zip(answer, full, strict=True):
        assert b.supervised.sum() > a.supervised.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_remat_changes_no_gradient(family, bases, stores):
    base, config, model = build(bases[family], family, num_epochs=1, batch_questions=8, row_length=110)
    batch = whole_epoch(base, config, open_store(stores[family]))
    graphdef, trainable, frozen = split_trainable(model)

    def gradient(remat):
        return jax.jit(jax.grad(lambda w: mean_loss(join(graphdef, w, frozen), batch, DTYPE, remat=remat)[0]))(
            trainable
        )

    whole = gradient("none")
    for remat in ("full", ",".join(KEPT)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradient(remat), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activations_named_are_the_ones_stored(family, bases, stores):
    base, config, model = build(bases[family], family, num_epochs=1, batch_questions=8, row_length=110)
    batch = whole_epoch(base, config, open_store(stores[family]))
    graphdef, trainable, frozen = split_trainable(model)

    def gradient(remat):
        return jax.grad(lambda w: mean_loss(join(graphdef, w, frozen), batch, DTYPE, remat=remat)[0])

    c, (rows, slots) = model.llm.config, batch["token_ids"].shape
    gates = f"[{c.num_hidden_layers},{rows},{slots},{c.intermediate_size}]"  # of all layers
    assert gates in str(jax.make_jaxpr(gradient("gate,up"))(trainable))
    assert gates not in str(jax.make_jaxpr(gradient("query,key,value,context,residual"))(trainable))


def test_a_supervised_prefix_token_counts_once_per_question():
    prefix = make_prefix([(5, False), (6, True)], [(0, 0), (0, 1)])
    question = Question(ids=np.array([7, 8], np.int32), supervised=np.array([False, True]))
    row = fill_row(
        ((0, (0, 1)),), [prefix], [question] * 2, row_length=16, max_groups=1, max_targets=4, tokens_per_video=2
    )
    np.testing.assert_array_equal(row["target_weights"], [2, 1, 1, 0])
    np.testing.assert_array_equal(row["target_ids"][:3], [6, 8, 8])


def test_a_short_video_in_a_store_trains_as_a_shorter_store(bases, stores, tmp_path):
    """One video of three frames, read through the plan, the rows and the pipeline."""
    lines = [json.loads(line) for line in (stores["llava"] / "videos.jsonl").read_text().splitlines()]
    video = lines[0]["video"]
    asked = [row for row in open_store(stores["llava"]).instructions if row["video"] == video]
    frames = open_store(stores["llava"])[0]["frames"][:3]
    results = []
    for num_frames in (4, 3):
        settings = {"kind": "frames", "num_frames": num_frames, "image_size": 32, "format": "raw"}
        path = tmp_path / str(num_frames)
        source = {"video": video, "source": "v.mp4", "bytes": 1}
        result = {"line": lines[0] | {"num_frames": 3}, "record": {"frames": frames, "timestamps": np.zeros(3, "f")}}
        written = write_shards(path, settings, [source], lambda _, result=result: [result])
        finish_store(path, settings, written, asked, {})
        switches = {"num_epochs": 1, "batch_questions": 6, "num_frames": num_frames, "row_length": 200}
        base, config, model = build(bases["llava"], "llava", **switches)
        batch = whole_epoch(base, config, open_store(path))
        assert (batch["num_frames"] == 3).sum() == 1 and (batch["video_tokens"] >= 0).sum() == 3 + 16
        results.append(np.asarray(model.target_losses(batch, DTYPE))[batch["target_weights"] > 0])
    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_step_changes_no_frozen_weight(bases, stores):
    base, config, model = build(bases["llava"], "llava", num_epochs=1, batch_questions=8, row_length=110)
    batch = whole_epoch(base, config, open_store(stores["llava"]))
    graphdef, trainable, frozen = split_trainable(model)
    before = jax.tree.map(np.array, frozen)
    assert {path[0].key for path, _ in jax.tree_util.tree_flatten_with_path(frozen)[0]} == {"encoder", "llm"}
    labels = jax.tree.map(lambda _: "spatial", trainable)
    groups = {"learning_rate": {"spatial": 1.0}, "weight_decay": {"spatial": 0.1}}
    tx = make_optimizer(labels, **groups, total_steps=1, warmup_ratio=0, clip_norm=1)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shardings = state_shardings(tx, trainable, mesh)
    fixed = jax.tree.map(lambda _: False, trainable)
    step = make_train_step(graphdef, functools.partial(mean_loss, dtype=DTYPE), tx, fixed, shardings, mesh, {})
    start = jax.tree.map(np.array, trainable)
    after, _, _ = step(jax.tree.map(jnp.copy, trainable), tx.init(trainable), frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (start, after)), strict=True))
