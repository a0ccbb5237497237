"""A demo training through launch_tpu.sh with one preemption, as a user sees it, and the seconds until it goes on.

python benchmarks/launch_transcript.py [--workdir=transcript]

The cloud is tests/fake_gcloud.py: two workers are two processes here, and nothing is installed on a new node, so the
times are those of the launcher and the command alone. As on a spot node, all processes get SIGTERM, and SIGKILL 30
seconds later, and the node's state changes after that. Lines begin with the seconds since the launch.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "redvillm_jax" / "demo" / "bases" / "llava"
NODE = ("--name=red", "--zone=us-west4-a", "--type=v5litepod-16", "--spot")
PREEMPTED_AT_STEP = 10


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/launch_transcript.py", __doc__)
    parser.add_argument("--workdir", type=Path, default=Path("transcript"), help="a new folder (transcript)")
    work = parser.parse_args(argv).workdir.absolute()
    if work.exists():
        raise UserError(f"--workdir={work} exists: give a new folder")
    videos, base, frames, out = (work / name for name in ("videos", "base", "frames", "run"))
    command("redvillm_jax.demo.moving_shapes", f"--out={videos}", "--train=40", "--dev=1", "--test=1")
    command("conversion.from_torch", "--family=llava", f"--source={BASE}", f"--out={base}")
    data = (f"--videos={videos}/train/videos", f"--instructions={videos}/train/instructions.jsonl")
    command("data_pipeline.prepare", *data, f"--base={base}", "--num_frames=4", "--format=raw", f"--out={frames}")
    training = ["redvillm_jax.train", "--config=configs/demo.py:llava", f"--workdir={out}", f"--config.base={base}"]
    training += [f"--config.data={frames}", "--config.num_frames=4", "--config.batch_questions=8"]
    launch(work, [*NODE, "--", *training, "--config.num_epochs=2", "--config.log_every=1"], out / "metrics.jsonl")


def command(module: str, *arguments: str) -> None:
    """Runs a command of the project quietly."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{module} ended with code {done.returncode}: {done.stderr[-500:]}")


def launch(work: Path, arguments: list[str], metrics: Path) -> None:
    """Prints what the launcher prints, and what was lost and how long it took to recover."""
    gcloud, now = work / "bin" / "gcloud", work / "preempt"
    gcloud.parent.mkdir()
    gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_gcloud.py "$@"\n')
    gcloud.chmod(0o755)
    environment = os.environ | {"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "FAKE_GCLOUD": f"{work}/cloud"}
    environment |= {"FAKE_GCLOUD_PYTHON": sys.executable, "FAKE_GCLOUD_PREEMPT": f"{now}", "LAUNCH_TPU_POLL": "1"}
    environment |= {"FAKE_GCLOUD_GRACE": "30", "FAKE_GCLOUD_LAG": "1"}
    print("$ ./launch_tpu.sh", *arguments, flush=True)
    begun, steps, times = time.time(), [0], {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    launcher = subprocess.Popen([ROOT / "launch_tpu.sh", *arguments], cwd=ROOT, env=environment, **pipes)

    def say(text: str) -> None:
        print(f"{time.time() - begun:6.1f}  {text}", flush=True)

    def watch() -> None:
        while launcher.poll() is None:
            found = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # whole lines
            if found and (step := json.loads(found[-1])["step"]) != steps[-1]:
                steps.append(step)
                if "preempted" not in times and step >= PREEMPTED_AT_STEP:
                    times["preempted"] = time.time()
                    now.touch()
                    say(f"* step {step} is done; the node is preempted")
                elif "gone" in times and "continued" not in times:
                    times["continued"] = time.time()
                    say(f"* step {step} is done")
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for line in launcher.stdout:
        if line := re.sub(r"\s*\d+%\|.*?\]", "", line).strip():  # without the bar, which can stand before other words
            say(line)
            if "is gone" in line:
                times["gone"] = time.time()
    watcher.join()
    say(f"* exit code {launcher.wait()}, {len(metrics.read_text().splitlines())} steps in metrics.jsonl")
    since = times["preempted"]
    gone, continued = times["gone"] - since, times["continued"] - since
    print(f"preemption to the launcher's next attempt: {gone:.1f} s; to the first step after it: {continued:.1f} s")


if __name__ == "__main__":
    run(main)
