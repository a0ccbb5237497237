import os

import pytest

from data_pipeline.errors import UserError
from data_pipeline.processes import ordered_map


def test_ordered_map_keeps_the_order_and_can_be_left_early():
    for workers in (1, 2):
        assert list(ordered_map(abs, range(-50, 0), workers)) == list(range(50, 0, -1))
    some = ordered_map(abs, range(100), 2)
    assert next(some) == 0
    some.close()


def test_ordered_map_runs_only_a_little_ahead():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    class Items(list):
        def __iter__(self):
            return items()

    some = ordered_map(abs, Items(range(1000)), 2)
    next(some)
    assert len(taken) <= 17
    some.close()


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="invalid literal"):
        list(ordered_map(int, ["1", "x"], 2))


def test_a_killed_worker_is_said_in_one_line():
    with pytest.raises(UserError, match="a worker process was killed"):
        list(ordered_map(os._exit, [1, 1], 2))
