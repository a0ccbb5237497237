"""Handles SIGTERM, the signal of schedulers and preempted machines: a run saves before its process ends."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from redvillm_jax.runtime.jax_private import asks_to_stop

EXIT_CODE = 143  # 128 + SIGTERM, as for a process that does not save
STOP_SECONDS = 300  # for the step and the save after SIGTERM; longer than both ever take
UNSAVED_CODE = 1


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[int], bool]]:
    """A context in which SIGTERM does not end the process; yields asked(step): whether to save and end after the step.

    With several processes, each must call asked after every step; one SIGTERM stops all after the same step. The
    process ends with a line if the step and the save take longer than STOP_SECONDS.
    """
    if jax.process_count() > 1:  # jax handles SIGTERM; `distributed.listen` counts the seconds
        yield asks_to_stop()
        return
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        with limited():
            yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A context in which the process ends STOP_SECONDS after SIGTERM; SIGTERM must have a handler.

    A handler runs only when the main thread is back in Python, perhaps never; so a thread reads signals from a socket.
    """
    heard, tell = socket.socketpair()
    tell.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        while (number := heard.recv(1)) and number[0] != signal.SIGTERM:
            pass
        if number and not over.wait(STOP_SECONDS):
            print(f"error: {unsaved()}", file=sys.stderr, flush=True)
            os._exit(UNSAVED_CODE)

    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        tell.close()
        thread.join()
        heard.close()


def unsaved() -> str:
    """Returns the message of a process that ends without saving."""
    return (
        f"SIGTERM came {STOP_SECONDS} seconds ago and a step or a save has still not ended: all steps after the newest "
        "checkpoint are lost; the same command continues from there"
    )
