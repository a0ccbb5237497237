"""Runs of earlier versions, and runs that go on with another config: what they mean, and which rows they see."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import NUM_FRAMES
from helpers import plan_of
from test_open_model import change_json, write_run
from test_train import make_config

from configs import demo, llava, qwen
from data_pipeline.common.errors import UserError
from redvillm_jax import train
from redvillm_jax.bases.contract import load_family
from redvillm_jax.inference.open_model import open_model
from redvillm_jax.model import run_config
from redvillm_jax.model.settings import ANSWERING
from redvillm_jax.training.optim import warmup_cosine
from redvillm_jax.video import red_villm

FORMAT = {file.stem: file for file in sorted((Path(__file__).parent / "run_configs").glob("*.json"))}
ADDED = {"sampling": "uniform", "language": "", "int8": False}  # as the code behaved before there were these fields


def said(family: str) -> dict:
    return json.loads(FORMAT[family].read_text())


@pytest.mark.parametrize("config", [llava.get_config(), qwen.get_config(), *map(demo.get_config, FORMAT)])
def test_a_new_field_says_what_there_was_before_it(config):
    new = set(config) - set(said(config.family)) - set(run_config.ADDED)
    assert not new, f"runs of earlier versions lack {new}: run_config.ADDED says what they were trained with"


def test_what_earlier_runs_were_trained_with():
    assert {name: run_config.ADDED[name] for name in ADDED} == ADDED


@pytest.fixture(scope="module")
def old_runs(bases, tmp_path_factory) -> dict[str, Path]:
    """Runs in the format of `run_configs`."""
    runs = {}
    for family in FORMAT:
        runs[family] = write_run(tmp_path_factory.mktemp("old") / "run", family, bases[family])
        here = {"base": str(bases[family]), "num_frames": NUM_FRAMES}
        (runs[family] / "config.json").write_text(json.dumps(said(family) | here))
    return runs


@pytest.mark.parametrize("family", FORMAT)
def test_a_run_that_lacks_a_field_is_what_it_was(family, old_runs):
    run, file = old_runs[family], old_runs[family] / "config.json"
    whole, text = open_model(run), file.read_text()
    known = json.loads(text)
    needed = {*ANSWERING, *red_villm.FIELDS, *load_family(family).PROJECTOR_OPTIONS, "family"}
    for name in sorted(known.keys() - {"base"}):
        change_json(file, lambda config, name=name: config.pop(name))
        try:
            if name in needed - ADDED.keys():
                with pytest.raises(UserError, match=f"its config does not say {name}; is it damaged"):
                    open_model(run)
            else:
                opened = open_model(run)
                assert opened.fingerprint == whole.fingerprint
                assert opened.config.get(name, known[name]) == known[name]
            if name in ADDED or name in run_config.FREE or name == "num_epochs":
                train.open_workdir(run, known)
            else:
                with pytest.raises(UserError, match=f"config.json: does not say {name}"):
                    train.open_workdir(run, known)
        finally:
            file.write_text(text)


def test_what_a_run_was_trained_with_is_not_what_is_the_default_today(old_runs):
    file = old_runs["llava"] / "config.json"
    text = file.read_text()
    known = json.loads(text)
    change_json(file, lambda config: config.pop("int8"))
    try:
        with pytest.raises(UserError, match=r"int8=False, this command says True .*it decides the steps already done"):
            train.open_workdir(old_runs["llava"], known | {"int8": True})
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 1}, r"seed=0, this command says 1 \(seed differ\): it decides which rows a step has"),
        ({"learning_rate": 1e-3}, "it decides the steps already done"),
        ({"streams": "spatial"}, "it decides the model"),
        ({"foo": 1}, "does not say foo"),
    ],
)
def test_what_may_not_change_is_named_with_why(change, why, old_runs):
    known = said("llava") | {"base": "elsewhere", "num_frames": NUM_FRAMES}
    free = {"remat": "full", "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "num_workers": 3, "log_every": 7}
    train.open_workdir(old_runs["llava"], known | free | {"num_epochs": 9})
    with pytest.raises(UserError, match=why):
        train.open_workdir(old_runs["llava"], known | change)


# ---- other numbers of epochs


def stopped_after(step: int):
    """Stands for a SIGTERM in a step."""

    @contextlib.contextmanager
    def deferred():
        yield lambda done: done == step

    return deferred


def logged(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def schedule(num_steps: int) -> list[float]:
    return [float(warmup_cosine(4e-3, num_steps, 0.03)(step)) for step in range(num_steps)]


def test_another_number_of_epochs_sees_the_same_rows_of_each(tmp_path, bases, stores, monkeypatch, capsys):
    """A run of three epochs is stopped in its first, shrunk to one, extended to two, and cannot shrink again."""
    config = make_config("llava", bases["llava"], stores["llava"], mesh={"data": 1, "fsdp": 1, "tensor": 1})
    seen, batches = [], train.batches

    def watched(steps, row_fn, store, *, start_step, **options):
        number = start_step
        for batch in batches(steps, row_fn, store, start_step=start_step, **options):
            seen.append(steps[number])
            laid_out = [row_fn(row) for row in steps[number]]
            np.testing.assert_array_equal(batch["token_ids"][: len(laid_out)], [row["token_ids"] for row in laid_out])
            number += 1
            yield batch

    monkeypatch.setattr(train, "batches", watched)
    with monkeypatch.context() as stopping:
        stopping.setattr(train, "deferred_sigterm", stopped_after(4))
        train.train(config | {"num_epochs": 3}, tmp_path, jax.devices()[:1])
    assert "note" not in capsys.readouterr().out
    for epochs, was, step in ((1, 3, 5), (2, 1, 10)):
        before = logged(tmp_path, "loss")
        assert train.train(config | {"num_epochs": epochs}, tmp_path, jax.devices()[:1]) == 0
        assert f"num_epochs is {epochs}, was {was}: from step {step} on the learning" in capsys.readouterr().out
        assert logged(tmp_path, "loss")[: len(before)] == before
    base, store = train.open_inputs(config)
    plan = plan_of(config | {"num_epochs": 3}, base, store)
    assert seen == plan.steps[:18] and len(plan.steps) == 27
    np.testing.assert_allclose(logged(tmp_path, "learning_rate"), schedule(27)[:4] + schedule(9)[4:] + schedule(18)[9:])
    with pytest.raises(UserError, match=r"has done 18 steps, config.num_epochs=1 has 9: num_epochs may grow"):
        train.train(config, tmp_path, jax.devices()[:1])
    assert json.loads((tmp_path / "config.json").read_text())["num_epochs"] == 2
