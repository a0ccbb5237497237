"""Passes a process's stderr on, and replaces jax's abort after the loss of a process by one line.

Runs as a process of its own, because the other has ended when its last lines are read (`distributed.explain_aborts`).
"""

import os
import re
import select
import signal

CHECKED = {"jax": "0.10.2"}  # the version whose lines were checked last
STDIN, STDERR = 0, 2
PATIENCE_SECONDS = 10
UNCLEAR = re.compile(rb"[EFW]\d")  # the possible beginning of a line of jax
FROM_JAX = re.compile(rb"^[EFW]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)", re.MULTILINE)
AGAIN = "start the same command again in every process, and it continues"


def verdict(text: str) -> str | None:
    """Returns the meaning of jax's last lines, or None if they are not about a lost process."""
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
    """Copies stdin to stderr. Holds jax's error lines back for PATIENCE_SECONDS, in case stdin ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a shutdown sends SIGTERM to all; the other process may still save
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
