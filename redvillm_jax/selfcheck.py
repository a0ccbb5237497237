"""Checks within ten minutes whether the project works on this machine or pod.

python -m redvillm_jax.selfcheck [--workdir=FOLDER_OR_gs://BUCKET/check]

Each check prints one line: pass or fail, its seconds, and its findings. A check that depends on a failed one is
skipped. The exit code is 0 when all checks pass. Nothing is downloaded, and files below --workdir are removed at the
end. With several processes, all of them compute and compare, and the first one prints. docs/tpu.md explains each line.
"""

import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import jax
from etils import epath

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError
from redvillm_jax.checks.machine_checks import check_collectives, check_data_order, check_devices, check_meshes
from redvillm_jax.checks.model_checks import check_attention, check_checkpoints, check_encoder, check_training
from redvillm_jax.runtime import distributed
from redvillm_jax.runtime.consensus import Failed, reason, together
from redvillm_jax.runtime.shared_folder import check_folder

LIMIT_SECONDS = 200  # for one check; then some process waits for another that will not come
NEEDS = {"checkpoints": "folder"}


def main(argv: list[str]) -> int:
    parser = Parser("python -m redvillm_jax.selfcheck", __doc__)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder or gs:// path to try files and checkpoints in (a temporary folder); several processes need "
        "one that all of them see",
    )
    workdir = parser.parse_args(argv).workdir
    try:
        with limited("devices"):
            count = jax.process_count()  # opens the devices
    except RuntimeError as error:
        print(line("fail", "devices", 0, reason(error)))
        return 1
    if count > 1 and not workdir:
        raise UserError(f"--workdir is needed with {count} processes: a folder that all see, such as gs://BUCKET/check")
    with ExitStack() as stack:
        folder = epath.Path(workdir or stack.enter_context(tempfile.TemporaryDirectory()))
        return run_checks(
            {
                "devices": check_devices,
                "mesh": check_meshes,
                "collectives": check_collectives,
                "folder": functools.partial(check_folder, folder),
                "data order": check_data_order,
                "attention": check_attention,
                "encoder": check_encoder,
                "training": check_training,
                "checkpoints": functools.partial(check_checkpoints, folder),
            }
        )


def run_checks(checks: Mapping[str, Callable[[], str]]) -> int:
    """Runs and prints all checks, the same in every process. Returns the exit code."""
    begun, bad = time.perf_counter(), []
    for name, check in checks.items():
        start, stop = time.perf_counter(), False
        if NEEDS.get(name) in bad:
            word, text = "skip", f"needs {NEEDS[name]}"
        else:
            try:
                with limited(name):
                    word, text = "pass", together(check)
            except Failed as error:
                word, text = "fail", str(error)
            except Exception as error:  # the processes can no longer agree on anything
                word, text, stop = "fail", f"the processes cannot talk to each other: {reason(error)}", True
        if word != "pass":
            bad.append(name)
        if distributed.is_first() or stop:
            print(line(word, name, time.perf_counter() - start, text), flush=True)
        if stop:
            return 1
    if distributed.is_first():
        said = f"not passed: {', '.join(bad)} (docs/tpu.md says what to do)" if bad else f"all {len(checks)} passed"
        print(f"{said}, {time.perf_counter() - begun:.0f} seconds", flush=True)
    return 1 if bad else 0


def line(word: str, name: str, seconds: float, text: str) -> str:
    """One check as it is printed."""
    return f"{word}  {name:<12} {seconds:6.1f} s  {text}"


@contextmanager
def limited(name: str) -> Iterator[None]:
    """Ends this process with a line when the block takes longer than LIMIT_SECONDS."""
    start = time.perf_counter()

    def give_up() -> None:
        text = f"no end after {LIMIT_SECONDS} s: a device or another process hangs or is gone; see the other processes"
        print(line("fail", name, time.perf_counter() - start, text), flush=True)
        sys.stderr.flush()
        os._exit(1)  # whoever hangs in a device cannot be asked to stop

    timer = threading.Timer(LIMIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


if __name__ == "__main__":
    distributed.command(main)
