"""Bootstrap intervals: cases that can be worked out, clusters, groups, and how often they hold the truth."""

import numpy as np
import pytest

from redvillm_jax.evaluation.intervals import means


def one(videos, values, **more):
    return means(videos, [("all",)] * len(videos), {"m": values}, **more)["m"]["all"]


def test_cases_that_can_be_worked_out():
    assert one(["a", "b", "b"], [3, 3, 3]) == {"mean": 3.0, "low": 3.0, "high": 3.0, "questions": 3, "videos": 2}
    # Of two videos with 0 and 1, a quarter of the resamples has only the one, a quarter only the other.
    assert one(["a", "b"], [0, 1]) == {"mean": 0.5, "low": 0.0, "high": 1.0, "questions": 2, "videos": 2}
    # Three questions about a, one about b: the mean is over questions, and a resample's is 0, 3/4 or 1.
    found = one(["a", "a", "a", "b"], [1, 1, 1, 0])
    assert (found["mean"], found["low"], found["high"]) == (0.75, 0.0, 1.0)
    assert one(["a", "a"], [0, 1]) == {"mean": 0.5, "low": None, "high": None, "questions": 2, "videos": 1}


def test_independent_questions_have_the_binomial_interval():
    values = np.arange(1000) % 5 == 0
    found = one([f"v{i}" for i in range(1000)], values)
    half = 1.96 * (0.2 * 0.8 / 1000) ** 0.5
    assert found["mean"] == 0.2
    assert 0.2 - found["low"] == pytest.approx(half, rel=0.06) and found["high"] - 0.2 == pytest.approx(half, rel=0.06)


def test_questions_that_repeat_a_video_add_nothing():
    """Ten questions a video that all go the same way have the interval of one: 10 ** 0.5 times that of ten videos."""
    right = np.random.default_rng(0).random(300) < 0.6
    single = one([f"v{i}" for i in range(300)], right)
    clustered = one([f"v{i // 10}" for i in range(3000)], np.repeat(right, 10))
    apart = one([str(i) for i in range(3000)], np.repeat(right, 10))
    assert (clustered["mean"], clustered["low"], clustered["high"]) == pytest.approx(
        (single["mean"], single["low"], single["high"]), abs=1e-12
    )
    width = [found["high"] - found["low"] for found in (clustered, apart)]
    assert width[0] / width[1] == pytest.approx(10**0.5, rel=0.06)


def test_it_is_always_the_same_and_order_does_not_matter():
    random = np.random.default_rng(1)
    videos, values = [f"v{i}" for i in random.integers(0, 40, 200)], random.random(200)
    order = random.permutation(200)
    again = one([videos[i] for i in order], values[order])
    assert again == pytest.approx(one(videos, values), abs=1e-12)
    assert one(videos, values) == one(videos, values)
    assert one(videos, values, seed=1)["low"] != one(videos, values)["low"]


def test_groups_and_the_mean_over_them():
    videos = [f"v{i}" for i in range(200)]
    groups = [("all", "x") if i < 150 else ("all", "y") for i in range(200)]
    values = [1.0] * 150 + [0.0, 1.0] * 25
    found = means(videos, groups, {"m": values, "double": [2 * value for value in values]}, ["x", "y"])
    assert found["m"]["all"]["mean"] == 175 / 200 and found["m"]["x"]["mean"] == 1 and found["m"]["y"]["mean"] == 0.5
    assert found["m"]["mean"]["mean"] == 0.75 and found["m"]["mean"]["questions"] == 200
    assert found["m"]["y"]["questions"] == found["m"]["y"]["videos"] == 50 and found["m"]["x"]["low"] == 1
    # x is certain, so that the mean's interval is half as wide as y's.
    width = {group: found["m"][group]["high"] - found["m"][group]["low"] for group in ("y", "mean")}
    assert width["mean"] == pytest.approx(width["y"] / 2) and width["y"] == pytest.approx(2 * 1.96 * 0.07, rel=0.1)
    assert found["double"]["y"]["high"] == pytest.approx(2 * found["m"]["y"]["high"])
    few = means(["a", "b", "c"], [("x",), ("x",), ("y",)], {"m": [0, 1, 1]}, ["x", "y"])["m"]
    assert few["mean"]["mean"] == 0.75 and few["mean"]["low"] is None, "one of its groups has but one video"


def test_they_hold_the_truth_about_as_often_as_they_say():
    """Videos of unequal size whose questions go together; the truth is a half."""
    random, hits = np.random.default_rng(2), 0
    for _ in range(200):
        sizes = random.integers(1, 8, 60)
        videos = np.repeat(np.arange(60), sizes)
        values = random.random(len(videos)) < random.beta(2, 2, 60)[videos]
        found = one([str(video) for video in videos], values, resamples=400)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.90 <= hits / 200 <= 0.985


def test_ten_thousand_resamples_of_a_large_set_take_seconds():
    random = np.random.default_rng(0)
    videos = [f"v{i}" for i in random.integers(0, 9000, 13_691)]
    groups = [("all", f"kind:{i}") for i in random.integers(0, 9, len(videos))]
    found = means(videos, groups, {"accuracy": random.random(len(videos))})["accuracy"]
    assert len(found) == 10 and found["all"]["low"] < 0.5 < found["all"]["high"]
