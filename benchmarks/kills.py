"""Kills a training again and again at random moments, and compares its result with an undisturbed run.

    python benchmarks/kills.py --base=BASE --data=STORE --out=DIR [--processes=2] [--kills=10] [--seed=0]

BASE and STORE may be the demo's (`python -m redvillm_jax.demo`). With several processes, every third kill hits one
process, and the others must end by themselves. The other kills hit all processes at once, as when a slice goes away.
Prints the moment of each kill and the time from the next start to its first new step, and at the end whether the
trained weights and the logged losses are bit-equal.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline.common.cli import Parser  # noqa: E402
from data_pipeline.common.errors import UserError, run  # noqa: E402
from data_pipeline.common.tables import table_row  # noqa: E402
from redvillm_jax.training.checkpoint import load_trainables  # noqa: E402

AIMS = ("plan and load", "compile", "step", "save")


def main(argv: list[str]) -> int:
    parser = Parser("python benchmarks/kills.py", __doc__)
    for name in ("base", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    rng = random.Random(flags.seed)
    if flags.out.exists():
        raise UserError(f"--out={flags.out} exists: give another")
    undisturbed, killed = flags.out / "undisturbed", flags.out / "killed"
    wait(start(flags, undisturbed))
    print(f"{flags.processes} process(es), {len(losses(undisturbed))} steps")
    columns = (">4", "  <13", "  <13", "  >10", "  >7", "  >12", "  <0")
    header = ("kill", "aimed at", "hit", "after step", "process", "others ended", "first new step of this start")
    print(table_row(header, columns))
    for kill in range(flags.kills):
        begun, processes = time.time(), start(flags, killed)
        aim = AIMS[kill % len(AIMS)]
        stepped = wait_for(aim, killed, rng)
        hit, step = where(killed), newest_step(killed)
        one = flags.processes > 1 and kill % 3 == 2
        victims = [rng.randrange(flags.processes)] if one else list(range(flags.processes))
        killed_at = time.time()
        for victim in victims:
            processes[victim].kill()
        for process in processes:
            process.wait(timeout=180)
        ended = f"{time.time() - killed_at:.0f} s" if one else "-"
        if any(process.returncode == 0 for process in processes):
            raise UserError("the run ended before it could be killed: ask for fewer kills")
        numbers, first = ",".join(map(str, victims)), f"{stepped - begun:.1f} s" if stepped else "-"
        print(table_row((kill + 1, aim, hit, step, numbers, ended, first), columns), flush=True)
    processes = start(flags, killed)
    wait(processes)
    same = equal(undisturbed, killed)
    print(f"{flags.kills} kills; trained weights and {len(losses(killed))} losses bit-equal: {same}")
    return 0 if same else 1


def wait_for(aim: str, workdir: Path, rng: random.Random) -> float | None:
    """Returns at a random moment of the phase that is aimed at, and when the first new step was seen."""
    if aim == "plan and load":
        time.sleep(rng.uniform(1, 6))
        return None
    while where(workdir) == "plan and load":
        time.sleep(0.01)
    time.sleep(0.3)  # now the log of steps that will run again is cut off
    if aim == "compile":
        time.sleep(rng.uniform(0, 2))
        return None
    while where(workdir) == "compile":
        time.sleep(0.01)
    stepped = time.time()
    time.sleep(rng.uniform(0, 2))
    while aim == "save" and where(workdir) != "save":
        time.sleep(0.001)
    return stepped


def where(workdir: Path) -> str:
    """What a run is doing since its last start."""
    log = (workdir / "log-0.txt").read_text()
    if " steps of " not in log:
        return "plan and load"
    continued = re.search(r"continuing after step (\d+)", log)
    if newest_step(workdir) <= (int(continued[1]) if continued else 0):
        return "compile"
    return "save" if any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")) else "step"


def newest_step(workdir: Path) -> int:
    """The last step that was logged."""
    return len(losses(workdir))


def losses(workdir: Path) -> list[float]:
    """The logged losses, one a step."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def equal(a: Path, b: Path) -> bool:
    """Whether two runs logged the same losses and trained the same weights, bit for bit."""
    leaves = [jax.tree.leaves(load_trainables(run)[1]) for run in (a, b)]
    return losses(a) == losses(b) and all(map(np.array_equal, *leaves))


def wait(processes: list[subprocess.Popen]) -> None:
    """Returns when a run has ended well."""
    if any([process.wait() for process in processes]):
        raise UserError(f"a start ended with {[process.returncode for process in processes]}: see the logs in --out")


def start(flags, workdir: Path) -> list[subprocess.Popen]:
    """The train command, 4 CPU devices over all processes."""
    command = [sys.executable, "-m", "redvillm_jax.train", "--config=configs/demo.py:llava"]
    command += [f"--workdir={workdir.absolute()}", f"--config.base={flags.base.absolute()}"]
    command += [f"--config.data={flags.data.absolute()}", "--config.log_every=1", "--config.checkpoint_every=5"]
    command += ["--config.num_epochs=2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // flags.processes}"
    if flags.processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(flags.processes)}
    workdir.mkdir(parents=True, exist_ok=True)
    started = []
    for i in range(flags.processes):
        own = {"JAX_PROCESS_ID": str(i)} if flags.processes > 1 else {}
        with (workdir / f"log-{i}.txt").open("w") as log:
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment | own, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


if __name__ == "__main__":
    run(main)
