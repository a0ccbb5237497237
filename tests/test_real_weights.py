"""benchmarks/real_weights.sh from end to end on tiny models, and what it says of a model that differs."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import compare_stages, make_inputs
from benchmarks.stage_file import MOST, sample
from data_pipeline.common.errors import UserError
from tests.helpers import REFERENCE, without_hashes
from tests.test_llava import tiny_transformers

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_weights.sh"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference models in ../shared")


def script(*arguments: object, python: object = sys.executable) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, *arguments, f"--python={python}", "--limit=1e-4"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def verdicts(table: str) -> dict[str, str]:
    """Array -> "yes" or "NO"."""
    rows = [line.split() for line in table.splitlines() if line.endswith((" yes", " NO"))]
    return {row[0]: row[-1] for row in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run on a random LLaVA that transformers has written."""
    source, workdir = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("real_weights") / "work"
    tiny_transformers().save_pretrained(source)
    done = script("llava-1.5", workdir, f"--source={source}", "--frames=4")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_llava_built_here(finished):
    workdir, table = finished
    found = verdicts(table)
    assert set(found.values()) == {"yes"}
    stages = ("pixels", "clip_hidden_1", "patch_features", "mm_projected", "mean_over_time", "mlp_mean_over_space")
    outputs = ("video_tokens", "text_layer_1", "text_logits", "image_logits", "video_mlp_logits", "greedy_video")
    assert {*stages, *outputs} <= set(found)
    assert "not compared: clip_hidden_3\n" in table  # the layer that never runs
    assert (workdir / "table-4.txt").read_text() == table
    arrays = np.load(workdir / "torch-4.npz")
    assert len(set(arrays["greedy_video"][0].tolist())) > 1  # not one id over and over


@pytest.mark.slow
def test_a_changed_weight_shows_from_its_stage_on(finished, tmp_path, capsys):
    workdir, _ = finished
    base = without_hashes(shutil.copytree(workdir / "base", tmp_path / "base"))
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    code = compare_stages.main([f"--base={base}", f"--reference={workdir / 'torch-4.npz'}"])
    found = verdicts(capsys.readouterr().out)
    assert code == 1
    assert {name for name, verdict in found.items() if verdict == "NO"} >= {"text_layer_1", "text_logits"}
    assert found["video_tokens"] == found["text_layer_0"] == found["video_mlp_embeds"] == "yes"


@needs_reference
@pytest.mark.parametrize("form", ["orig_v1", pytest.param("hf", marks=pytest.mark.slow)])
def test_reference_llava(form, tmp_path):
    model = "llava-v1" if form == "orig_v1" else "llava-1.5"
    folder = REFERENCE / "llava_tiny"
    vision = [f"--vision={folder / 'clip'}"] if form == "orig_v1" else []
    done = script(model, tmp_path, f"--source={folder / form}", *vision)
    found = verdicts(done.stdout)
    assert done.returncode == 0, done.stderr
    assert len(found) == 20 and set(found.values()) == {"yes"}


@needs_reference
def test_reference_qwen_vl(tmp_path):
    """The arrays that the published model gave elsewhere serve as the dump."""
    folder = REFERENCE / "qwen_vl_tiny"
    done = script("qwen-vl", tmp_path, f"--source={folder / 'ckpt'}", f"--dump={folder / 'ref.npz'}")
    found = verdicts(done.stdout)
    assert done.returncode == 0, done.stderr
    assert len(found) == 18 and set(found.values()) == {"yes"}
    assert {"vit", "attn_pool_frame0", "align_mean_over_space_T9", "video_resample_logits", "greedy_text"} <= set(found)


@pytest.mark.parametrize("family", ["llava", "qwen_vl"])
def test_the_prompt_is_the_models_own(bases, family, tmp_path):
    make_inputs.main([f"--base={bases[family]}", f"--out={tmp_path / 'inputs.npz'}", "--frames=4"])
    inputs = np.load(tmp_path / "inputs.npz")
    base = make_inputs.open_base(bases[family])
    tokenizer = base.module.Tokenizer(bases[family])
    assert inputs["frames"].shape == (4, base.config.image_size, base.config.image_size, 3)
    assert not np.array_equal(inputs["frames"][0], inputs["frames"][3])
    assert make_inputs.QUESTION in tokenizer.decode(inputs["video_suffix_ids"][0].tolist())
    if family == "qwen_vl":
        ends = inputs["video_prefix_ids"][0, -1], inputs["video_suffix_ids"][0, 0]
        assert ends == (tokenizer.special("<img>"), tokenizer.special("</img>"))


def test_frames_must_be_a_square_number(bases, tmp_path):
    with pytest.raises(UserError, match="--frames is 8"):
        make_inputs.main([f"--base={bases['llava']}", f"--out={tmp_path / 'inputs.npz'}", "--frames=8"])


def test_large_arrays_are_thinned_out():
    large = np.arange(3 * MOST).reshape(3, -1)
    thin = sample(large)
    assert thin.ndim == 1 and 0.7 * MOST < thin.size <= MOST and (np.diff(thin) % 2 == 1).all()
    assert sample(large[:1]) is not None and sample(large[:1]).shape == (1, MOST)
    assert compare_stages.differences(large + 1.0, thin + 0.0) == (1.0, 1.0, 1.0)
    assert compare_stages.differences(large, thin[:-1]) == (np.inf, np.inf, np.inf)


def test_downloads_are_pinned(tmp_path):
    """`hf` is asked for the pinned commit, the one that came is recorded, and asked for the next time."""
    program = tmp_path / "bin"
    program.mkdir()
    for name, line in {
        "python": f'exec "{sys.executable}" "$@"',
        "hf": f'echo "$*" >>{tmp_path}/asked; mkdir -p "$6/.cache/huggingface/download"; '
        'echo abc123 >"$6/.cache/huggingface/download/config.json.metadata"',
    }.items():
        (program / name).write_text(f"#!/bin/bash\n{line}\n")
        (program / name).chmod(0o755)
    for _ in range(2):
        done = script("qwen-vl", tmp_path / "work", python=program / "python")
        assert done.returncode == 2 and "config.json: not found" in done.stderr  # nothing came
    asked = (tmp_path / "asked").read_text().splitlines()
    wanted = (
        f"--local-dir {tmp_path}/work/published --include *.json --include *.py --include *.tiktoken --include *.bin"
    )
    revisions = ("f57cfbd358cb56b710d963669ad1bcfb44cdcdd8", "abc123")
    assert asked == [f"download Qwen/Qwen-VL-Chat --revision {revision} {wanted}" for revision in revisions]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model"),
        (["llava"], "unknown model llava"),
        (["qwen-vl", "--frame=4"], "unknown option --frame=4"),
        (["qwen-vl", "--source=/nowhere"], "/nowhere: not a folder"),
        (["qwen-vl", "--dump=/nowhere"], "/nowhere: not a file"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    done = script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
