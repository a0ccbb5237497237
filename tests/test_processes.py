import ctypes
import multiprocessing
import os
import signal
import time

import pytest

from data_pipeline.common.processes import ordered_map


def run(function, items, num_workers=2, time_limit=60.0):
    return ordered_map(
        function, items, num_workers, time_limit=time_limit, failed=lambda item, reason: f"{item}: {reason}"
    )


def misbehave(item):
    """Ends its process by a signal or with a code, hangs, or returns its item and its process."""
    if item == "crash":
        ctypes.string_at(0)
    if item == "exit":
        os._exit(3)
    if item == "hang":
        time.sleep(1000)
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid()


def large(item):
    """A little, and then more than a pipe holds."""
    return bytes(item)


def test_ordered_map_keeps_the_order_and_can_be_left_early():
    for workers in (1, 2):
        assert list(run(abs, range(-50, 0), workers)) == list(range(50, 0, -1))
    some = run(abs, range(100))
    assert next(some) == 0
    some.close()
    assert multiprocessing.active_children() == []
    assert list(run(abs, [])) == []
    assert [len(x) for x in run(large, [0, 5_000_000, 1, 5_000_001])] == [0, 5_000_000, 1, 5_000_001]


def test_ordered_map_runs_only_a_little_ahead():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    class Items(list):
        def __iter__(self):
            return items()

    some = run(abs, Items(range(1000)))
    next(some)
    assert len(taken) <= 17
    some.close()


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="invalid literal") as raised:
        list(run(int, ["1", "x"]))
    assert "Traceback" in raised.value.__notes__[0]
    assert multiprocessing.active_children() == []


def test_what_kills_or_holds_a_worker_costs_only_its_own_item():
    items = ["a", "crash", "b", "kill", "c", "exit", "d", "hang", "e", "f"]
    start = time.monotonic()
    results = list(run(misbehave, items, time_limit=2))
    assert time.monotonic() - start < 30
    assert [result[0] for result in results if isinstance(result, tuple)] == ["a", "b", "c", "d", "e", "f"]
    assert results[1::2][:4] == [
        "crash: crashed (SIGSEGV)",
        "kill: was killed (SIGKILL), perhaps because memory ran out",
        "exit: ended with code 3",
        "hang: took more than 2 s",
    ]
    assert os.getpid() not in {result[1] for result in results if isinstance(result, tuple)}


def test_a_waiting_caller_costs_no_item():
    """Results that are ready in time are taken, however late they are asked for."""
    some = run(abs, range(-6, 0), time_limit=1)
    first = next(some)
    time.sleep(1.5)
    assert [first, *some] == [6, 5, 4, 3, 2, 1]
