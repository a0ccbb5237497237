"""Maps a function over items in worker processes that may crash, and that never outlive the command.

concurrent.futures.ProcessPoolExecutor gives up all work when one process dies, and cannot end one that takes too long.
"""

import collections
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from data_pipeline.common.errors import UserError

LOST = (EOFError, OSError)  # raised by a connection when the process at its other end has died


def ordered_map(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    num_workers: int,
    *,
    time_limit: float,
    failed: Callable[[Any, str], Any],
) -> Iterator[Any]:
    """Yields function(item) in order, computed by `num_workers` processes at most a few items ahead.

    Workers are spawned, not forked. When a process dies, or is killed because an item takes more than `time_limit`
    seconds, the item gives failed(item, reason), and a new process takes the next item. Exceptions of `function` are
    raised here. Raises UserError when a process cannot start.
    """
    if not items:
        return
    workers = _Workers(function, time_limit, failed)
    with ThreadPoolExecutor(min(num_workers, len(items))) as pool:
        pending: collections.deque[Future] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(workers.call, item))
                if len(pending) == 8 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.close()


class _Workers:
    """One process for each calling thread, which waits for the process and can end it."""

    def __init__(self, function: Callable[[Any], Any], time_limit: float, failed: Callable[[Any, str], Any]):
        self.function, self.time_limit, self.failed = function, time_limit, failed
        self.mine = threading.local()
        self.lock = threading.Lock()
        self.processes: set[multiprocessing.process.BaseProcess] | None = set()  # None: closed

    def call(self, item: Any) -> Any:
        """Computes function(item) in the calling thread's process."""
        if not hasattr(self.mine, "process") or not self.mine.process.is_alive():
            self.mine.process, self.mine.connection = self._start()
        process, connection = self.mine.process, self.mine.connection
        try:
            connection.send(item)
            if not connection.poll(self.time_limit):
                self._end(process)
                return self.failed(item, f"took more than {self.time_limit:g} s")
            result, error = connection.recv()
        except LOST:
            self._end(process)
            return self.failed(item, _death(process.exitcode))
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Kills all processes."""
        with self.lock:
            processes, self.processes = self.processes, None
        for process in processes:
            process.kill()
            process.join()

    def _start(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function))
        with self.lock:
            if self.processes is None:
                raise UserError("stopped")
            process.start()
            self.processes.add(process)
        theirs.close()
        try:
            connection.recv()  # it has imported all that it needs
        except LOST:
            process.join()
            raise UserError(f"a worker process could not start: it {_death(process.exitcode)}") from None
        return process, connection

    def _end(self, process: multiprocessing.process.BaseProcess) -> None:
        process.kill()
        process.join()
        with self.lock:
            if self.processes is not None:
                self.processes.discard(process)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The loop of a worker: receives an item, sends its result or error."""
    follow_parent()
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except LOST:
            return
        try:
            answer = function(item), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        connection.send(answer)


def _death(exitcode: int | None) -> str:
    """How a process ended, as the end of a sentence. exitcode: None when another thread has just read it."""
    if exitcode == -signal.SIGKILL:
        return "was killed (SIGKILL), perhaps because memory ran out"
    if exitcode is not None and exitcode < 0:
        return f"crashed ({signal.Signals(-exitcode).name})"
    return f"ended with code {exitcode}"


def follow_parent() -> None:
    """Called in a worker: ignores Ctrl-C, which the parent handles, and ends when the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
