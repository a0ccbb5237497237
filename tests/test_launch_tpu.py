"""launch_tpu.sh against tests/fake_gcloud.py: two local processes stand for the two workers of a pod."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import pytest
from test_distributed import assert_bit_equal, wait_for_step
from test_train import losses, make_config

from redvillm_jax.training.checkpoint import saved_steps
from tests import fake_gcloud

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "redvillm_jax", "conversion")
SCRIPTS = ("launch_tpu.sh", "launch_worker.sh")
NODE = ("--name=red", "--zone=us-west4-a", "--type=v5litepod-16")

# Notes every start in TEST_SHARED, then does what its first argument says.
JOB = """
import os, signal, sys, time
from pathlib import Path
shared, index = Path(os.environ["TEST_SHARED"]), os.environ["JAX_PROCESS_ID"]
before = len(list(shared.glob(f"start-{index}-*")))
Path(shared, f"start-{index}-{before}").touch()
print(f"worker {index}, start {before}, {os.getcwd()}, {sys.argv[1:]}")
if sys.argv[1] == "sleep_once" and before == 0:
    while len(list(shared.glob("start-*-0"))) < 2:
        time.sleep(0.05)
    Path(shared, "both").touch()
    time.sleep(60)
if sys.argv[1] == "fail" and index == "1":
    sys.exit("it is broken")
if sys.argv[1] == "save_at_sigterm":
    def save(*_):
        time.sleep(1)
        Path(shared, f"saved-{index}").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    Path(shared, f"ready-{index}").touch()
if sys.argv[1] in ("wait", "save_at_sigterm"):
    while not Path(shared, "go").exists():
        time.sleep(0.05)
print("done")
sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else 0)
"""


class Launcher:
    """launch_tpu.sh of one checkout, with the stand-in as gcloud; `shared` stands for a bucket."""

    def __init__(self, folder: Path, checkout: Path):
        self.checkout, self.cloud, self.shared = checkout, folder / "cloud", folder / "shared"
        self.shared.mkdir()
        gcloud = folder / "bin" / "gcloud"
        gcloud.parent.mkdir()
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_gcloud.__file__} "$@"\n')
        gcloud.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{gcloud.parent}:{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.cloud),
            "FAKE_GCLOUD_PYTHON": sys.executable,
            "LAUNCH_TPU_POLL": "0.2",
            "TEST_SHARED": str(self.shared),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(self.checkout / "launch_tpu.sh"), *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *arguments: str, timeout: float = 60, **environment: str) -> tuple[int, str]:
        """Runs it to its end: exit code, and stdout and stderr in one."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def calls(self, *words: str) -> list[str]:
        """The calls of gcloud that hold all the words."""
        return [call for call in (self.cloud / "calls.log").read_text().splitlines() if all(w in call for w in words)]

    def starts(self) -> list[str]:
        return sorted(file.name for file in self.shared.glob("start-*"))

    def wait_for(self, name: str) -> Path:
        for _ in range(200):
            if (self.shared / name).exists():
                return self.shared / name
            time.sleep(0.05)
        raise AssertionError(f"no {name} within ten seconds")


@pytest.fixture
def make_launcher(tmp_path):
    """make_launcher(*paths): a launcher in a git checkout with the scripts, these paths of this repository, and job.py.

    The workers run this Python in copies of that checkout, so make_launcher(*PACKAGES) launches the project's own
    commands. Give them folders in `launcher.shared`, which all workers see and which outlives the nodes.
    """
    launchers = []

    def make(*paths: str) -> Launcher:
        checkout = tmp_path / "checkout"
        checkout.mkdir()
        for path in (*SCRIPTS, *paths):
            (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, checkout / path)
        (checkout / "job.py").write_text(JOB)
        (checkout / ".gitignore").write_text("__pycache__/\n")
        git(checkout, "init", "--quiet")
        git(checkout, "add", ".")
        git(checkout, "commit", "--quiet", "--message=all")
        launchers.append(Launcher(tmp_path, checkout))
        return launchers[-1]

    yield make
    for launcher in launchers:
        for node in launcher.cloud.glob("nodes/*"):
            fake_gcloud.send(node, signal.SIGKILL)


@pytest.fixture
def launcher(make_launcher) -> Launcher:
    return make_launcher()


def git(checkout: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def test_dry_run_prints_every_command_in_order(launcher):
    tree = git(launcher.checkout, "rev-parse", "--short=12", "HEAD^{tree}")
    node, ssh = "red --zone=us-west4-a --project=p", "gcloud compute tpus tpu-vm ssh"
    job = r"job '\''a b'\'' --c='\''it'\''\'\'''\''s'\''"  # the words, quoted for the worker, quoted for this shell
    code, output = launcher(*NODE, "--project=p", "--spot", "--delete", "--dry-run", "--", "job", "a b", "--c=it's")
    lines = [re.sub(r"run \d+-\d+-1", "run ID", x) for x in output.splitlines() if not x.startswith("launch_tpu:")]
    assert code == 0 and lines == [
        f"gcloud compute tpus tpu-vm describe {node} --format='value(state)'",
        f"gcloud compute tpus tpu-vm create {node} --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite "
        "--spot --quiet",
        f"{ssh} {node} --worker=all --command='grep -qsx {tree} redvillm_jax/.launch/installed' --quiet",
        f"git archive --format=tar.gz --output=.git/redvillm_jax-{tree}.tgz {tree}",
        f"gcloud compute tpus tpu-vm scp .git/redvillm_jax-{tree}.tgz launch_worker.sh "
        "red: --zone=us-west4-a --project=p --worker=all --quiet",
        f"{ssh} {node} --worker=all --command='bash launch_worker.sh install {tree}' --quiet",
        f"rm .git/redvillm_jax-{tree}.tgz",
        f"{ssh} {node} --worker=all --command='bash launch_worker.sh run ID {tree} {job}' --quiet",
        f"gcloud compute tpus tpu-vm delete {node} --quiet",
    ]
    assert not launcher.cloud.exists()


@pytest.mark.parametrize(
    "type_, version",
    {"v4-32": "tpu-ubuntu2204-base", "v5p-16": "v2-alpha-tpuv5", "v6e-16": "v2-alpha-tpuv6e"}.items(),
)
def test_dry_run_of_a_queued_resource(launcher, type_, version):
    code, output = launcher(*NODE[:2], f"--type={type_}", "--queued", "--delete", "--dry-run", "--", "job", "0")
    assert code == 0
    assert [line for line in output.splitlines() if "queued-resources" in line] == [
        "gcloud compute tpus queued-resources describe red --zone=us-west4-a --format='value(state.state)'",
        f"gcloud compute tpus queued-resources create red --zone=us-west4-a --node-id=red --accelerator-type={type_} "
        f"--runtime-version={version} --quiet",
        "gcloud compute tpus queued-resources delete red --zone=us-west4-a --force --quiet",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*NODE[1:], "--", "job"], "--name=: expected lower-case letters"),
        (["--name=Red", *NODE[1:], "--", "job"], "--name=Red: expected lower-case letters"),
        (["--name", "red", *NODE[1:], "--", "job"], "--name: expected --name=VALUE"),
        ([NODE[0], NODE[2], "--", "job"], "--zone=: expected a zone such as"),
        ([*NODE[:2], "--", "job"], "--type=: expected a slice such as"),
        ([*NODE[:2], "--type=v5e-16", "--", "job"], "gcloud's name for it is v5litepod-16"),
        ([*NODE[:2], "--type=v7x-16", "--", "job"], "give one with --version=NAME"),
        ([*NODE, "--fast", "--", "job"], "unknown option --fast"),
        ([*NODE, "job"], "unexpected job: write -- before the command"),
        ([*NODE], "no command"),
        ([*NODE, "--", "python", "-m", "job"], "python: expected a module of this checkout"),
        ([*NODE, "--", "jobs.train"], "jobs.train: expected a module of this checkout"),
    ],
)
def test_a_mistake_ends_in_one_line(launcher, arguments, message):
    code, output = launcher(*arguments)
    assert code == 2 and output.startswith("error: ") and output.count("\n") == 1 and message in output
    assert not launcher.cloud.exists()


@pytest.mark.parametrize("name, value", [("POLL", "abc"), ("POLL", "-1"), ("PATIENCE", "1.5")])
def test_a_wrong_setting_ends_in_one_line(launcher, name, value):
    code, output = launcher(*NODE, "--", "job", "0", **{f"LAUNCH_TPU_{name}": value})
    assert code == 2 and output.startswith(f"error: LAUNCH_TPU_{name}={value}: expected a ") and output.count("\n") == 1


def test_a_state_that_does_not_change_ends_the_launch(launcher):
    node = launcher.cloud / "nodes" / "red"
    node.mkdir(parents=True)
    (node / "state").write_text("REPAIRING")
    code, output = launcher(*NODE, "--", "job", "0", LAUNCH_TPU_PATIENCE="1")
    assert code == 1
    assert output.splitlines() == [
        "launch_tpu: red: REPAIRING",
        "launch_tpu: red has been REPAIRING for 1 s: see what is wrong with gcloud, or delete it, then launch again",
    ]


def test_it_may_be_called_by_a_link(launcher, tmp_path):
    link = tmp_path / "links" / "launch"
    link.parent.mkdir()
    link.symlink_to(launcher.checkout / "launch_tpu.sh")
    done = subprocess.run([link, *NODE, "--dry-run", "--", "job", "0"], env=launcher.environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"git archive" in done.stdout


def test_help_explains():
    text = subprocess.run([ROOT / "launch_tpu.sh", "--help"], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "redvillm_jax.train" in text and "--spot" in text


def test_a_preempted_run_is_started_again_on_a_new_node(launcher):
    both = str(launcher.shared / "both")
    code, output = launcher(*NODE, "--spot", "--", "job", "sleep_once", "a b", FAKE_GCLOUD_PREEMPT=both)
    assert code == 0, output
    assert launcher.starts() == ["start-0-0", "start-0-1", "start-1-0", "start-1-1"]
    assert (
        output.count("worker 0, start 1") == 1 and "worker 1, start" not in output and "['sleep_once', 'a b']" in output
    )
    assert "red is gone (PREEMPTED) after attempt 1: starting again" in output
    assert [len(launcher.calls(verb)) for verb in ("tpu-vm create", "tpu-vm delete", "tpu-vm scp")] == [2, 1, 2]


def test_a_node_that_dies_before_its_state_tells(launcher):
    """The processes end in 137 while describe still says READY; then the queued resource is SUSPENDED."""
    both = str(launcher.shared / "both")
    code, output = launcher(
        *NODE, "--queued", "--", "job", "sleep_once", FAKE_GCLOUD_PREEMPT=both, FAKE_GCLOUD_LAG="0.5"
    )
    assert code == 0 and "red: WAITING_FOR_RESOURCES" in output, output
    assert len(launcher.calls("queued-resources create")) == 2 and not launcher.calls("tpu-vm delete")


def test_the_commands_own_failure_is_passed_on(launcher):
    assert launcher(*NODE, "--delete", "--", "job", "7")[0] == 7
    assert launcher.starts() == ["start-0-0", "start-1-0"]
    assert len(launcher.calls("tpu-vm create")) == len(launcher.calls("tpu-vm delete")) == 1


def test_a_mistake_in_the_projects_own_command_ends_at_once(make_launcher):
    launcher = make_launcher(*PACKAGES)
    code, output = launcher(*NODE, "--", "redvillm_jax.train", "--config=configs/none.py", "--workdir=gs://bucket/run")
    assert code == 2 and "\nerror: --config=configs/none.py: no such file" in output
    assert len(launcher.calls("tpu-vm create")) == len(launcher.calls("launch_worker.sh run")) == 1


def test_a_worker_that_fails_alone_is_heard_and_the_node_is_used_again(launcher):
    code, output = launcher(*NODE, "--", "job", "fail")
    assert code == 1 and "t1v-n-red-w-1 ended with exit code 1" in output and "it is broken" in output
    assert "red is kept and costs until: gcloud compute tpus tpu-vm delete red" in output
    code, output = launcher(*NODE, "--", "job", "0")
    assert code == 0 and "worker 0, start 1" in output
    assert len(launcher.calls("tpu-vm create")) == len(launcher.calls("scp")) == 1
    (launcher.checkout / "job.py").write_text("print('changed')\n")
    (launcher.checkout / "more.py").write_text("")
    code, output = launcher(*NODE, "--", "job")
    assert code == 0 and "changed" in output and "git does not know them: more.py" in output
    assert len(launcher.calls("tpu-vm create")) == 1 and len(launcher.calls("scp")) == 2


def test_a_file_of_the_version_before_is_removed_and_others_stay(launcher):
    assert launcher(*NODE, "--", "job", "0")[0] == 0
    checkout = launcher.cloud / "nodes" / "red" / "worker-0" / "redvillm_jax"
    (checkout / "runs").mkdir()
    git(launcher.checkout, "mv", "job.py", "work.py")
    assert launcher(*NODE, "--", "work", "0")[0] == 0
    assert (checkout / "runs").exists() and (checkout / "work.py").exists() and not (checkout / "job.py").exists()


def test_a_lost_connection_neither_ends_the_run_nor_starts_it_twice(launcher):
    process = launcher.start(*NODE, "--", "job", "wait", FAKE_GCLOUD_DROP="0.3")
    launcher.wait_for("../cloud/happened_DROP")
    time.sleep(0.5)
    (launcher.shared / "go").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "the connection to red is lost" in output and output.endswith("--quiet\n")
    assert launcher.starts() == ["start-0-0", "start-1-0"]


def test_a_run_goes_on_without_the_launcher_and_the_same_command_follows_it(launcher):
    process = launcher.start(*NODE, "--", "job", "wait")
    launcher.wait_for("start-0-0"), launcher.wait_for("start-1-0")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command follows it" in output
    code, output = launcher(*NODE, "--", "job", "0")
    assert code == 2 and "something else is running here" in output and "job wait" in output
    with open(launcher.checkout / "job.py", "a") as file:
        file.write("# changed")
    code, output = launcher(*NODE, "--", "job", "wait")
    assert code == 2 and "something else is running here" in output
    git(launcher.checkout, "checkout", "--quiet", "job.py")
    process = launcher.start(*NODE, "--", "job", "wait")
    while len(launcher.calls("launch_worker.sh run", " job wait")) < 2:
        time.sleep(0.05)
    time.sleep(0.5)  # a run that has ended before anyone follows it would start again
    (launcher.shared / "go").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "done" in output
    assert launcher.starts() == ["start-0-0", "start-1-0"]


def test_stop_lets_the_command_save_and_it_is_not_started_again(launcher):
    process = launcher.start(*NODE, "--", "job", "save_at_sigterm")
    launcher.wait_for("ready-0"), launcher.wait_for("ready-1")
    code, output = launcher(*NODE[:2], "--stop")
    assert code == 0 and output.count("stopped") == 2
    assert (launcher.shared / "saved-0").exists() and (launcher.shared / "saved-1").exists()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "exit code 143 is a signal's: looking at red 20 times" in output
    assert launcher.starts() == ["start-0-0", "start-1-0"] and len(launcher.calls("tpu-vm create")) == 1
    assert "done" not in output and "nothing is running" in launcher(*NODE[:2], "--stop")[1]


def test_waits_for_room_but_not_for_what_cannot_be(launcher):
    assert launcher(*NODE, "--", "job", "0", FAKE_GCLOUD_NO_ROOM="2")[0] == 0
    assert len(launcher.calls("tpu-vm create")) == 3
    code, output = launcher(*NODE[:2], "--type=v4-32", "--project=none", "--", "job", "0", FAKE_GCLOUD_DENIED="none")
    assert code == 1 and "PERMISSION_DENIED" in output and len(launcher.calls("tpu-vm create")) == 3


def training(base: Path | str, data: Path | str, **changes) -> list[str]:
    """Words of a train command of 36 steps, but for its --workdir."""
    config = make_config("llava", base, data, num_epochs=4, **changes)
    names = ("base", "data", "num_frames", "num_epochs", "batch_questions", "log_every", "checkpoint_every")
    words = [f"--config.{name}={config[name]}" for name in (*names, "row_length", "num_workers")]
    return ["--", "redvillm_jax.train", "--config=configs/demo.py:llava", *words]


@pytest.mark.slow
def test_a_preempted_training_in_a_bucket_ends_as_an_undisturbed_one(make_launcher, bases, stores, tmp_path):
    """Killed when the first checkpoint is there, continued on a new node; the second run is on that node as it is."""
    launcher = make_launcher(*PACKAGES)
    words = training("gs://bucket/base", "gs://bucket/frames")
    with fake_gcs.serve("bucket") as server:
        server.upload(bases["llava"], "bucket", "base")
        server.upload(stores["llava"], "bucket", "frames")
        bucket = {**server.environment, "FAKE_GCLOUD_PASS": " ".join(server.environment)}
        now = launcher.shared / "now"
        process = launcher.start(
            *NODE, "--spot", *words, "--workdir=gs://bucket/run", FAKE_GCLOUD_PREEMPT=str(now), **bucket
        )
        deadline = time.time() + 120
        while not server.names("bucket", "run/checkpoints/4/commit_success.txt") and time.time() < deadline:
            time.sleep(0.02)
        now.touch()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        step = int(re.search(r"; continuing after step (\d+)", output)[1])
        assert step % 4 == 0 and 0 < step < 36 and output.count("12 videos, ") == 2
        assert "red is gone (PREEMPTED) after attempt 1: starting again" in output and "trained: gs://" in output
        assert [len(launcher.calls(verb)) for verb in ("tpu-vm create", "tpu-vm delete", "tpu-vm scp")] == [2, 1, 2]
        code, output = launcher(*NODE, *words, "--workdir=gs://bucket/whole", timeout=300, **bucket)
        assert code == 0 and "continuing" not in output and len(launcher.calls("tpu-vm create")) == 2, output
        run, whole = (server.download("bucket", name, tmp_path / name) for name in ("run", "whole"))
    assert len(losses(run)) == 36
    assert_bit_equal(run, whole)


@pytest.mark.slow
def test_a_preemption_that_begins_with_sigterm_costs_no_step(make_launcher, bases, stores):
    """The connection ends at once, the processes when they have saved, and seconds later the state tells."""
    launcher = make_launcher(*PACKAGES)
    words = training(bases["llava"], stores["llava"], checkpoint_every=100, num_workers=1)
    run, now = launcher.shared / "run", launcher.shared / "now"
    events = {"FAKE_GCLOUD_PREEMPT": str(now), "FAKE_GCLOUD_GRACE": "30", "FAKE_GCLOUD_LAG": "1"}
    process = launcher.start(*NODE, "--spot", *words, f"--workdir={run}", LAUNCH_TPU_POLL="1", **events)
    wait_for_step(run, 3, [process])
    now.touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    step = int(re.search(r"; continuing after step (\d+)", output)[1])
    assert 3 <= step < 36 and "red is gone (PREEMPTED) after attempt 1: starting again" in output
    assert len(losses(run)) == 36 and saved_steps(run) == [36, step]


@pytest.mark.slow
def test_the_selfcheck_on_two_workers(make_launcher):
    launcher = make_launcher(*PACKAGES)
    words = ("redvillm_jax.selfcheck", f"--workdir={launcher.shared}")
    code, output = launcher(*NODE, "--delete", "--", *words, timeout=600)
    print(output)
    assert code == 0 and "all 9 passed" in output and output.count("\npass  ") == 9, output
    assert not list(launcher.shared.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_silent(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -e '.[test]' brings it"
    subprocess.run([shellcheck, ROOT / script], check=True)
