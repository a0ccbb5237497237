"""Passes a process's stderr on, and turns jax's abort over a lost process into one line.

Runs beside the process, because that is gone when its last lines are to be read (`distributed.explain_aborts`).
"""

import os
import re
import select
import signal

CHECKED = {"jax": "0.10.2"}  # the version whose lines were last read
STDIN, STDERR = 0, 2
PATIENCE_SECONDS = 10
UNCLEAR = re.compile(rb"[EFW]\d")  # the beginning of a line that may become one of jax's
FROM_JAX = re.compile(rb"^[EFW]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)", re.MULTILINE)
AGAIN = "start the same command again in every process, and it continues"


def verdict(text: str) -> str | None:
    """What jax's last lines mean, None where they say something else."""
    if "RegisterTask" in text and "DEADLINE_EXCEEDED" in text:
        remedy = "start all of them, with the same JAX_COORDINATOR_ADDRESS and no firewall between"
        return f"the processes of this run did not find each other in time: {remedy}"
    if silent := re.search(r"stopped sending heartbeats\):\s*((?:\S*\d+\s)+)", text):
        numbers = ", ".join(sorted(set(re.findall(r"(\d+)\s", silent[1])), key=int))
        return f"process {numbers} of this run is gone without a word (killed, or its machine is lost): {AGAIN}"
    if "leader task" in text:
        return f"process 0 of this run is gone without a word (killed, or its machine is lost): {AGAIN}"
    return None


def main() -> None:
    """Copies stdin to stderr as it comes; jax's own complaints wait for PATIENCE_SECONDS whether stdin ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a machine that is shut down sends it to all, and the other saves
    text, held = b"", b""
    while True:
        if held and not select.select([STDIN], [], [], PATIENCE_SECONDS)[0]:
            os.write(STDERR, held)
            held = b""
        if not (chunk := os.read(STDIN, 65536)):
            break
        text += chunk
        if held or (found := FROM_JAX.search(text)):
            start = 0 if held else found.start()
            os.write(STDERR, text[:start])
            held, text = held + text[start:], b""
        elif not UNCLEAR.match(text.rpartition(b"\n")[2]):
            os.write(STDERR, text)
            text = b""
    line = verdict((held + text).decode(errors="replace"))
    os.write(STDERR, held + text if line is None else f"error: {line}\n".encode())


if __name__ == "__main__":
    main()
