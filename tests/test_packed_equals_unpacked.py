"""Packed rows against the same questions run one by one, with short and split videos in the batch."""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EVERY_FAMILY, FAMILIES, NUM_FRAMES
from helpers import plan_of

from configs import demo
from data_pipeline.common.errors import UserError
from data_pipeline.pipeline import batches
from data_pipeline.store import VideoStore, finish_store, open_store, write_shards
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training.step import join, split_trainable

FRAMES = (4, 2, 4, 1, 3, 4)  # of each video; those below NUM_FRAMES are short
QUESTIONS = (10, 2, 9, 3, 4, 2)  # on each video
ROW_LENGTH = 3  # times the longest question alone: no nine questions on a video, but two videos with three
BATCH_QUESTIONS = 22  # of 30: the second step is smaller and has rows of padding
TOLERANCE = 1e-5


@pytest.fixture
def mixed(family, stores, tmp_path) -> VideoStore:
    """Videos of FRAMES random frames and QUESTIONS questions, their texts from the family's store."""
    path, rng = tmp_path / "store", np.random.default_rng(0)
    whole = open_store(stores[family])
    settings = {"kind": "frames", "num_frames": NUM_FRAMES, "image_size": 32, "format": "raw"}
    results, asked, texts = [], [], iter(whole.instructions)
    for line, num_frames, count in zip(whole.videos, FRAMES, QUESTIONS, strict=False):
        frames = rng.integers(0, 256, (num_frames, 32, 32, 3), np.uint8)
        record = {"frames": frames, "timestamps": np.zeros(num_frames, np.float32)}
        results.append({"line": line | {"num_frames": num_frames}, "record": record})
        asked += [row | {"video": line["video"]} for row in itertools.islice(texts, count)]
    names = [result["line"]["video"] for result in results]
    sources = [{"video": name, "source": f"{name}.mp4", "bytes": 1} for name in names]
    shards = write_shards(path, settings, sources, lambda _: results)
    finish_store(path, settings, shards, asked, {})
    return open_store(path)


def plan(base, family, store, **switches):
    """(config, row plan) of one epoch of a store."""
    config = plain_config(demo.get_config(family)) | {"num_frames": NUM_FRAMES, "num_epochs": 1} | switches
    return config, plan_of(config, base, store)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_mixed_rows_equal_questions_one_by_one(family, bases, mixed):
    base = open_base(bases[family])
    _, alone = plan(base, family, mixed, pack=False, batch_questions=1, row_length=0)
    switches = {"batch_questions": BATCH_QUESTIONS, "row_length": ROW_LENGTH * alone.bounds.slots_per_row}
    config, packed = plan(base, family, mixed, pack=True, **switches)
    check_variety(packed.steps)

    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    graphdef, trainable, frozen = split_trainable(load_model(base, model_settings(config), mesh, dtype=jnp.float32))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(weights, batch):
        losses = join(graphdef, weights, frozen).target_losses(batch, jnp.float32)
        return (losses * batch["target_weights"]).sum(), losses

    def sums(steps) -> tuple[np.ndarray, dict]:
        """Each question's loss, and the gradients of the summed loss, added up over steps in fp64."""
        per_question, total = np.zeros(len(mixed.instructions)), jax.tree.map(np.zeros_like, trainable)
        for batch in batches(steps, packed.row_fn, mixed, rows_per_step=packed.bounds.rows_per_step):
            gradients, losses = gradient(trainable, batch)
            counted = batch["target_weights"] > 0
            np.add.at(per_question, batch["target_questions"][counted], np.asarray(losses)[counted])
            total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, gradients)
        return per_question, total

    (losses, gradients), (want_losses, want_gradients) = sums(packed.steps), sums(alone.steps)
    np.testing.assert_allclose(losses, want_losses, rtol=TOLERANCE)
    for (path, want), got in zip(jax.tree.leaves_with_path(want_gradients), jax.tree.leaves(gradients), strict=True):
        difference, limit = np.linalg.norm(got - want), TOLERANCE * np.linalg.norm(want)
        assert difference <= limit, f"{jax.tree_util.keystr(path)}: {difference:.2g}, expected {limit:.2g} at most"


def check_variety(steps) -> None:
    """Asserts that the plan has every case in which a row could differ from single questions."""
    several = [[group for group in row if len(group[1]) > 1] for step in steps for row in step]
    assert any(len({FRAMES[video] for video, _ in row}) > 1 for row in several), "no row mixes lengths of videos"
    rows_of = [Counter(video for row in step for video, _ in row) for step in steps]
    assert any(max(counts.values()) > 1 for counts in rows_of), "no video has questions in two rows of a step"
    assert len(set(map(len, steps))) > 1, "no row of padding"


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_longer_than_the_row_is_refused_not_cut(family, pack, bases, mixed):
    base = open_base(bases[family])
    longest = plan(base, family, mixed, pack=False, row_length=0)[1].bounds.slots_per_row
    plan(base, family, mixed, pack=pack, row_length=longest)
    with pytest.raises(UserError, match=rf"takes {longest} tokens .* rows hold {longest - 1}"):
        plan(base, family, mixed, pack=pack, row_length=longest - 1)
