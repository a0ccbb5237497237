"""The training command: what moves and what stays, resuming, meshes, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import EVERY_FAMILY, FAMILIES, NUM_FRAMES, Folders
from helpers import change_json, change_store, config_of

from data_pipeline.common.errors import UserError
from redvillm_jax import train
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model import settings
from redvillm_jax.model.base_folder import load_part, open_base
from redvillm_jax.training.checkpoint import load_trainables

ROOT = Path(__file__).parents[1]


def make_config(family: str, base: Path, store: Path, **changes) -> dict:
    """The demo's config, shrunk to one epoch of 9 steps of 8 questions; weight decay shows what is really fixed."""
    config = config_of(family, changes.get("video", "red_villm"))
    config["weight_decay"] = dict.fromkeys(config["weight_decay"], 0.1)
    config |= {"base": str(base), "data": str(store), "num_frames": NUM_FRAMES, "num_epochs": 1, "batch_questions": 8}
    return config | {"log_every": 1, "checkpoint_every": 4, "row_length": 96} | changes


def train_on_one(config: dict, run: Path) -> None:
    """Trains on one device."""
    assert train.train(config | {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}, run, jax.devices()[:1]) == 0


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def leaves(run: Path) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(load_trainables(run)[1])[0]
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


def projector_leaves(base: Path) -> dict[str, np.ndarray]:
    """The base's own projector, by dotted path."""
    from flax import nnx

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    part = load_part(open_base(base), "projector", dtype=np.float32, sharding=lambda *_: one)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(part))}


@pytest.fixture(scope="module")
def runs(common, bases, stores) -> Folders:
    """One undisturbed run of each family on one device."""

    def make(family: str, folder: Path) -> None:
        train_on_one(make_config(family, bases[family], stores[family]), folder)

    return Folders(common / "runs", make)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_leaf_moves_and_fixed_ones_do_not(family, runs, bases):
    start, end = projector_leaves(bases[family]), leaves(runs[family])
    fixed = load_family(family).frozen_projector()
    assert set(end) == {f"{copy}.{name}" for copy in ("spatial", "temporal") for name in start}
    for name, value in end.items():
        original = start[name.partition(".")[2]]
        if any(re.search(pattern, name) for pattern in fixed):
            np.testing.assert_array_equal(value, original, err_msg=name)
        else:
            assert (value != original).any(), f"{name} did not move"
    assert any((end[f"spatial.{name}"] != end[f"temporal.{name}"]).any() for name in start), "the copies are tied"


def test_train_spatial_false_leaves_the_original_projector_as_it_is(tmp_path, bases, stores):
    train_on_one(make_config("llava", bases["llava"], stores["llava"], train_spatial=False), tmp_path)
    start, end = projector_leaves(bases["llava"]), leaves(tmp_path)
    for name, value in start.items():
        np.testing.assert_array_equal(end[f"spatial.{name}"], value)
        assert (end[f"temporal.{name}"] != value).any()


def test_per_token_freezes_what_it_does_not_use(tmp_path, bases, stores):
    train_on_one(make_config("qwen_vl", bases["qwen_vl"], stores["qwen_vl"], qwen_align="per_token"), tmp_path)
    start, end = projector_leaves(bases["qwen_vl"]), leaves(tmp_path)
    for name in ("attn_pool.query", "attn_pool.ln_q.weight", "attn_pool.pos_embed"):
        np.testing.assert_array_equal(end[f"temporal.{name}"], start[name])
    assert (end["temporal.attn_pool.kv_proj.weight"] != start["attn_pool.kv_proj.weight"]).any()


MESHES = [("llava", (8, 1, 1)), ("gemma3", (2, 2, 2))]
MORE_MESHES = [("llava", (2, 2, 2)), ("llava", (1, 8, 1)), ("llava", (1, 2, 4))]
MORE_MESHES += [(family, (2, 2, 2)) for family in EVERY_FAMILY if family not in ("llava", "gemma3")]
MESHES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_MESHES]


@pytest.mark.parametrize(("family", "shape"), MESHES)
def test_any_mesh_gives_the_losses_of_one_device(family, shape, tmp_path, runs, bases, stores):
    mesh = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    train.train(make_config(family, bases[family], stores[family], mesh=mesh), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(runs[family]), rtol=1e-5)


def test_the_same_mesh_is_bit_equal_from_run_to_run(tmp_path, bases, stores):
    ends = []
    for name in ("a", "b"):
        train.train(
            make_config("llava", bases["llava"], stores["llava"], mesh={"data": 2, "fsdp": 2, "tensor": 2}),
            tmp_path / name,
        )
        ends.append((losses(tmp_path / name), leaves(tmp_path / name)))
    assert ends[0][0] == ends[1][0]
    for name, value in ends[0][1].items():
        np.testing.assert_array_equal(value, ends[1][1][name])


def test_a_killed_run_continues_to_the_same_bits(tmp_path, bases, stores):
    one = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "num_epochs": 3}
    config = make_config("llava", bases["llava"], stores["llava"], **one)
    train.train(config, tmp_path / "undisturbed", jax.devices()[:1])
    overrides = [
        f"--config.{key}={config[key]}" for key in ("base", "data", "num_frames", "num_epochs", "batch_questions")
    ]
    overrides += [f"--config.{key}={config[key]}" for key in ("log_every", "checkpoint_every", "row_length")]
    overrides += [f"--config.weight_decay.{key}={value}" for key, value in config["weight_decay"].items()]
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "redvillm_jax.train", "--config=configs/demo.py:llava", f"--workdir={run}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command + overrides, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while time.time() < deadline and not any((run / "checkpoints").glob("4")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    again = subprocess.run(command + overrides, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    continued = int(re.search(r"continuing after step (\d+)", again.stdout)[1])
    assert 4 <= continued < 27
    assert losses(run) == losses(tmp_path / "undisturbed") and len(losses(run)) == 27
    for name, value in leaves(tmp_path / "undisturbed").items():
        np.testing.assert_array_equal(value, leaves(run)[name])


def test_first_batch_shows_rows_as_the_model_reads_them(runs):
    text = (runs["llava"] / "first_batch.txt").read_text()
    assert f"[{NUM_FRAMES + 16} visual tokens]" in text and "⟦" in text and "</s>⟧" in text
    assert "<start_of_turn>model\n⟦" in (runs["gemma3"] / "first_batch.txt").read_text()


def refused(config: dict, run: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.train(config, run)


def test_what_is_refused_in_one_line(tmp_path, runs, bases, stores):
    good = make_config("llava", bases["llava"], stores["llava"])
    refused(good | {"base": ""}, tmp_path, "download")
    refused(good | {"data": ""}, tmp_path, "data_pipeline.prepare")
    refused(good | {"base": str(tmp_path)}, tmp_path, "not a base folder")
    refused(good | {"base": str(bases["qwen_vl"])}, tmp_path, "is a qwen_vl base")
    refused(good | {"data": str(stores["qwen_vl"])}, tmp_path, "resize=bicubic, this model needs nearest")
    refused(good | {"num_frames": 5}, tmp_path, "num_frames=4, this model needs 5")
    refused(good | {"row_length": 30}, tmp_path, "row_length")
    refused(good | {"mesh": {"data": 3, "fsdp": 1, "tensor": 1}}, tmp_path, "does not fit 8 devices")
    refused(good | {"learning_rate": 1e-3}, runs["llava"], "learning_rate=0.004, this command says 0.001")
    (tmp_path / "file").touch()
    refused(good, tmp_path / "file", "is a file")
    other = shutil.copytree(bases["llava"], tmp_path / "base")
    before = (other / "config.json").read_bytes()
    refused(good, other, "holds config.json, and its config.json is not a run's")
    assert (other / "config.json").read_bytes() == before
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text("mine")
    refused(good, tmp_path / "logs", "holds metrics.jsonl, and its config.json is not a run's")
    assert (tmp_path / "logs" / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0, expected a whole number from 1"),
        ({"batch_questions": 0}, "batch_questions is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"num_workers": -1}, "num_workers is -1, expected a whole number from 0"),
        ({"clip_norm": 0}, "clip_norm is 0, expected a number above 0"),
        ({"dtype": "bflot16"}, "dtype is 'bflot16', expected one of bfloat16, float32"),
        ({"labels": "all"}, "labels is 'all'"),
        ({"qwen_align": "pool"}, "qwen_align is 'pool', expected one of resample, per_token"),
        ({"temporal_positions": "2d"}, "temporal_positions is '2d'"),
        ({"temporal_init": "zero"}, "temporal_init is 'zero'"),
        ({"spatial_pool": 3}, "spatial_pool is 3"),
        ({"streams": "none"}, "streams is 'none'"),
        ({"video": "mean"}, "video is 'mean', expected one of image_grid, red_villm, slow_fast"),
        ({"train_spatial": False, "temporal_module": False}, "leaves nothing to train"),
        ({"family": "flamingo"}, "unknown family 'flamingo'"),
    ],
)
def test_values_that_cannot_train_are_refused(change, message, tmp_path, bases, stores):
    refused(make_config("qwen_vl", bases["qwen_vl"], stores["qwen_vl"]) | change, tmp_path, message)


def test_other_questions_are_refused_on_resume(tmp_path, bases, stores, runs):
    shutil.copytree(stores["llava"], tmp_path / "store")
    change_store(tmp_path / "store", drop_questions=1)
    config = make_config("llava", bases["llava"], tmp_path / "store", mesh={"data": 1, "fsdp": 1, "tensor": 1})
    with pytest.raises(UserError, match="was trained on data"):
        train.train(config, runs["llava"], jax.devices()[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_with_remat_follows_float32(family, tmp_path, runs, bases, stores):
    """The defaults of the real recipes."""
    changes = {"dtype": "bfloat16", "remat": "full"}
    train_on_one(make_config(family, bases[family], stores[family], **changes), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(runs[family]), rtol=2e-2)
    assert {leaf.dtype for leaf in leaves(tmp_path).values()} == {np.dtype(np.float32)}


def test_a_language_model_in_8_bits_trains_like_the_exact_one(tmp_path, runs, bases, stores):
    train_on_one(make_config("llava", bases["llava"], stores["llava"], int8=True), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(runs["llava"]), rtol=2e-2)
    assert losses(tmp_path) != losses(runs["llava"])


def test_attention_is_chosen_and_may_change_between_runs(tmp_path, runs, bases, stores):
    """The escape from a kernel that fails: the same run goes on with another."""
    shutil.copytree(runs["llava"], tmp_path / "run")
    config = make_config("llava", bases["llava"], stores["llava"])
    refused(config | {"attention": "splash"}, tmp_path / "run", "attention=splash cannot be used: it needs a TPU")
    assert train.train(config | {"attention": "xla"}, tmp_path / "run") == 0


def test_mfu_is_logged_where_the_peak_is_known(tmp_path, bases, stores, monkeypatch):
    monkeypatch.setattr("redvillm_jax.training.throughput.peak_flops", lambda device: 1e12)
    train_on_one(make_config("llava", bases["llava"], stores["llava"]), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    body = 3 * (4 * 96 * 96 + 3 * 96 * 256)  # the matrices of three layers, without the head's share
    for line in lines:
        least = 4 * body * line["tokens_per_second"] / 1e12
        assert least < line["mfu"] < 1.5 * least


def test_random_modules_workers_and_several_epochs(tmp_path, bases, stores, monkeypatch):
    batches, steps = recorded(monkeypatch)
    changes = {"temporal_init": "random", "extra_mlp": True, "num_workers": 1, "num_epochs": 2, "log_every": 5}
    train_on_one(make_config("llava", bases["llava"], stores["llava"], **changes), tmp_path)
    end = leaves(tmp_path)
    assert {name.partition(".")[0] for name in end} == {
        "spatial",
        "temporal",
        "extra_mlp_spatial",
        "extra_mlp_temporal",
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 18]
    tokens = [float(batch["target_weights"].sum()) for batch in batches]
    assert len(set(tokens)) > 1, "every step weighs the same"
    for line in lines:  # the mean over the supervised tokens of the last five steps
        last = slice(line["step"] - 5, line["step"])
        assert line["loss"] == pytest.approx(np.average(steps[last], weights=tokens[last]), rel=1e-9)


def recorded(monkeypatch) -> tuple[list[dict], list[float]]:
    """The batches that train reads and the loss of each step, in lists that fill while it runs."""
    batches, steps, to_global, check_steps = [], [], train.to_global, train.check_steps
    monkeypatch.setattr(train, "to_global", lambda batch, mesh: batches.append(batch) or to_global(batch, mesh))

    def look(values, *rest):
        steps.extend(float(value["loss"]) for value in values)
        check_steps(values, *rest)

    monkeypatch.setattr(train, "check_steps", look)
    return batches, steps


def test_a_checkpoint_of_another_base_is_refused(tmp_path, runs, bases, stores):
    config = make_config("llava", bases["llava"], stores["llava"])
    shutil.copytree(runs["llava"], tmp_path / "run")
    other = tmp_path / "base"
    other.mkdir()
    for file in bases["llava"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    change_json(other / "base.json", lambda meta: meta.update(fingerprint="0" * 64))
    refused(config | {"base": str(other)}, tmp_path / "run", "was trained on base")


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(tmp_path, bases, stores, monkeypatch):
    monkeypatch.setattr(settings, "check_config", lambda config: None)  # which would refuse the rate
    changes = {"learning_rate": float("inf"), "log_every": 3, "checkpoint_every": 2}
    config = make_config("llava", bases["llava"], stores["llava"], **changes)
    refused(config, tmp_path, r"^step 2: loss nan, .*all rows, so the weights rather .*last good checkpoint: none")
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
