"""Connects the processes of a run: the hosts of a TPU pod or of a cluster, or processes on one machine.

Processes that compute together can only end together. A process that fails tells the others the reason, and they end
at once. A process that is killed is noticed after SILENCE_SECONDS. Either way each process prints one line that names
the failed one.
"""

import atexit
import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from data_pipeline.common import locks
from data_pipeline.common.errors import UserError, run
from redvillm_jax.runtime import jax_private, stopping
from redvillm_jax.runtime.chips import quiet_without_tpu
from redvillm_jax.runtime.jax_private import SIGTERM_NOTICE, look_up
from redvillm_jax.runtime.xla_messages import out_of_memory, small_memory

PORT = "8476"  # Google Cloud's default firewall allows it, but not jax's own choice (jax#35905)
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
WAIT_SECONDS = 300  # for the other processes at start-up
SILENCE_SECONDS = 60  # of silence of a process, before the others give up
NEWS = "redvillm_jax/ended"
STDERR = 2  # the file descriptor that jax's C++ code writes to


def command(main: Callable[[list[str]], int | None], *, saves_when_stopped: bool = False) -> None:
    """Runs `main(argv)` as a command in every process of a run (see `data_pipeline.common.errors.run`).

    saves_when_stopped: it asks `stopping` for SIGTERM after every step; otherwise SIGTERM ends it.
    """
    reason = ""

    def connected(argv: list[str]) -> int | None:
        nonlocal reason
        quiet_without_tpu()
        if not {"--help", "-h"} & set(argv):
            connect(saves_when_stopped)
        try:
            return with_memory_explained(main, argv)
        except (Exception, KeyboardInterrupt) as error:
            if jax_private.is_connected():
                if isinstance(error, jax.errors.JaxRuntimeError):
                    time.sleep(SILENCE_SECONDS + 15)  # often another process ended first, and `listen` reports that one
                reason = " ".join(f"{error}".split())[:500] or type(error).__name__
            raise

    try:
        run(connected)
    except SystemExit as end:
        if reason:
            leave(end.code, reason)
        raise


def with_memory_explained(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    """Runs `main(argv)`. Raises UserError when a device has too little memory."""
    try:
        return main(argv)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(str(error)):
            raise
        if problem := small_memory(str(error)):
            raise UserError(f"{problem}: shorten the rows (--config.row_length) or make batches smaller") from error
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"a device has too little memory ({said}): make batches smaller, or split the model over more devices "
            "(see --help and docs/performance.md)"
        ) from error


def connect(saves_when_stopped: bool = False) -> None:
    """Connects this process with the other processes of its run, if any; call it before jax computes anything.

    jax finds the others on a TPU pod and on clusters that it knows. Elsewhere set VARIABLES: the host of process 0, the
    number of processes, and the index of this process. The port is given with the host (host:port), by
    JAX_COORDINATOR_PORT, or is PORT. Raises UserError when only some of VARIABLES are set, or the port is taken.
    """
    port = os.environ.setdefault("JAX_COORDINATOR_PORT", PORT)
    jax.config.update("jax_enable_preemption_service", saves_when_stopped)
    settings: dict[str, Any] = {"initialization_timeout": WAIT_SECONDS, "heartbeat_timeout_seconds": SILENCE_SECONDS}
    given = [name for name in VARIABLES if os.environ.get(name)]
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{given[0]} is set, {missing} is not: set all of {', '.join(VARIABLES)}, or none")
    if given:
        address, count, index = (os.environ[name] for name in VARIABLES)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: expected a number below the other")
        address = address if ":" in address else f"{address}:{port}"
        if int(index) == 0:
            check_free(address.rpartition(":")[2])
        settings |= {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
    restore_stderr = explain_aborts()
    try:
        jax.distributed.initialize(**settings)
    except ValueError:
        if given:
            raise
        restore_stderr()  # there are no other processes
        return
    over = threading.Event()
    listener = threading.Thread(target=listen, args=(over,), daemon=True)
    listener.start()
    atexit.register(lambda: (over.set(), listener.join()))  # no thread may be inside jax when Python ends


def check_free(port: str) -> None:
    """Raises UserError when a port of this machine is taken; jax would crash."""
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"port {port} of this machine cannot be used ({error}): choose one by {VARIABLES[0]}") from None


def explain_aborts() -> Callable[[], None]:
    """Sends stderr through `abort_filter.py`, because jax aborts with a stack trace when another process is gone.

    Returns a function that undoes it.
    """
    script, pipe = Path(__file__).with_name("abort_filter.py"), subprocess.PIPE
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", script], stdin=pipe, stdout=subprocess.DEVNULL, start_new_session=True
    )
    before = os.dup(STDERR)
    os.dup2(reader.stdin.fileno(), STDERR)
    reader.stdin.close()

    def undo() -> None:
        os.dup2(before, STDERR)
        reader.wait()

    return undo


def listen(over: threading.Event) -> None:
    """Until `over`, waits for the last message of another process; prints it and ends this process with its exit code.

    Also ends this process if it still runs `stopping.STOP_SECONDS` after SIGTERM came to a process of the run.
    """
    deadline = math.inf
    while not over.wait(1):
        code, _, words = look_up(NEWS).partition(" ")
        if words and not words.startswith(me()):
            print(f"error: {words}", file=sys.stderr, flush=True)
            os._exit(int(code))
        if deadline == math.inf and look_up(SIGTERM_NOTICE):
            deadline = time.monotonic() + stopping.STOP_SECONDS
        if time.monotonic() > deadline:
            print(f"error: {stopping.unsaved()}", file=sys.stderr, flush=True)
            leave(stopping.UNSAVED_CODE, stopping.unsaved())


def leave(code: int, reason: str) -> NoReturn:
    """Ends this process and, through `listen`, all others; a normal exit would wait for them."""
    try:
        jax_private.tell_all(NEWS, f"{code} {me()} has ended: {reason}")
        if jax_private.process()[0] == 0:
            time.sleep(3)  # this process stores the message that the others read
    except jax.errors.JaxRuntimeError:  # another process was first, or none can read it
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def me() -> str:
    """Names this process: number, count and machine."""
    number, count = jax_private.process()
    return f"process {number} of {count} on {os.uname().nodename}"


def is_first() -> bool:
    """Returns whether this process writes the files that are written once: logs, configs, reports."""
    return jax.process_index() == 0


def locked(path: str | Path, **how: bool) -> contextlib.AbstractContextManager[None]:
    """Locks as `data_pipeline.common.locks.locked` in the first process of a run; does nothing in the others."""
    return locks.locked(path, **how) if is_first() else contextlib.nullcontext()


def wait_for_all(what: str) -> None:
    """Waits until every process calls it with the same `what`."""
    if jax.process_count() > 1:
        jax_private.wait_for_all(what)


def true_everywhere(fact: bool) -> bool:
    """Returns, in every process, whether `fact` is True in all of them."""
    return bool(jax_private.allgather(fact).all()) if jax.process_count() > 1 else fact
