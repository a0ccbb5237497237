"""The plan command on a described TPU slice: the real compiler, tiny sizes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from data_pipeline.common.errors import UserError
from redvillm_jax import plan
from redvillm_jax.model.base_folder import sized_base
from redvillm_jax.modules.attention import row_attention
from redvillm_jax.modules.layers import BATCH_AXES, attention
from redvillm_jax.planning import programs
from redvillm_jax.planning.workload import Workload
from redvillm_jax.runtime import chips, distributed, jax_private
from redvillm_jax.runtime.chips import NAMES, parse_topology
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.runtime.xla_messages import needed_bytes, small_memory
from redvillm_jax.training.flops import kernel_flops, step_flops

ROOT = Path(__file__).parents[1]


def command(*flags: str) -> subprocess.CompletedProcess:
    # Another worker's program for a TPU cannot be read back from the cache that the tests share.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    arguments = [sys.executable, "-m", "redvillm_jax.plan", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory, bases, stores):
    """What the command prints and dumps for a tiny LLaVA and a store of one's own on four chips."""
    out = tmp_path_factory.mktemp("dump")
    own = (f"--config.base={bases['llava']}", f"--config.data={stores['llava']}", "--config.num_frames=4")
    flags = ("--config=configs/llava.py", "--topology=v5e-4", "--rows-per-chip=2", f"--dump={out}")
    done = command(*flags, *own, "--config.row_length=96")
    assert done.returncode == 0, done.stderr
    return done, out / "v5e-4"


def test_a_plan_says_what_fits_and_what_it_costs(dumped):
    done, _ = dumped
    for text in (
        "llava on v5e-4: 4 v5e chips (2×2)",
        "32 questions a step, the paper’s: ",
        "no longer the paper's recipe: 8 rows of",
        "\n  12 videos once, 8 at once on a host: ",
        "MFU at most",
        "chip-hours",
        ": fits",
    ):
        assert text in done.stdout, done.stdout
    assert not done.stderr


def test_the_dump_adds_up(dumped):
    done, out = dumped
    folders = sorted(path.name for path in out.iterdir())
    assert folders[0] == "encode" and len(folders) in (2, 3)
    for folder in folders:
        summary = json.loads((out / folder / "summary.json").read_text())
        rows = list(csv.DictReader((out / folder / "charges.csv").read_text().splitlines()))
        assert sum(float(row["seconds"]) for row in rows) == pytest.approx(summary["seconds"], rel=1e-4)
        assert summary["seconds"] == pytest.approx(sum(summary["shares"].values()))
        assert (out / folder / "optimized.hlo").read_text().startswith("HloModule")
    shown = max(json.loads((out / f / "summary.json").read_text())["seconds"] for f in folders[1:])
    assert f"{shown * 1e3:.0f} ms" in done.stdout


@pytest.mark.parametrize(("kv_heads", "width"), [(4, 128), (1, 256)])
def test_the_packed_kernel_compiles_for_a_tpu(kv_heads, width):
    devices = chips.tpu_devices("v5e-4")
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, devices)
    at = NamedSharding(mesh, P(BATCH_AXES))
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=at)
    query, key = (jax.ShapeDtypeStruct((4, 1024, heads, width), jnp.bfloat16, sharding=at) for heads in (4, kv_heads))

    def loss(query, key, value, ids):
        masks = row_attention(ids, ids, ids, "splash", window=256, pictures=ids > 0)

        def layer(value, windowed):
            return attention(query, key, value, masks.of_layer(windowed))[:, :, :kv_heads], None

        return jax.lax.scan(layer, value, jnp.array([True, False]))[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        hlo = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, ids).compile().as_text()
    for kernel in kernel_flops(1, 1, 1, 1):
        assert f"%{kernel}" in hlo, "the arithmetic knows a kernel by another name than the program"


def test_attention_in_float16_compiles_for_a_tpu():
    at = SingleDeviceSharding(chips.tpu_devices("v5e-4")[0])
    qkv = [jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float16, sharding=at)] * 3
    hlo = jax.jit(attention).lower(*qkv).compile().as_text()
    assert "f32[" in hlo


def test_what_is_too_large_says_what_to_try(capsys):
    chip, gib = parse_topology("v5e-4")[0], 2**30
    program = programs.Program(10 * gib, gib, 9 * gib, 20 * gib, 1.0, {}, compile_seconds=0)
    plan.print_memory("train", program, chip, {"int8": False, "remat": "gate,up", "mesh": {"fsdp": 1, "tensor": 1}}, 2)
    said = capsys.readouterr().out
    assert "peak 20.0 of 16.0: DOES NOT FIT" in said
    tried = "--rows-per-chip=1; --config.remat=full; --config.mesh.data=1"
    assert f"try: --config.int8=True (for its loss see docs/performance.md); {tried}" in said


@pytest.mark.slow
def test_what_does_not_fit_says_what_it_needs_and_what_to_try(capsys):
    size, mesh = ["--config=configs/llava.py", "--size=v1-7b"], ["--config.mesh.data=-1", "--config.mesh.fsdp=1"]
    plan.main([*size, "--topology=v5e-4", *mesh, "--config.remat=gate,up", "--rows-per-chip=2"])
    said = capsys.readouterr().out
    assert "of 16.0: DOES NOT FIT" in said
    tried = "--rows-per-chip=1; --config.remat=full; --config.mesh.data=1"
    assert f"try: --config.int8=True (for its loss see docs/performance.md); {tried}" in said


SMALL = (  # as libtpu says it of a kernel that keeps 64 MB in vector memory, and of one with 4 MB of scalars
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating on "
    "stack for %shard_map.12 = f32[8192,1024] custom-call(%param.1). Scoped allocation with size 64.00M and limit "
    "16.00M exceeded scoped vmem limit by 48.00M.",
    "RESOURCE_EXHAUSTED: Allocation (size=4194304) would exceed memory (size=1048576) :: #allocation3 "
    "[shape = 'u8[4194304]{0}', space=smem, size = 0x400000, scoped, tag = 'prefetched SMEM operand 0']",
)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (SMALL[0], r"more vector memory \(vmem\) than a chip has \(size 64.00M and limit 16.00M\)"),
        (SMALL[1], r"more scalar memory \(smem\) .* \(\(size=4194304\) would exceed memory \(size=1048576\)\)"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.22M of 16.00M vmem.",
            r"16.22M of 16.00M\)",
        ),
    ],
)
def test_a_small_memory_that_overflows_is_one_line(said, message, capsys):
    def overflow(*_):
        raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(UserError, match=message):
        distributed.with_memory_explained(overflow, [])
    lowered, mesh = SimpleNamespace(compile=overflow), make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    chip = parse_topology("v5e-4")[0]
    program = programs.compile_program(lambda: lowered, mesh, chip, {}, weights=(), state=(), dump=None)
    plan.print_memory("train", program, chip, {}, 1)
    line = capsys.readouterr().out
    assert re.fullmatch(rf"  train does not compile: .*{message}; try shorter rows \(--config.row_length\).*\n", line)
    assert not program.known
    assert small_memory("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm.") == ""


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("RESOURCE_EXHAUSTED: … HLO temporaries (24.58G) exceeds available HBM (15.75G).", 24.58 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 16.22M of 16.00M vmem.", None),
        ("INTERNAL: hbm", None),
    ],
)
def test_the_compilers_complaints_are_read(said, needed):
    assert needed_bytes(said) == needed


@pytest.mark.parametrize(
    ("epochs", "said"), [(5, "  5 epochs: at least 5.00 h, with"), (1, "  1 epoch: at least 1.00 h")]
)
def test_the_hours_are_those_of_the_config_s_epochs(epochs, said, capsys):
    program = programs.Program(0, 0, 0, 1, seconds=36.0, shares={}, compile_seconds=0)
    work = Workload(32, 4, 128, 1, 8, 400.0, 30.0, steps=100)
    chip, base = parse_topology("v5e-4")[0], sized_base("llava", "tiny")
    plan.print_bound(program, work, base, chip, 4, {"num_epochs": epochs}, 0.5)
    assert said in capsys.readouterr().out


def test_arithmetic():
    assert step_flops((10, 3), 100, 7) == 4 * (10 * 100 + 3 * 7)
    forward, dq, dkv = kernel_flops(2, 4, 3, 8).values()
    assert forward == 2 * 2 * (2 * 10 * 3 * 8)  # two products of 2 flops for 10 visible pairs in each of 2 rows
    assert (dq / forward, dkv / forward) == (1.5, 2)
    assert kernel_flops(2, 4, 3, 8, window=2)["splash_mha_fwd"] == forward * 7 / 10  # 1 + 2 + 2 + 2 pairs
    assert kernel_flops(2, 4, 3, 8, window=4) == kernel_flops(2, 4, 3, 8, window=9) == kernel_flops(2, 4, 3, 8)


def test_names_count_what_users_count():
    assert parse_topology("v4-32")[1] == (2, 2, 4) and parse_topology("v5p-16")[1] == (2, 2, 2)
    assert parse_topology("v5e-16")[1] == (4, 4)
    assert {"v4-8", "v4-128", "v5e-4", "v5e-256", "v5p-8", "v5p-128", "v6e-8"} <= set(NAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --topology --all is required"),
        (["--config=configs/llava.py", "--topology=v5e-5"], "--topology=v5e-5: unknown, expected one of v4-8"),
        (["--config=configs/llava.py", "--topology=v5e-4", "--size=8b"], "unknown size '8b' of llava"),
        (
            ["--config=configs/llava.py", "--topology=v5e-4", "--rows-per-chip=0"],
            "--rows_per_chip: expected a positive integer",
        ),
        (
            ["--config=configs/llava.py", "--topology=v5e-4", "--config.remat=gates"],
            "config.remat is 'gates', expected none, full, or",
        ),
        (["--config=configs/llava.py", "--topology=v5e-4", "--config.attention=flash"], "config.attention is 'flash'"),
    ],
)
def test_mistakes_end_in_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        plan.main(flags)


def test_a_machine_without_a_tpu_hears_nothing_of_one():
    """libtpu is installed here and looked for by every command that leaves the choice of the device to jax."""
    code = (
        "import jax; from redvillm_jax.runtime.distributed import command; "
        "command(lambda _: print(jax.devices()[0].platform))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not (done.stdout == "cpu\n" and done.stderr), done.stderr


@pytest.mark.parametrize("there", ["chip", "node", "variable", "none"])
def test_a_machine_with_a_tpu_hears_all_of_it(there, tmp_path, monkeypatch):
    before = {k: v for k, v in os.environ.items() if k not in chips.QUIET_LIBTPU}
    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(chips, "TPU_NODES", (str(tmp_path / "accel*"),))
    found = 4 if there == "chip" else 0
    monkeypatch.setattr(jax_private, "num_tpu_chips", lambda: found)
    if there == "node":
        (tmp_path / "accel0").touch()
    if there == "variable":
        os.environ["TPU_MIN_LOG_LEVEL"] = "0"
        before["TPU_MIN_LOG_LEVEL"] = "0"
    chips.quiet_without_tpu()
    assert os.environ == (before | chips.QUIET_LIBTPU if there == "none" else before)


def test_a_missing_compiler_ends_in_one_line(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(jax_private, "described_devices", missing)
    with pytest.raises(UserError, match=r"cannot be used \(no libtpu\); pip install -e '.\[tpu\]' brings it"):
        chips.tpu_devices("v5e-4")
