"""conversion.compare on tiny published folders: its table, what it says of a changed weight, and what it refuses."""

import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import nn

from conversion import compare, reference
from conversion.stage_file import MOST, NEW_TOKENS, ROWS, sample
from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import known_families
from tests.helpers import REFERENCE, without_hashes
from tests.test_llava import tiny_transformers
from tests.tiny_tokenizers import TEMPLATES, write_template, write_tokenizer

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference models in ../shared")


def verdicts(table: str) -> dict[str, str]:
    """Stage -> "yes" or "NO"."""
    rows = [line.split() for line in table.splitlines() if line.endswith((" yes", " NO"))]
    return {row[0]: row[-1] for row in rows}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random LLaVA that transformers has written, with a tokenizer and a chat template."""
    source = tmp_path_factory.mktemp("published")
    vocab = write_tokenizer("llama", source)
    write_template(TEMPLATES["vicuna"], source, "chat_template.json")
    tiny_transformers(vocab_size=vocab).save_pretrained(source)
    return source


@pytest.fixture(scope="module")
def finished(published, tmp_path_factory) -> tuple[Path, str]:
    """The base folder and the output of a comparison."""
    base, output = tmp_path_factory.mktemp("compared") / "base", io.StringIO()
    with contextlib.redirect_stdout(output):
        assert compare.main([f"--source={published}", f"--base={base}"]) == 0
    return base, output.getvalue()


def test_a_published_llava_agrees_at_every_stage(finished):
    _, table = finished
    found = verdicts(table)
    assert set(found.values()) == {"yes"}
    visual = ("encoder_embeds", "encoder_layer_1", "features", "pictures", "mean_over_time", "clip_tokens")
    stages = ("embeds", "layer_1", "logits", "greedy")
    assert {*visual, *(f"{row}_{stage}" for row in ROWS for stage in stages)} <= set(found)
    assert "not run here: encoder_layer_2\n" in table  # the layer above the feature layer
    assert table.endswith(f"{len(found)} stages compared, 0 over their limits\n")


OWN_CODE = ("qwen_vl",)  # families that run by their folder's code alone
TILES = ("llava_onevision", "smolvlm")  # whose tiny folders cut pictures


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in known_families() if family not in OWN_CODE])
def test_every_family_agrees_with_transformers(family, downloads, capsys):
    assert compare.main([f"--source={downloads[family]}", "--frames=1"]) == 0
    found = verdicts(capsys.readouterr().out)
    assert set(found.values()) == {"yes"} and len(found) > 20
    assert ("tiles_logits" in found) == (family in TILES)


def changed(base: Path, folder: Path, name: str) -> Path:
    """A copy of a base with another value in one tensor."""
    copy = without_hashes(shutil.copytree(base, folder / "base"))
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1e-2
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("language_model.model.layers.1.mlp.down_proj.weight", "text_layer_1"),
        ("multi_modal_projector.linear_1.weight", "pictures"),
        ("vision_tower.encoder.layers.1.mlp.fc2.bias", "encoder_layer_1"),
    ],
)
def test_a_changed_weight_shows_from_its_stage_on(name, first, published, finished, tmp_path, capsys):
    base = changed(finished[0], tmp_path, name)
    wanted = compare.run_reference(published, None, inputs_of(base), tmp_path, None, False)
    from conversion.stages import run_ours

    over = compare.print_table(run_ours(compare.open_base(base), inputs_of(base)), wanted, 1e-4)
    found = verdicts(capsys.readouterr().out)
    assert over == list(found.values()).count("NO") > 0
    wrong = [stage for stage, verdict in found.items() if verdict == "NO"]
    assert wrong[0] == first and wrong[-1].startswith("clip_") and "picture_logits" in wrong


@functools.cache
def inputs_of(base: Path) -> dict:
    return compare.make_inputs(compare.open_base(base), 4, tokenizer=True)


@pytest.mark.slow
def test_a_base_that_is_over_its_limit_ends_with_1(finished, capsys):
    """A base by itself, whose own files are the published ones."""
    assert compare.main([f"--base={finished[0]}", "--limit=1e-12"]) == 1
    found = verdicts(capsys.readouterr().out)
    assert found["pictures"] == "NO" and found["text_embeds"] == found["text_greedy"] == "yes"


def test_the_prompt_is_the_models_own(finished):
    base, inputs = compare.open_base(finished[0]), inputs_of(finished[0])
    tokenizer = base.module.Tokenizer(base.path)
    assert inputs["frames"].shape == (4, base.config.image_size, base.config.image_size, 3)
    assert not np.array_equal(inputs["frames"][0], inputs["frames"][3])
    assert tokenizer.decode(inputs["before_ids"][0].tolist()).startswith("USER:")
    assert f"{compare.QUESTION} ASSISTANT:" in tokenizer.decode(inputs["behind_ids"][0].tolist())


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("form", ["orig_v1", "hf"])
def test_llava_made_elsewhere(form, capsys):
    folder = REFERENCE / "llava_tiny"
    vision = folder / "clip" if form == "orig_v1" else None
    assert compare.compare(folder / form, None, vision=vision, tokenizer=False) == 0
    assert set(verdicts(capsys.readouterr().out).values()) == {"yes"}


@needs_reference
def test_code_of_the_folder_runs_only_when_it_is_trusted(tmp_path):
    source = REFERENCE / "qwen_vl_tiny" / "ckpt"
    with pytest.raises(UserError, match=r"runs with its own code alone.*--trust_remote_code"):
        compare.compare(source, tmp_path / "base", tokenizer=False)


class Layers(nn.Module):
    """Layers of an encoder; patches come before the batch."""

    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer, self.attn_pool, self.ln_post = Layers(), nn.Linear(3, 3), nn.LayerNorm(3)
        self.proj = nn.Parameter(torch.randn(3, 5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.transformer(pixels.flatten(2).permute(2, 0, 1)).transpose(0, 1)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class OwnCode(nn.Module):
    """A stand-in for the code that Qwen-VL's folder brings along, with what the comparison touches of it."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.visual, self.transformer.h = Visual(), nn.ModuleList([nn.Linear(5, 5)] * 3)
        self.transformer.wte, self.config = nn.Embedding(20, 5), SimpleNamespace(visual={"image_start_id": 10})

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.transformer.wte(input_ids)
        if (input_ids == 10).any():
            x[:, (input_ids[0] == 12).nonzero()[:, 0]] = self.transformer.visual.encode(["a path"])
        for layer in self.transformer.h:
            x = layer(x)
        return SimpleNamespace(logits=x @ self.transformer.wte.weight.T)


def test_code_of_the_folder_runs_when_it_is_trusted(tmp_path, monkeypatch):
    """Its own way to pictures: marks around them, and patches before the batch in the encoder."""
    torch.manual_seed(0)
    model = OwnCode()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda source, **options: model)
    (tmp_path / "config.json").write_text(json.dumps({"visual": {"image_start_id": 10}}))
    ids = {"text_ids": [[1, 2, 3]], "before_ids": [[4, 10]], "behind_ids": [[11, 5]]}
    inputs = {name: np.asarray(rows) for name, rows in ids.items()}
    inputs |= {"frames": np.random.default_rng(0).integers(0, 255, (4, 2, 2, 3), np.uint8)}
    inputs |= {"mean": np.zeros(3), "std": np.ones(3)}
    with pytest.raises(ValueError, match="own code alone"):
        reference.run_published(tmp_path, None, inputs)
    got = reference.run_published(tmp_path, None, inputs, trust_remote_code=True)
    assert got["encoder_layer_1"].shape == got["features"].shape == (4, 4, 3)
    assert np.array_equal(got["encoder_layer_1"], got["features"])
    assert got["pictures"].shape == (4, 4, 5) and got["clip_tokens"].shape == (8, 5)
    assert got["text_layer_2"].shape == (1, 3, 5) and got["clip_logits"].shape == (1, 12, 20)
    assert np.array_equal(got["picture_embeds"][:, 2:-2], got["pictures"][:1])
    assert got["clip_greedy"].shape == (1, NEW_TOKENS)


def test_another_python_runs_the_published_model(tmp_path):
    """Its arrays are read, and a failure ends in one line."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\n[[ $2 == conversion.reference ]] || exit 3\nexec {sys.executable} {tmp_path}/run.py $@\n"
    )
    python.chmod(0o755)
    (tmp_path / "run.py").write_text(
        "import sys, numpy as np\nflags = dict(arg[2:].split('=') for arg in sys.argv[3:] if '=' in arg)\n"
        "assert '--trust_remote_code' in sys.argv\n"
        "np.savez(flags['out'], features=2 * np.load(flags['inputs'])['x'])\n"
    )
    arguments = Path("source"), None, {"x": np.arange(3.0)}, tmp_path
    got = compare.run_reference(*arguments, str(python), True)
    assert got["features"].tolist() == [0, 2, 4]
    with pytest.raises(UserError, match="did not run under"):
        compare.run_reference(*arguments, str(python), False)


def test_mistakes_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--source or --base is needed"):
        compare.main([])
    with pytest.raises(UserError, match="--frames is 8"):
        compare.main([f"--source={tmp_path}", "--frames=8"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="model_type qwen2_vl: it is trained on video already"):
        compare.main([f"--source={tmp_path}"])


def test_stages_that_one_side_lacks_are_named(capsys):
    arrays = {"a": np.ones(2, np.float32), "b": np.zeros(3, np.float32)}
    assert compare.print_table({"a": arrays["a"]}, arrays, 1e-4) == 0
    assert "not run here: b\n" in capsys.readouterr().out
    assert compare.print_table(arrays, {"a": arrays["a"]}, 1e-4) == 1
    assert "not in the published model: b\n" in capsys.readouterr().out


def test_large_arrays_are_thinned_out():
    large = np.arange(3 * MOST).reshape(3, -1)
    thin = sample(large)
    assert thin.ndim == 1 and 0.7 * MOST < thin.size <= MOST and (np.diff(thin) % 2 == 1).all()
    assert sample(large[:1]).shape == (1, MOST)


def test_differences():
    ones = np.ones(3, np.float32)
    assert compare.differences(ones, ones) == (0, 0, 0)
    assert compare.differences(ones[:2], ones) == (np.inf,) * 3
    assert compare.differences(np.array([1, 2]), np.array([1, 3])) == (1, 1, 1)
    largest, mean, relative = compare.differences(np.array([10.0, 0.0]), np.array([11.0, 0.0]))
    assert (largest, mean) == (1, 0.5) and relative == pytest.approx(1 / 11)
    small = compare.differences(np.array([1e-6, 1e-6]), np.array([1e-6, 2e-6]))  # whatever the size of a stage
    assert small[2] == pytest.approx(0.5)
    zeros = np.zeros(2, np.float32)
    assert compare.differences(zeros, zeros)[2] == 0 and compare.differences(zeros + 1e-9, zeros)[2] > 1
    assert np.isnan(compare.differences(ones * np.nan, ones)[2])
