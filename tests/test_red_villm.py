"""The video representation: pooling, order, layouts, short videos; values by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from redvillm_jax.model.places import blocks
from redvillm_jax.video.contract import make_video, num_features
from redvillm_jax.video.red_villm import FIELDS, Video


@pytest.fixture
def features() -> np.ndarray:
    """(B=2, T=3, N=16, D=2)."""
    return np.random.default_rng(0).normal(size=(2, 3, 16, 2)).astype(np.float32)


def video(**switches) -> Video:
    return make_video("red_villm", {"num_frames": 3} | {k: f.default for k, f in FIELDS.items()} | switches)


def streams(video: Video, features: np.ndarray, num_frames: list[int]) -> dict:
    """Pooled features, which of them are of real frames, and their layout, by stream."""
    pooled = video.pool(features.reshape(*features.shape[:2], 4, 4, -1), jnp.array(num_frames))
    found = {}
    for index, stream in enumerate(video.order((4, 4), 3)):
        counts = num_features(video, (4, 4), index)
        real = np.array([np.arange(pooled[stream.name].shape[1]) < counts[n] for n in num_frames])
        found[stream.name] = pooled[stream.name], real, stream.layout
    return found


def slots(video: Video, projector, num_frames: int) -> list[int]:
    return [slot for block in blocks(video, projector, (2, 2), num_frames) for slot in block.slots]


def test_streams_are_the_two_means(features):
    pooled = streams(video(), features, [3, 3])
    np.testing.assert_allclose(pooled["spatial"][0], features.mean(1), atol=1e-6)
    np.testing.assert_allclose(pooled["temporal"][0], features.mean(2), atol=1e-6)
    assert pooled["spatial"][2] == (4, 4) and pooled["temporal"][2] == (3,)
    assert pooled["temporal"][1].all() and pooled["spatial"][1].all()


def test_short_videos_average_over_real_frames_only(features):
    features[1, 2] = 99.0  # a frame that is not there
    pooled = streams(video(), features, [3, 2])
    np.testing.assert_allclose(pooled["spatial"][0][1], features[1, :2].mean(0), atol=1e-6)
    np.testing.assert_array_equal(pooled["temporal"][1], [[True, True, True], [True, True, False]])
    zero = streams(video(short_video="zero"), features, [3, 2])
    assert zero["temporal"][1].all() and (np.asarray(zero["temporal"][0][1, 2]) == 0).all()


def test_window_pooling_is_the_mean_of_each_two_by_two_window(features):
    small, mask, layout = streams(video(spatial_pool=2), features, [3, 3])["spatial"]
    grid = features.mean(1).reshape(2, 4, 4, 2)
    np.testing.assert_allclose(small[:, 1], grid[:, 0:2, 2:4].mean((1, 2)), atol=1e-6)
    assert layout == (2, 2) and mask.shape == (2, 4)


def test_pooling_commutes_with_the_temporal_stream(features):
    one, two = (streams(video(spatial_pool=p), features, [3, 3])["temporal"][0] for p in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_no_video_gives_finite_zeros(features):
    pooled = streams(video(), features, [3, 0])
    assert all((np.asarray(x[1]) == 0).all() for x, _, _ in pooled.values())


@pytest.mark.parametrize(
    ("switches", "order"),
    [
        ({}, (("temporal", "temporal"), ("spatial", "spatial"))),
        ({"stream_order": "spatial_first"}, (("spatial", "spatial"), ("temporal", "temporal"))),
        ({"temporal_module": False}, (("temporal", "spatial"), ("spatial", "spatial"))),
        ({"streams": "spatial"}, (("spatial", "spatial"),)),
        ({"streams": "temporal"}, (("temporal", "temporal"),)),
    ],
)
def test_order_of_streams_and_their_projectors(switches, order):
    assert tuple((s.name, s.projector) for s in video(**switches).order((2, 2), 3)) == order


class PerToken:
    """A projector with one token per feature."""

    def token_layout(self, layout):
        return layout


class Resampler:
    """A projector with seven tokens, whatever comes in."""

    def token_layout(self, layout):
        return (7,)


def test_token_slots_leave_out_what_a_short_video_lacks():
    assert slots(video(), PerToken(), 3) == list(range(7))
    assert slots(video(), PerToken(), 1) == [0, 3, 4, 5, 6]
    assert slots(video(short_video="zero"), PerToken(), 1) == list(range(7))
    assert slots(video(stream_order="spatial_first"), PerToken(), 2) == [0, 1, 2, 3, 4, 5]
    assert slots(video(spatial_pool=2), PerToken(), 3) == [0, 1, 2, 3]
    assert slots(video(), Resampler(), 1) == list(range(14))
