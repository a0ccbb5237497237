"""Real processes over loopback: the same run as one process, whatever happens to one of them."""

import ast
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import leaves, losses, make_config

from data_pipeline.common.errors import UserError, run
from data_pipeline.store import open_store
from redvillm_jax import answer, encode, evaluate
from redvillm_jax.runtime import distributed
from redvillm_jax.runtime.abort_filter import verdict

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(processes: int, command: list[str], last: tuple[str, ...] = (), devices: int = 4) -> list[subprocess.Popen]:
    """A Python script in `processes` processes with `devices` in all; the last one also gets the flags `last`."""
    common = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    common |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}"}
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = []
    for i in range(processes):
        environment = common | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {})
        extra = last if i == processes - 1 else ()
        started.append(subprocess.Popen([sys.executable, *command, *extra], env=environment, **pipes))
    return started


def start(
    processes: int, run: Path, config: dict, mesh: tuple[int, int, int], last: tuple[str, ...] = (), order: str = ""
) -> list[subprocess.Popen]:
    """The train command with the fields of `config` that differ from the demo's, on as many devices as the mesh has."""
    command = ["tests/train_process.py", f"{run}-rows", order, "--config=configs/demo.py:llava", f"--workdir={run}"]
    for key in ("base", "data", "num_frames", "num_epochs", "batch_questions", "log_every", "checkpoint_every"):
        command.append(f"--config.{key}={config[key]}")
    command += [f"--config.row_length={config['row_length']}"]
    command += [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    return launch(processes, command, last, math.prod(mesh))


def finish(started: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """What each process printed; all must have ended with `code`."""
    ends = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert "Traceback" not in err, err
        ends.append((out, err))
    return ends


def train(
    processes: int, run: Path, config: dict, mesh: tuple[int, int, int], order: str = ""
) -> list[tuple[str, str]]:
    return finish(start(processes, run, config, mesh, order=order))


def rows_file(run: Path, process: int) -> list[str]:
    """What tests/train_process.py wrote of the rows of one process, a line per step."""
    return Path(f"{run}-rows-{process}").read_text().splitlines()


def rows(run: Path, processes: int) -> list[list]:
    """The rows of each step, those of all hosts behind one another."""
    hosts = [rows_file(run, i) for i in range(processes)]
    return [[row for line in step for row in ast.literal_eval(line)] for step in zip(*hosts, strict=True)]


def assert_same_rows(some: list[list], others: list[list]) -> None:
    """Each step's rows are the same, but that a mesh of more parts fills up with empty rows."""
    for a, b in zip(some, others, strict=True):
        shorter, longer = sorted((a, b), key=len)
        assert longer[: len(shorter)] == shorter
        assert all(videos == [-1] * len(videos) for videos, _ in longer[len(shorter) :])


def assert_close(a: Path, b: Path) -> None:
    """Losses and final trained weights agree."""
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)
    one, many = leaves(a), leaves(b)
    for name, value in one.items():
        assert np.linalg.norm(many[name] - value) <= 1e-5 * np.linalg.norm(value), name


def assert_bit_equal(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    one, many = leaves(a), leaves(b)
    for name, value in one.items():
        np.testing.assert_array_equal(many[name], value, err_msg=name)


def wait_for_step(run: Path, step: int, started: list[subprocess.Popen]) -> None:
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < step:
        assert time.time() < deadline
        assert all(process.poll() is None for process in started), started[0].communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def config(bases, stores) -> dict:
    return make_config("llava", bases["llava"], stores["llava"], num_epochs=4)


@pytest.fixture(scope="module")
def one(tmp_path_factory, config) -> Path:
    """One process on a (2, 2, 1) mesh."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(1, run, config, (2, 2, 1))
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, (2, 2, 1)), (4, (2, 2, 1)), (2, (1, 2, 2))])
def test_several_processes_train_as_one(processes, mesh, tmp_path, config, one):
    (out, _), *others = train(processes, tmp_path / "many", config, mesh)
    assert "trained: " in out and not any("trained" in out or "videos" in out for out, _ in others)
    assert len(losses(one)) == 36
    assert_same_rows(rows(one, 1), rows(tmp_path / "many", processes))
    assert_close(one, tmp_path / "many")
    start_of = [(run / "first_batch.txt").read_text()[:200] for run in (one, tmp_path / "many")]
    assert start_of[0] == start_of[1]


def test_a_tensor_axis_across_processes_trains_as_one(tmp_path, config, one):
    """Each part of a batch lies on a device of both processes, so both read all of its rows."""
    train(2, tmp_path / "many", config, (1, 2, 2), order="0,2,1,3")
    for i in range(2):
        assert_same_rows(rows(one, 1), [ast.literal_eval(line) for line in rows_file(tmp_path / "many", i)])
    assert_close(one, tmp_path / "many")


@pytest.mark.slow
def test_the_same_mesh_is_bit_equal_in_one_and_in_two_processes(tmp_path, config):
    """With two devices; of more than two numbers the sum depends on their order, which is the network's choice."""
    for processes in (1, 2):
        train(processes, tmp_path / str(processes), config, (1, 2, 1))
    assert_bit_equal(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_the_same_processes_are_bit_equal_from_run_to_run(tmp_path, config):
    for name in "ab":
        train(2, tmp_path / name, config, (2, 2, 1))
    assert_bit_equal(tmp_path / "a", tmp_path / "b")


def test_sigterm_to_one_process_saves_in_all_and_another_mesh_goes_on(tmp_path, config, one):
    run = tmp_path / "run"
    started = start(2, run, config | {"checkpoint_every": 100}, (1, 4, 1))
    wait_for_step(run, 3, started)
    started[1].send_signal(signal.SIGTERM)
    (out, _), _ = finish(started, code=143)
    step = int(re.search(r"trained to step (\d+) of 36, stopped by SIGTERM", out)[1])
    assert_same_rows(rows(one, 1)[:step], rows(run, 2)[:step])
    assert 3 < step < 36 and [p.name for p in (run / "checkpoints").iterdir()] == [str(step)]
    out, _ = train(1, run, config, (2, 2, 1))[0]
    assert f"continuing after step {step}" in out
    assert_close(one, run)


def test_a_killed_process_is_named_by_the_others(tmp_path, config):
    for victim in (0, 1):
        run = tmp_path / str(victim)
        started = start(2, run, config | {"num_epochs": 100}, (2, 2, 1))
        wait_for_step(run, 3, started)
        started[victim].kill()
        killed = time.time()
        _, err = started[1 - victim].communicate(timeout=60)
        assert time.time() - killed < 40 and started[1 - victim].returncode not in (0, 2, 143)
        assert err.splitlines()[-1].startswith(f"error: process {victim} of this run is gone"), err
        assert "Traceback" not in err and "stack trace" not in err


def test_a_process_that_fails_ends_the_others_with_its_reason(tmp_path, config, one):
    shutil.copytree(one, tmp_path / "run")
    first, second = start(2, tmp_path / "run", config, (2, 2, 1), last=("--config.learning_rate=1",))
    ends = finish([first, second], code=2)
    assert ends[1][1].startswith("error: ") and "learning_rate=0.004, this command says 1.0" in ends[1][1]
    assert re.match(r"error: process 1 of 2 on \S+ has ended: .*this command says 1.0", ends[0][1].splitlines()[-1])


def test_processes_with_folders_of_their_own_are_refused_before_the_first_step(tmp_path, config):
    ends = finish(start(2, tmp_path / "a", config, (1, 2, 1), last=(f"--workdir={tmp_path}/b",)), code=2)
    said = rf"error: --workdir: process 0: {tmp_path}/a lacks the file of process 1: it must be one folder that all .*gs://"
    assert re.match(said, ends[0][1].splitlines()[-1]), ends[0][1]
    assert all(err.splitlines()[-1].startswith("error: ") for _, err in ends), ends
    assert not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]


def test_the_other_commands_of_several_processes_look_at_their_folders_first(tmp_path, config, monkeypatch):
    (tmp_path / "questions.jsonl").write_text('{"video": "a.mp4", "question": "What?"}\n')
    settings = ["--config=configs/demo.py:llava", f"--config.num_frames={config['num_frames']}"]
    model, data, out = f"--model={config['base']}", f"--data={config['data']}", tmp_path / "new"
    answers = [f"--input={tmp_path}/questions.jsonl", f"--output={out}/answers.jsonl"]
    for command, arguments in (
        (encode, [*settings, f"--config.base={config['base']}", data, f"--out={out}"]),
        (evaluate, [*settings, model, data, f"--out={out}"]),
        (answer, [*settings, model, *answers]),
    ):

        def refuse(flag, folder):
            raise UserError(f"{flag} is {folder}")

        monkeypatch.setattr(command, "require_shared", refuse)
        with pytest.raises(UserError, match=rf"^--out(put)? is {out}$"):
            command.main(arguments)


HANGING = """
import ctypes, os, signal, threading
import jax
from redvillm_jax.runtime import distributed
from redvillm_jax.runtime import stopping

stopping.STOP_SECONDS = 2

def main(argv):
    with stopping.deferred_sigterm():
        if jax.process_index() == jax.process_count() - 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time for ever, and no handler of Python's runs
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

distributed.command(main, saves_when_stopped=True)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_what_hangs_does_not_put_off_sigterm_for_ever(processes):
    for _, err in finish(launch(processes, ["-c", HANGING], devices=processes), code=1):
        assert re.search("^error: .*SIGTERM came 2 seconds ago and a step or a save has still not ended", err, re.M), (
            err
        )
        assert err.count("error: ") == 1


def test_processes_share_the_shards_of_a_store(tmp_path, config):
    command = ["tests/encode_process.py", "--config=configs/demo.py:llava", f"--config.base={config['base']}"]
    command += [f"--config.num_frames={config['num_frames']}", f"--data={config['data']}", "--batch_size=2"]
    for processes in (1, 2):
        finish(launch(processes, [*command, f"--out={tmp_path / str(processes)}"]))
    one, two = (open_store(tmp_path / name) for name in "12")
    assert len(one) == 12 and one.videos == two.videos and one.meta == two.meta and one.instructions == two.instructions
    assert len(list((tmp_path / "2").glob("*array_record*"))) == 4
    for i in range(12):
        for name in ("temporal", "spatial"):
            np.testing.assert_array_equal(one[i][name], two[i][name])


def test_a_device_without_room_is_told_in_one_line(capsys):
    def main(argv: list[str]) -> None:
        jax.jit(lambda: jnp.zeros((10**6, 10**8)))().block_until_ready()

    with pytest.raises(SystemExit) as end:
        run(lambda argv: distributed.with_memory_explained(main, argv), [])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a device has too little memory (RESOURCE_EXHAUSTED") and said.count("\n") == 1


def test_what_cannot_connect_is_refused(monkeypatch):
    names = dict(zip(distributed.VARIABLES, ("localhost:1", "2", "0"), strict=True))
    for name in names:
        for other in names:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, names[name])
        with pytest.raises(UserError, match=f"{name} is set, .* is not"):
            distributed.connect()
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{taken.getsockname()[1]}")
        with pytest.raises(UserError, match=r"port .* cannot be used .*already in use"):
            distributed.connect()
    for index in ("2", "-1", "one"):
        monkeypatch.setenv("JAX_PROCESS_ID", index)
        with pytest.raises(UserError, match=f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES=2"):
            distributed.connect()


def test_the_log_goes_on_after_a_complaint_of_jax_that_was_none():
    script = [sys.executable, "-I", "-S", "redvillm_jax/runtime/abort_filter.py"]
    reader = subprocess.Popen(script, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    complaint = b"W1120 17:18:25.292469 21604 coordination_service_agent.cc:1] slow today\n"
    for part in (b"E11", b" is a word\n", b"step 1\r", complaint, b"step 2\n"):
        reader.stdin.write(part)
        reader.stdin.flush()
    reader.stdin.close()
    assert reader.stderr.read() == b"E11 is a word\nstep 1\r" + complaint + b"step 2\n"


def test_what_jax_says_of_lost_processes_is_understood():
    silent = (
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed."
    )
    assert verdict(silent).startswith("process 1, 3 of this run is gone")
    assert verdict("Either the leader task was preempted/died/restarted").startswith("process 0 of this run is gone")
    assert "did not find each other" in verdict("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla…/RegisterTask")
    assert verdict("Segmentation fault") is None
