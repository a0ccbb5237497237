"""A base from outside goes through every command; what a module lacks of the contract is said in one line."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_open_model import export, load, visual_tokens, write_run
from test_train import make_config

import redvillm_jax
from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline.common.errors import UserError
from data_pipeline.media.reading import Picture
from redvillm_jax import plan, train
from redvillm_jax.bases.contract import CONFIG, known_families, load_family
from redvillm_jax.checks import model_checks
from redvillm_jax.inference.open_model import open_model
from tests import toy_base
from tests.tiny_bases import TOY

ROOT = Path(__file__).parents[1]
DEMO = [f"--config={ROOT / 'configs' / 'demo.py'}:{TOY}", "--config.num_frames=4"]
ONE = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}


def load_folder(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name


def test_nothing_in_the_product_names_it():
    files = [file for room in ("redvillm_jax", "conversion", "configs") for file in (ROOT / room).rglob("*.py")]
    assert not [file for file in files if "toy" in file.read_text()]
    assert TOY not in known_families() and "contract" not in known_families()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_it_converts_there_and_back_bit_for_bit(bases, dtype, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    toy_base.write_text_files(source)
    published = {name: array.astype(dtype) for name, array in load_folder(bases[TOY]).items()}
    save_file(published, source / "model.safetensors", metadata={"format": "pt"})
    meta = from_torch(TOY, source, tmp_path / "base")
    assert (meta["family"], meta["tensors_not_loaded"]) == (TOY, 1)
    to_torch(tmp_path / "base", tmp_path / "whole", full=True)
    assert_same_bits(load_folder(tmp_path / "whole"), published)
    assert from_torch(TOY, tmp_path / "whole", tmp_path / "again")["fingerprint"] == meta["fingerprint"]
    to_torch(tmp_path / "base", tmp_path / "projectors")
    own = {name: array for name, array in published.items() if name.startswith("connector.")}
    assert len(own) == 4
    assert_same_bits(load_folder(tmp_path / "projectors"), own)


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory) -> Path:
    """A run whose projectors have moved at random."""
    return write_run(tmp_path_factory.mktemp("toy") / "run", TOY, bases[TOY])


def test_a_run_and_its_exports_are_one_model(run, bases, stores, tmp_path):
    forms = export(run, TOY, tmp_path)
    want = open_model(run)
    for name, found in {
        "projectors": open_model(forms["projectors"], base=bases[TOY]),
        "whole": open_model(forms["whole"]),
    }.items():
        assert found.fingerprint == want.fingerprint, name
        np.testing.assert_array_equal(*(visual_tokens(load(model), stores[TOY]) for model in (found, want)))
    names = load_folder(forms["projectors"]).keys()
    assert names == {
        f"{start}{leaf}"
        for start in ("connector.", "temporal_module.")
        for leaf in ("core.weight", "core.bias", "norm.weight", "norm.bias")
    }


@pytest.mark.slow
def test_it_answers_about_pictures_and_streams(run, videos, tmp_path):
    model, video = redvillm_jax.load(run), next((videos / "videos").iterdir())
    said = model.ask(video, "What colour is it?", max_new_tokens=4)
    assert "".join(model.stream(video, "What colour is it?", max_new_tokens=4)) == said
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert isinstance(model.ask(Picture(tmp_path / "red.png"), "What is it?", max_new_tokens=4), str)


@pytest.mark.slow  # test_precision lowers its steps for a TPU
def test_it_is_planned(bases, stores, capsys):
    plan.main([*DEMO, "--topology=v5e-4", f"--config.base={bases[TOY]}", f"--config.data={stores[TOY]}"])
    assert "per chip" in capsys.readouterr().out


def test_an_explicit_kernel_that_knows_no_window_is_refused(bases, stores, tmp_path):
    with pytest.raises(UserError, match=r"config\.attention=splash cannot be used"):
        train.train(make_config(TOY, bases[TOY], stores[TOY], attention="splash"), tmp_path)


def test_selfcheck_can_check_it(monkeypatch):
    monkeypatch.setattr(model_checks, "known_families", lambda: [TOY])
    assert model_checks.check_encoder().startswith(f"tiny encoders in float32 against float32 on the CPU: {TOY} ")


# ---- modules that are no base


def module(name: str, **attributes) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


WHOLE = {name: value for name, value in vars(toy_base).items() if not name.startswith("__")}


class HalfConfig:
    """Lacks almost everything."""

    image_size = 3


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"Encoder": None, "prompt": None}, "Encoder, prompt"),
        ({"Projector": object}, "Projector.__call__, Projector.token_layout"),
        ({"SIZES": {}}, "SIZES['tiny']"),
        ({"SIZES": {"tiny": HalfConfig()}}, ", ".join(f"Config.{name}" for name in CONFIG if name != "image_size")),
        ({"PREFIX": {"encoder": "a.", "llm": ""}}, "PREFIX['projector']"),
        ({"LLM": object}, "LLM.embed, LLM.init_cache, LLM.context_class, LLM.__call__, LLM.logits, LLM.head"),
    ],
)
def test_a_module_says_what_it_lacks(changes, lacking, monkeypatch):
    kept = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    monkeypatch.setitem(sys.modules, "my.base", module("my.base", **kept))
    monkeypatch.setitem(sys.modules, "my", module("my"))
    with pytest.raises(UserError, match=re.escape(f"my.base: no base, it lacks {lacking} (see docs/new_base.md)")):
        load_family("my.base")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.such", None, "family no.such: cannot be imported (No module named 'no'); install its package"),
        ("broken_base.one", "1 / 0", "family broken_base.one: its module raises ZeroDivisionError: division by zero"),
        ("broken_base.one", "import nowhere", "family broken_base.one: cannot be imported (No module named 'nowhere')"),
        ("broken_base.one", "def", "family broken_base.one: its module raises SyntaxError: "),
        ("..llava", None, "family ..llava: "),
        ("llama", None, f"unknown family 'llama': expected one of {', '.join(known_families())}, or the dotted path"),
    ],
)
def test_a_module_that_cannot_be_imported_ends_in_one_line(name, text, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if text is not None:
        (tmp_path / "broken_base").mkdir()
        (tmp_path / "broken_base" / "one.py").write_text(text + "\n")
    for found in [found for found in sys.modules if found.startswith("broken_base")]:
        monkeypatch.delitem(sys.modules, found)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_family(name)
    assert "\n" not in str(caught.value)


def test_a_vision_folder_of_a_family_that_has_none_is_refused(bases, tmp_path):
    (tmp_path / "clip").mkdir()
    with pytest.raises(UserError, match=f"the family {TOY} has its vision tower in its own files; leave it out"):
        from_torch(TOY, bases[TOY], tmp_path / "base", tmp_path / "clip")


def test_base_json_and_the_config_may_name_it(bases):
    assert json.loads((bases[TOY] / "base.json").read_text())["family"] == TOY
