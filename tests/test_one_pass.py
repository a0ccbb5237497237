"""Each family once from its published files to an export, through every command that a model goes through."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import pytest
from conftest import EVERY_FAMILY
from test_encode import encode_store
from test_train import leaves, losses, make_config, projector_leaves

from conversion.to_torch import to_torch
from data_pipeline.store import open_store
from redvillm_jax import answer, evaluate, train
from redvillm_jax.bases.contract import load_family
from redvillm_jax.inference.open_model import open_model
from redvillm_jax.model.base_folder import open_base

ONE = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
FREE = ("vocab_size", "system_prompt")  # the tokenizer decides the first, a text the second


def sizes(config: Any) -> Any:
    """A config without the fields that a tiny folder chooses."""
    if not dataclasses.is_dataclass(config):
        return config
    return {name: sizes(value) for name, value in vars(config).items() if name not in FREE}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_from_published_files_to_an_export(family, bases, stores, videos, tmp_path, capsys):
    """bases and stores: what conversion.from_torch and data_pipeline.prepare make of published files and videos."""
    base, store = open_base(bases[family]), open_store(stores[family])
    streams, run, told = tmp_path / "streams", tmp_path / "run", tmp_path / "answers"
    encode_store(family, base.path, store.path, streams, "--dtype=float32")
    features = open_store(streams)[0]["spatial"]
    assert features.shape == (base.config.grid[0] * base.config.grid[1], base.config.feature_size)

    config = make_config(family, base.path, streams, **ONE)
    train.train(config, run, jax.devices()[:1])
    undisturbed = losses(run)
    shutil.rmtree(run / "checkpoints" / "9")
    assert train.train(config, run, jax.devices()[:1]) == 0
    assert losses(run) == undisturbed and len(undisturbed) == 9 and min(undisturbed[4:]) < undisturbed[0]
    copies = (f"{copy}.{name}" for copy in ("spatial", "temporal") for name in projector_leaves(base.path))
    assert set(leaves(run)) == set(copies)
    assert "continuing after step 8" in capsys.readouterr().out

    ask = [f"--model={run}", "--max_new_tokens=3"]
    assert evaluate.main([*ask, f"--data={streams}", f"--out={told}"]) == 0
    rows = [json.loads(line) for line in (told / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len(store.instructions)
    asked = max(rows, key=lambda row: len(row["prediction"]))
    video = next((videos / "videos").glob(f"{asked['video']}.*"))
    capsys.readouterr()
    assert answer.main([*ask, f"--video={video}", f"--question={asked['question']}"]) == 0
    assert capsys.readouterr().out.split("\n", 1)[1].strip() == asked["prediction"]

    to_torch(run, tmp_path / "whole", full=True)
    assert open_model(tmp_path / "whole").fingerprint == open_model(run).fingerprint


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_tiny_size_is_that_of_the_tiny_files(family, bases):
    tiny = load_family(family).SIZES["tiny"]
    assert sizes(open_base(bases[family]).config) == sizes(tiny)
