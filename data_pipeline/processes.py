"""Worker processes that keep the order, run only a little ahead, and never outlive the command."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipeline.errors import UserError


def ordered_map(function: Callable[[Any], Any], items: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """Yields function(item) in order, computed by `num_workers` processes at most a few items ahead.

    Workers are spawned, not forked. One worker, or one item, runs in this process. Raises UserError when a
    worker is killed.
    """
    if num_workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=follow_parent) as pool:
        pending: collections.deque = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == 8 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, out of memory or by what it read: try --num_workers=1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Called in a worker: leaves Ctrl-C to the parent and ends with it, even when it is killed by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
