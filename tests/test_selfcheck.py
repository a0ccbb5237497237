"""The self-check: all lines pass on a sound machine, and whatever is broken fails its own line alone."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_distributed import ROOT, free_port

from data_pipeline.common.errors import UserError
from redvillm_jax import selfcheck
from redvillm_jax.checks import machine_checks, model_checks
from redvillm_jax.modules.attention import row_attention
from redvillm_jax.modules.layers import attention
from redvillm_jax.training import checkpoint

NAMES = "devices mesh collectives folder data_order attention encoder training checkpoints".split()
MODEL_CHECKS = ("attention", "encoder", "training", "checkpoints")


def read(text: str) -> dict[str, tuple[str, str]]:
    """The printed lines: name -> (word, text)."""
    found = re.findall(r"^(pass|fail|skip)  (\w+(?: order)?) +[\d.]+ s  (.+)$", text, re.M)
    return {name.replace(" ", "_"): (word, said) for word, name, said in found}


def words(text: str) -> dict[str, str]:
    return {name: word for name, (word, _) in read(text).items()}


def start(arguments: list[str], devices: int, cache: Path, patches: tuple[str, ...] = ("",)) -> list[tuple]:
    """The command in a process for each of `patches`, code that runs first: (exit code, stdout, stderr) of each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # What takes long is compiling.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    if len(patches) > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(len(patches))}
    processes = []
    for index, patch in enumerate(patches):
        command = [sys.executable, "-m", "redvillm_jax.selfcheck", *arguments]
        if patch:
            run = "\nfrom redvillm_jax import selfcheck\nfrom redvillm_jax.runtime.distributed import command\n"
            run += "command(selfcheck.main)"
            command[1:3] = ["-c", textwrap.dedent(patch) + run]
        more = {"JAX_PROCESS_ID": str(index)} if len(patches) > 1 else {}
        pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment | more, **pipes))
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in out + err
        ends.append((process.returncode, out, err))
    return ends


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


# Half the compiling.
LLAVA = "from redvillm_jax.checks import model_checks\nmodel_checks.known_families = lambda: ['llava']"


@pytest.mark.parametrize(
    ("processes", "devices", "patch"),
    [
        (1, 4, LLAVA),
        pytest.param(1, 1, "", marks=pytest.mark.slow),
        pytest.param(2, 2, LLAVA, marks=pytest.mark.slow),
        pytest.param(1, 4, "", marks=pytest.mark.slow),
        pytest.param(2, 2, "", marks=pytest.mark.slow),
    ],
)
def test_a_sound_machine_passes(processes, devices, patch, tmp_path, cache):
    ends = start([f"--workdir={tmp_path}/new"], devices, cache, (patch,) * processes)
    code, out, err = ends[0]
    assert code == 0, out + err
    assert words(out) == dict.fromkeys(NAMES, "pass")
    assert read(out)["devices"][1].startswith(f"{processes * devices} device(s): cpu cpu; {processes} process(es)")
    assert "all 9 passed" in out
    assert not list((tmp_path / "new").iterdir()), "something is left in the folder"
    for code, out, _ in ends[1:]:
        assert code == 0 and not words(out), "only the first process prints"


LIGHT = "from redvillm_jax import selfcheck\n" + "\n".join(
    f"selfcheck.check_{name} = lambda *_: 'left out'" for name in MODEL_CHECKS
)


def test_a_folder_that_is_not_shared(tmp_path, cache):
    elsewhere = LIGHT + f"\nimport sys; sys.argv[1] = '--workdir={tmp_path}/b'"
    (code, out, _), (other, _, _) = start([f"--workdir={tmp_path}/a"], 1, cache, (LIGHT, elsewhere))
    assert (code, other) == (1, 1)
    broken = {"folder": "fail", "checkpoints": "skip"}
    assert words(out) == dict.fromkeys(NAMES, "pass") | broken
    assert "one folder that all processes see" in read(out)["folder"][1]
    assert not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]


BROKEN_IN_ONE = ("devices", "collectives", "data_order", "encoder")


def test_what_goes_wrong_in_one_process_is_said_with_its_number(tmp_path, cache):
    different = (
        LIGHT
        + """
import importlib.metadata
from redvillm_jax.runtime import consensus
from redvillm_jax.checks import machine_checks
version = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9" if name == "flax" else version(name)
def fail(): raise RuntimeError("no encoder\\nhere")
selfcheck.check_encoder = fail
def wrong(name, result, want): raise consensus.Failed(f"{name} is wrong")
machine_checks.check_exact = wrong
plan = machine_checks.plan_random_rows
machine_checks.plan_random_rows = lambda *a, **k: plan(*a, **k)._replace(fingerprint=lambda epochs: "another")
"""
    )
    (code, out, _), (other, _, _) = start([f"--workdir={tmp_path}"], 1, cache, (LIGHT, different))
    assert (code, other) == (1, 1)
    assert words(out) == dict.fromkeys(NAMES, "pass") | dict.fromkeys(BROKEN_IN_ONE, "fail")
    said = {name: text for name, (_, text) in read(out).items()}
    assert re.search(r"process 1 has packages .*flax 9\.9.*, process 0 has .*flax 0\.", said["devices"])
    assert said["collectives"] == "process 1: psum in float32 is wrong"
    assert said["encoder"] == "process 1: RuntimeError: no encoder here"
    assert "process 1 has a plan of rows with hash another" in said["data_order"]


def test_a_check_that_hangs_ends_in_a_line(tmp_path, cache):
    patch = LIGHT + "\nimport time\nselfcheck.LIMIT_SECONDS = 2\nselfcheck.check_devices = lambda: time.sleep(60)"
    [(code, out, _)] = start([], 1, cache, (patch,))
    assert code == 1
    assert words(out) == {"devices": "fail"} and "no end after 2 s" in out


@pytest.fixture
def light(monkeypatch):
    """Leaves out what takes long."""
    for name in MODEL_CHECKS:
        monkeypatch.setattr(selfcheck, f"check_{name}", lambda *_: "left out")


def failing(capsys, arguments: list[str] = ()) -> dict[str, str]:
    """Runs the command in this process: the text of each line that does not pass."""
    code = selfcheck.main(list(arguments))
    lines = read(capsys.readouterr().out)
    bad = {name: text for name, (word, text) in lines.items() if word != "pass"}
    assert code == (1 if bad else 0) and list(lines) == NAMES
    return bad


def test_a_folder_that_cannot_be_written(tmp_path, light, capsys):
    (tmp_path / "file").touch()
    bad = failing(capsys, [f"--workdir={tmp_path}/file"])
    assert (
        set(bad) == {"folder", "checkpoints"}
        and "cannot be made" in bad["folder"]
        and bad["checkpoints"] == "needs folder"
    )


def test_a_rename_that_leaves_the_old_file(light, capsys, monkeypatch):
    from etils.epath import Path as EPath

    monkeypatch.setattr(type(EPath("/tmp")), "replace", lambda self, target: self.copy(target))
    assert "left something behind" in failing(capsys)["folder"]


def test_a_mesh_without_a_device(light, capsys, monkeypatch):
    meshes = {"all": jax.sharding.Mesh([[jax.devices()[:-1]]], ("data", "fsdp", "tensor"))}
    monkeypatch.setattr(machine_checks, "meshes", lambda: meshes)
    bad = failing(capsys)
    assert set(bad) == {"mesh"} and "mesh all holds devices" in bad["mesh"]


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("psum", lambda x, axes: jnp.where(jax.lax.axis_index(axes) == 5, x, jax.lax.pmean(x, axes) * 8), "psum"),
        (
            "all_gather",
            lambda x, axes, tiled: jnp.roll(jnp.arange(8, dtype=x.dtype), jax.lax.axis_index(axes)),
            "all-g",
        ),
    ],
)
def test_a_wrong_collective(name, broken, said, light, capsys, monkeypatch):
    monkeypatch.setattr(jax.lax, name, broken)
    bad = failing(capsys)
    assert set(bad) == {"collectives"} and bad["collectives"].startswith(said)
    assert "on device 5" in bad["collectives"] or name == "all_gather"


def test_rows_that_are_not_the_hosts(light, capsys, monkeypatch):
    real = machine_checks.batches

    def other(*arguments, rows=None, **options):
        for batch in real(*arguments, rows=rows, **options):
            if rows:
                batch["token_ids"][-1, 0] += 1
            yield batch

    monkeypatch.setattr(machine_checks, "batches", other)
    bad = failing(capsys)
    assert bad == {"data_order": "mesh data=8 fsdp=1 tensor=1: reads other token_ids than its rows of the step"}


def test_rows_that_get_lost_on_the_way_to_the_devices(light, capsys, monkeypatch):
    real = machine_checks.to_global
    monkeypatch.setattr(
        machine_checks, "to_global", lambda batch, mesh: real({k: v[::-1] for k, v in batch.items()}, mesh)
    )
    bad = failing(capsys)
    assert set(bad) == {"data_order"} and "the rows on the devices are not the rows of the step" in bad["data_order"]


def run_one(capsys, name: str) -> tuple[str, str]:
    code = selfcheck.run_checks({name: getattr(model_checks, f"check_{name}")})
    word, text = read(capsys.readouterr().out)[name]
    assert code == (word != "pass")
    return word, text


def test_the_tpu_kernel_passes_in_bfloat16(capsys, monkeypatch):
    monkeypatch.setattr(model_checks, "choose_kernel", lambda *_: "splash")
    monkeypatch.setattr(model_checks, "compute_dtype", lambda: "bfloat16")
    one = model_checks.make_mesh(model_checks.ALL_FSDP, jax.devices()[:1])
    monkeypatch.setattr(model_checks, "make_mesh", lambda *_: one)
    with pltpu.force_tpu_interpret_mode():
        word, text = run_one(capsys, "attention")
    assert word == "pass", text
    off = float(re.search(r"within (\S+) of", text)[1])
    assert 1e-3 < off < model_checks.TOLERANCE["bfloat16"] / 3


def with_mask(change):
    """row_attention with a kernel "new" beside xla, whose mask is changed."""

    def changed(*ids, **options):
        *ids, kernel = ids
        masks = row_attention(*ids, **options)
        if kernel == "xla":
            return masks
        return masks._replace(window=jax.tree_util.Partial(lambda q, k, v: attention(q, k, v, change(masks.window))))

    return changed


@pytest.mark.parametrize(
    ("dtype", "change", "word"),
    [
        ("float32", lambda mask: mask, "pass"),
        ("bfloat16", lambda mask: mask, "pass"),
        ("bfloat16", lambda mask: mask.at[:, 65, 64].set(False), "fail"),  # one pair of tokens in one row
        ("bfloat16", lambda mask: mask | jnp.tri(mask.shape[1], dtype=bool), "fail"),
    ],
)
def test_a_kernel_that_sees_something_else(dtype, change, word, capsys, monkeypatch):
    monkeypatch.setattr(model_checks, "choose_kernel", lambda *_: "new")
    monkeypatch.setattr(model_checks, "compute_dtype", lambda: dtype)
    monkeypatch.setattr(model_checks, "row_attention", with_mask(change))
    found, text = run_one(capsys, "attention")
    print(text)
    assert found == word, text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * (1 + 1e-3), r"off by 1\.\de-03, allowed 1e-04"),
        (lambda x: x.at[-1, -1, -1].set(jnp.nan), "off by nan"),  # on the last device alone
    ],
)
def test_a_wrong_encoder(change, said, capsys, monkeypatch):
    real = model_checks.encode

    def wrong(base, config, mesh, *rest):
        streams = real(base, config, mesh, *rest)
        return jax.tree.map(change, streams) if mesh.size > 1 else streams

    monkeypatch.setattr(model_checks, "encode", wrong)
    monkeypatch.setattr(model_checks, "known_families", lambda: ["llava"])
    word, text = run_one(capsys, "encoder")
    assert word == "fail" and re.search(r"llava in float32: \w+ is " + said, text)


def test_training_that_goes_elsewhere(capsys, monkeypatch):
    real = model_checks.make_training

    def faster(recipe, base, settings, model, mesh, **options):
        rate = recipe.learning_rate * (1 + 0.2 * (mesh.size > 1))
        return real(dataclasses.replace(recipe, learning_rate=rate), base, settings, model, mesh, **options)

    monkeypatch.setattr(model_checks, "make_training", faster)
    monkeypatch.setattr(model_checks, "known_families", lambda: ["llava"])
    word, text = run_one(capsys, "training")
    assert word == "fail" and "llava in float32: " in text


def test_a_checkpoint_with_one_other_number(capsys, monkeypatch, tmp_path):
    real = checkpoint.restore

    def restore(checkpoints, state, *, identity):
        step, got = real(checkpoints, state, identity=identity)
        leaves, tree = jax.tree.flatten(got)
        leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1)
        return step, jax.tree.unflatten(tree, leaves)

    check = {"checkpoints": lambda: model_checks.check_checkpoints(model_checks.epath.Path(tmp_path))}
    assert selfcheck.run_checks(check) == 0
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint, "restore", restore)
    assert selfcheck.run_checks(check) == 1
    assert "not the same bits" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_talk(capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("connection\nlost")

    monkeypatch.setattr(selfcheck, "together", broken)
    assert selfcheck.main([]) == 1
    lines = read(capsys.readouterr().out)
    assert lines == {"devices": ("fail", "the processes cannot talk to each other: RuntimeError: connection lost")}


def test_devices_that_do_not_open(capsys, monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "process_count", broken)
    assert selfcheck.main([]) == 1
    assert "Unable to initialize backend 'tpu'" in read(capsys.readouterr().out)["devices"][1]


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="--workdir is needed with 4 processes"):
        selfcheck.main([])
