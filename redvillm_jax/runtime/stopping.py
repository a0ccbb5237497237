"""Handles SIGTERM, which schedulers and preempted machines send: a run saves before its process ends."""

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
STOP_SECONDS = 300  # after SIGTERM for the step and the save; whatever takes longer will not end
UNSAVED_CODE = 1


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[int], bool]]:
    """Within it SIGTERM does not end the process; yields asked(step) -> whether to save and end after that step.

    With several processes each must ask after every step: one SIGTERM anywhere stops all after the same step. A step
    or a save that has not ended after STOP_SECONDS ends the process with a line.
    """
    if jax.process_count() > 1:  # jax's own handler, set up by `distributed.connect`, which also counts the seconds
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
    """Within it the process ends STOP_SECONDS after SIGTERM, for which it has a handler.

    A handler runs when the main thread is back in Python, which may be never; a thread hears of signals by a socket.
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
    """What to say at the end of a process that cannot save."""
    return (
        f"SIGTERM came {STOP_SECONDS} seconds ago and a step or a save has still not ended: what came after the newest "
        "checkpoint is lost; the same command continues from there"
    )
