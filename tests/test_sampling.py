import numpy as np
import pytest

from data_pipeline.media.sampling import choose_frames, frames_of_part, sampling_name, uniform_indices

TEN = np.arange(50) / 10  # five seconds at ten frames a second
UNEVEN = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 7.0])  # a slide show


def chosen(times, sampling, num_frames=100, part=None):
    return choose_frames(np.array(times), sampling, num_frames, part).tolist()


@pytest.mark.parametrize(
    ("total", "first", "last"),
    [
        (3000, [15, 45, 75], 2984),
        (1000, [5, 15, 25], 994),
        (150, [0, 2, 3, 5, 6, 8], 148),
        (101, [0, 1, 2], 99),
    ],
)
def test_uniform_indices_of_long_videos(total, first, last):
    indices = uniform_indices(total, 100)
    assert len(indices) == 100
    assert indices[: len(first)].tolist() == first
    assert indices[-1] == last
    assert chosen(np.full(total, np.nan), "uniform") == indices.tolist()  # times do not matter


def test_uniform_indices_of_short_videos_repeat_one_and_never_take_the_last():
    assert uniform_indices(10, 100).tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    for total in range(2, 101):
        indices = uniform_indices(total, 100)
        assert len(indices) == total
        assert len(set(indices.tolist())) == total - 1
        assert indices[-1] == total - 2
    assert uniform_indices(1, 100).tolist() == [0]


def test_uniform_indices_match_the_published_loop():
    for total, num_frames in [(7, 3), (32, 16), (150, 100), (999, 100), (1001, 64)]:
        n = min(total, num_frames)
        segment = float(total - 1) / n
        expected = [(int(np.round(segment * i)) + int(np.round(segment * (i + 1)))) // 2 for i in range(n)]
        assert uniform_indices(total, num_frames).tolist() == expected


def test_every_nth():
    assert chosen(TEN, "every=8") == [0, 8, 16, 24, 32, 40, 48]
    assert chosen(TEN, "every=100") == [0]
    assert chosen(TEN, "every=1", num_frames=5) == uniform_indices(50, 5).tolist()
    assert chosen(TEN, "every=8", num_frames=3) == (8 * uniform_indices(7, 3)).tolist()


def test_frames_a_second_are_those_shown_at_the_time():
    assert chosen(TEN, "fps=1") == [0, 10, 20, 30, 40]
    assert chosen(TEN, "fps=4") == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37, 40, 42, 45, 47]
    assert chosen(TEN, "fps=0.1") == [0]
    assert chosen(UNEVEN, "fps=1") == [0, 2, 2, 3, 4, 4, 4, 5]
    assert chosen(UNEVEN, "fps=1", num_frames=3) == [2, 3, 4]  # of the line above, those at 1, 3 and 6
    assert chosen([0.0], "fps=30") == [0]
    assert len(chosen([0.0, 1e9], "fps=1000", num_frames=7)) == 7  # damaged: not a list of 10^12 times


def test_parts_are_the_frames_shown_in_them():
    assert frames_of_part(TEN, (1, 2)) == (10, 20)
    assert frames_of_part(TEN, (0.95, 1.05)) == (9, 11)
    assert frames_of_part(TEN, (4.96, 90)) == (49, 50)
    assert frames_of_part(UNEVEN, (1, 2)) == (2, 3)
    assert chosen(TEN, "uniform", 4, (1, 2)) == (10 + uniform_indices(10, 4)).tolist()
    assert chosen(TEN, "every=4", 100, (1, 2)) == [10, 14, 18]
    assert chosen(TEN, "fps=2", 100, (1.25, 3)) == [12, 17, 22, 27]
    assert chosen(UNEVEN, "fps=1", 100, (1, 4)) == [2, 2, 3]
    with pytest.raises(ValueError, match=r"ends after 5.00 s, before the part from 5 to 6 s"):
        chosen(TEN, "uniform", 4, (5, 6))


def test_seconds_need_times():
    for sampling, part in (("fps=1", None), ("uniform", (0, 1))):
        with pytest.raises(ValueError, match="neither timestamps nor a frame rate"):
            chosen([np.nan, np.nan], sampling, part=part)


def test_a_rule_has_one_name():
    names = {
        "uniform": "uniform",
        "fps=1.50": "fps=1.5",
        "fps=2.0": "fps=2",
        "every=08": "every=8",
        "fps=.5": "fps=0.5",
    }
    assert {name: sampling_name(name) for name in names} == names
    for wrong in ("", "fps", "fps=0", "every=1.5", "every=0", "fps=-1", "nth=3", "uniform=2"):
        with pytest.raises(ValueError, match="expected"):
            sampling_name(wrong)
