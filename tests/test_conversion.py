"""from_torch and to_torch: every published form there and back bit for bit, and every mistake in one line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs import demo
from conversion import names
from conversion.from_torch import from_torch
from conversion.from_torch import main as from_torch_command
from conversion.to_torch import method_fields, to_torch
from data_pipeline.common.errors import UserError
from redvillm_jax.bases import llava
from redvillm_jax.bases.contract import known_families, load_family
from redvillm_jax.demo.tokenizers import write_llama_tokenizer
from redvillm_jax.model.base_folder import canonical_name, load_part, open_base
from redvillm_jax.model.settings import ANSWERING, plain_config
from redvillm_jax.model.weights import expected_tensors, name_table
from redvillm_jax.training import checkpoint
from redvillm_jax.video import red_villm
from tests.helpers import REFERENCE

REPOSITORY = Path(__file__).parents[1]

# ---- published folders, read and written with torch alone


def load_published(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def assert_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


TINY = dataclasses.replace(
    llava.SIZES["tiny"],
    vision_hidden_size=32,
    vision_intermediate_size=64,
    vocab_size=592,
    hidden_size=16,
    head_dim=4,
    intermediate_size=24,
)


def random_tensors(config: llava.Config, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Everything that a LLaVA of this config is published with, under transformers 5's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: leaf.shape for name, leaf in expected_tensors(llava, config).items()} | llava.unused(config)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def hf_config(config: llava.Config) -> dict:
    return {
        "model_type": "llava",
        "text_config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "rms_norm_eps": config.rms_norm_eps,
        },
        "vision_config": clip_config(config),
        "system_prompt": "",
    }


def clip_config(config: llava.Config) -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size,
        "num_hidden_layers": config.vision_num_hidden_layers,
        "num_attention_heads": config.vision_num_attention_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def original_config(config: llava.Config) -> dict:
    own = {"mm_hidden_size": config.vision_hidden_size, "mm_projector_type": config.projector, "system_prompt": ""}
    own |= {"image_aspect_ratio": "square" if config.projector == "linear" else "pad"}
    return hf_config(config)["text_config"] | own | {"model_type": "llava_llama"}


def original_name(name: str) -> str:
    for new, old in (
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear.", "model.mm_projector."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("language_model.", ""),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def write(folder: Path, config: dict, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A published folder: config.json, a tokenizer, weights; several files get an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_llama_tokenizer(folder)
    (folder / "modeling_x.py").write_text("raise SystemExit")
    for name, tensors in files.items():
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, folder / name)
    if len(files) > 1 and "mm_projector.bin" not in files:
        kind = "model.safetensors" if name.endswith(".safetensors") else "pytorch_model.bin"
        weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def halves(tensors: dict, name: str, suffix: str) -> dict[str, dict]:
    items = list(tensors.items())
    parts = items[: len(items) // 2], items[len(items) // 2 :]
    return {f"{name}-{i:05}-of-00002.{suffix}": dict(part) for i, part in enumerate(parts, 1)}


def write_hf(folder: Path, config: llava.Config = TINY, dtype: torch.dtype = torch.float32) -> Path:
    return write(folder, hf_config(config), {"model.safetensors": random_tensors(config, dtype)})


def write_v1(folder: Path, dtype: torch.dtype = torch.float16) -> tuple[Path, Path]:
    """Original LLaVA v1, two .bin shards with rotary buffers, and a complete CLIP beside it."""
    config = dataclasses.replace(TINY, projector="linear")
    tensors = random_tensors(config, dtype)
    clip = {name.replace("vision_tower.", "vision_model."): t for name, t in tensors.items() if "vision_tower" in name}
    clip |= {"logit_scale": torch.tensor(2.5), "text_model.final_layer_norm.weight": torch.ones(4)}
    clip |= {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    own = {original_name(name): tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    own |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(2)}
    source = write(folder / "v1", original_config(config), halves(own, "pytorch_model", "bin"))
    vision = {"model_type": "clip", "vision_config": clip_config(config)}
    return source, write(folder / "clip", vision, {"pytorch_model.bin": clip})


def write_v15(folder: Path, *, old_format: bool = False, own_projector: bool = False) -> Path:
    """Original LLaVA v1.5 in bf16 with its vision tower, in one .bin file or with its projector apart."""
    tensors = {original_name(name): t for name, t in random_tensors(TINY, torch.bfloat16).items()}
    projector = {name: tensors.pop(name) for name in list(tensors) if own_projector and "mm_projector" in name}
    write(folder, original_config(TINY), {"pytorch_model.bin": tensors})
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(clip_config(TINY)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "vision"}))
    if old_format:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    if projector:
        torch.save(projector, folder / "mm_projector.bin")
    return folder


# ---- there and back


def round_trip(family: str, source: Path, tmp_path: Path, vision: Path | None = None, **options) -> dict:
    """Converts there and back, compares every bit, converts the export once more; returns base.json."""
    meta = from_torch(family, source, tmp_path / "base", vision, **options)
    to_torch(tmp_path / "base", tmp_path / "export", full=True)
    assert_same_bits(load_published(tmp_path / "export"), load_published(source))
    config = json.loads((source / "config.json").read_text())
    if vision and list((tmp_path / "export" / "vision").glob("*.safetensors")):
        assert_same_bits(load_published(tmp_path / "export" / "vision"), load_published(vision))
    if (tmp_path / "export" / "vision").is_dir():
        config["mm_vision_tower"] = "vision"
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == config
    again = from_torch(family, tmp_path / "export", tmp_path / "again", **options)
    assert again["fingerprint"] == meta["fingerprint"]
    return meta


@pytest.mark.parametrize(
    ("family", "form", "vision", "parameters"),
    [
        ("llava", "llava_tiny/hf", None, 563_072),
        ("llava", "llava_tiny/hf4", None, 563_072),
        ("llava", "llava_tiny/orig_v15", "llava_tiny/clip", 563_072),
        ("llava", "llava_tiny/orig_v1", "llava_tiny/clip", 546_560),
        ("llava", "llava_tiny/orig_v1_fp16", "llava_tiny/clip", 546_560),
        ("qwen_vl", "qwen_vl_tiny/ckpt", None, 1_639_286),
        ("qwen_vl", "qwen_vl_tiny/ckpt_bf16", None, 1_639_286),
    ],
)
def test_reference_forms_round_trip(family, form, vision, parameters, tmp_path):
    if not REFERENCE.is_dir():
        pytest.skip("needs the reference checkpoints in ../shared")
    clip = REFERENCE / vision if vision else None
    meta = round_trip(family, REFERENCE / form, tmp_path, clip, tokenizer=False)  # they come without one
    assert meta["parameters"] == parameters


def test_reference_forms_of_one_model_share_their_fingerprint(tmp_path):
    if not REFERENCE.is_dir():
        pytest.skip("needs the reference checkpoints in ../shared")
    folder, clips = REFERENCE / "llava_tiny", {"hf": None, "hf4": None, "orig_v15": REFERENCE / "llava_tiny" / "clip"}
    metas = [from_torch("llava", folder / f, tmp_path / f, clip, tokenizer=False) for f, clip in clips.items()]
    assert len({meta["fingerprint"] for meta in metas}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_round_trip(dtype, tmp_path):
    meta = round_trip("llava", write_hf(tmp_path / "hf", dtype=dtype), tmp_path)
    assert meta["dtypes"] == {str(dtype).removeprefix("torch."): meta["tensors"]}
    name = "tokenizer.json"
    assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not (tmp_path / "export" / "modeling_x.py").exists()


def test_v1_with_a_complete_clip_round_trips(tmp_path):
    source, clip = write_v1(tmp_path)
    meta = round_trip("llava", source, tmp_path, clip)
    assert meta["tensors_not_loaded"] == 18 + 3 + 1  # last CLIP layer and post-norm; the text half; a buffer
    base = open_base(tmp_path / "base")
    assert base.config.projector == "linear" and base.config.image_size == TINY.image_size
    assert base.tensors["logit_scale"].get_dtype() == "F32"


def test_the_clip_that_a_config_names_is_not_opened_as_a_path(tmp_path):
    source, _ = write_v1(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "../clip"}))
    with pytest.raises(UserError, match=r'mm_vision_tower is "\.\./clip", supported: .* given by --vision'):
        from_torch("llava", source, tmp_path / "base")


@pytest.mark.parametrize("options", [{}, {"old_format": True}, {"own_projector": True}])
def test_v15_with_its_tower_round_trips(options, tmp_path):
    round_trip("llava", write_v15(tmp_path / "v15", **options), tmp_path)


def test_what_transformers_saves_round_trips_and_opens_there_again(tmp_path):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(image_token_index=500, **{k: hf_config(TINY)[k] for k in ("text_config", "vision_config")})
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    write_llama_tokenizer(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    meta = round_trip("llava", tmp_path / "hf", tmp_path)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "export", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_bits(loaded.state_dict(), model.state_dict())

    (tmp_path / "state").mkdir()
    torch.save(model.state_dict(), tmp_path / "state" / "pytorch_model.bin")  # its names in memory differ
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "state")
    write_llama_tokenizer(tmp_path / "state")
    assert from_torch("llava", tmp_path / "state", tmp_path / "base2")["fingerprint"] == meta["fingerprint"]


def test_a_base_loads_what_was_published(tmp_path):
    """Stacked layers included, each under the name it was published with."""
    source, clip = write_v1(tmp_path)
    from_torch("llava", source, tmp_path / "base", clip)
    published = load_published(source) | load_published(clip)
    published = {canonical_name(llava, name): tensor for name, tensor in published.items()}
    base = open_base(tmp_path / "base")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for part, prefix in llava.PREFIX.items():
        module = load_part(base, part, dtype=jnp.float32, sharding=lambda *args: here)
        loaded = dict(nnx.to_flat_state(nnx.state(module)))
        for name, leaf in name_table(module, prefix).items():
            array = loaded[leaf.path][...]
            array = array if leaf.layer is None else array[leaf.layer]
            np.testing.assert_array_equal(array, published[name].float().numpy(), err_msg=name)


def test_fingerprint_sees_one_bit_and_the_dtype_but_not_the_container(tmp_path):
    tensors = random_tensors(TINY)
    flipped = tensors | {
        "language_model.model.norm.weight": torch.nextafter(
            tensors["language_model.model.norm.weight"], torch.tensor(9.0)
        )
    }
    unused = "vision_tower.post_layernorm.bias"
    half = {name: tensor.half() for name, tensor in tensors.items()}
    files = {
        "one": {"model.safetensors": tensors},
        "two": halves(tensors, "model", "safetensors"),
        "bin": halves(tensors, "pytorch_model", "bin"),
        "unused": {"model.safetensors": tensors | {unused: tensors[unused] + 1}},
        "flipped": {"model.safetensors": flipped},
        "half": {"model.safetensors": half},
    }
    found = {}
    for form, parts in files.items():
        source = write(tmp_path / form, hf_config(TINY), parts)
        found[form] = from_torch("llava", source, tmp_path / f"{form}_base")["fingerprint"]
    assert found["one"] == found["two"] == found["bin"] == found["unused"]
    assert len({found["one"], found["flipped"], found["half"]}) == 3


# ---- shards and whole folders


def test_shards_stay_below_their_limit_and_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    arrays = {f"t{i}": np.full((100, i + 1), i, [np.float32, np.float16][i % 2]) for i in range(8)}
    arrays["t7"] = np.arange(800, dtype=np.float16).reshape(8, 100).T  # not as it lies in memory
    held, seen, save_file = [], [], names.save_file

    def lazy(name: str) -> names.Tensor:
        def read() -> np.ndarray:
            held.append(name)
            return arrays[name]

        return names.Tensor(arrays[name].shape, arrays[name].dtype, read)

    def save(tensors, *args, **kwargs):
        assert list(tensors) == held
        save_file(tensors, *args, **kwargs)
        held.clear()

    monkeypatch.setattr(names, "save_file", save)
    tensors = {name: lazy(name) for name in arrays}
    names.write_shards(tmp_path, tensors, lambda name, array: seen.append(name), shard_bytes=3000)
    assert seen == list(arrays) and not held
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        file = tmp_path / index["weight_map"][name]
        assert safe_open(file, framework="numpy").metadata() == {"format": "pt"}
        np.testing.assert_array_equal(load_file(file)[name].numpy(), array)
        held = sum(arrays[other].nbytes for other, where in index["weight_map"].items() if where == file.name)
        assert held <= 3000 or held == array.nbytes


def test_a_rerun_does_nothing_and_an_interrupted_one_leaves_nothing(tmp_path, monkeypatch, capsys):
    source, out = write_hf(tmp_path / "hf"), tmp_path / "base"
    with monkeypatch.context() as patch:
        patch.setattr("conversion.from_torch.describe", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            from_torch("llava", source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    theirs = [tmp_path / name for name in ("base.partial", "base.mine.tmp", "base.tmp")]
    for folder in theirs:
        folder.mkdir()
        (folder / "thesis.tex").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("conversion.from_torch.describe", lambda *args: 1 / 0)
        patch.setattr(names.shutil, "rmtree", lambda *args, **kwargs: None)  # as if it were killed
        for name in ("base", "base.v2"):
            with pytest.raises(ZeroDivisionError):
                from_torch("llava", source, tmp_path / name)
    others = list(tmp_path.glob("base.v2.*.tmp"))  # another run may be writing that
    assert len(others) == 1 and len(list(tmp_path.glob("base.*.tmp"))) == 3
    meta = from_torch("llava", source, out)
    assert sorted(tmp_path.iterdir()) == sorted([source, out, *theirs, *others])
    assert all((folder / "thesis.tex").read_text() == "x" for folder in theirs)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert from_torch("llava", source, out) == meta
    assert "already whole" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_commands(tmp_path):
    def command(module: str, *args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", module, *args], cwd=REPOSITORY, capture_output=True, text=True)

    source, clip = write_v1(tmp_path)
    base, export = f"{tmp_path}/base", f"{tmp_path}/export"
    made = command("conversion.from_torch", "--family=llava", f"--source={source}", f"--vision={clip}", f"--out={base}")
    assert made.returncode == 0 and "llava base" in made.stdout, made.stderr
    back = command("conversion.to_torch", f"--model={base}", f"--out={export}", "--full")
    assert back.returncode == 0, back.stderr
    assert_same_bits(load_published(Path(export)), load_published(source))
    wrong = command("conversion.to_torch", f"--model={source}", f"--out={tmp_path}/x")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert wrong.stderr.startswith(f"error: {source}: neither a base folder")


# ---- exports


def test_projectors_of_a_base(tmp_path):
    source, clip = write_v1(tmp_path)
    from_torch("llava", source, tmp_path / "base", clip)
    to_torch(tmp_path / "base", tmp_path / "export")
    got = load_file(tmp_path / "export" / "projectors.safetensors")
    assert_same_bits(got, {name: t for name, t in load_published(source).items() if "mm_projector" in name})


def write_run(run: Path, base: Path, trained: dict, fingerprint: str | None = None) -> Path:
    """A run directory as training leaves it: config.json and one checkpoint."""
    config = plain_config(demo.get_config("llava")) | {"base": str(base), "num_frames": 9}
    for younger in ("sampling", "int8"):  # a run of before these fields
        del config[younger]
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    state = {"trainable": jax.tree.map(jnp.asarray, trained), "optimizer": {"count": jnp.zeros(())}}
    with checkpoint.open_checkpoints(run, keep=1) as checkpoints:
        checkpoint.save(
            checkpoints,
            3,
            state,
            config=config,
            identity={"base": fingerprint or open_base(base).fingerprint, "data": ""},
        )
    return run


def test_projectors_of_a_run(tmp_path):
    from_torch("llava", write_v15(tmp_path / "v15"), tmp_path / "base")
    shapes = {"linear_1": ((16, 32), (16,)), "linear_2": ((16, 16), (16,))}
    rng = np.random.default_rng(0)

    def projector() -> dict:
        return {
            k: {"weight": rng.normal(size=w).astype("f"), "bias": rng.normal(size=b).astype("f")}
            for k, (w, b) in shapes.items()
        }

    extra = {"fc1": {"weight": rng.normal(size=(16, 16)).astype("f")}}
    trained = {"spatial": projector(), "temporal": projector(), "extra_mlp_temporal": extra}
    run = write_run(tmp_path / "run", tmp_path / "base", trained)
    meta = to_torch(run, tmp_path / "export")
    want = {"extra_mlp_temporal.fc1.weight": extra["fc1"]["weight"]}
    for prefix, group in (("model.mm_projector.", "spatial"), ("temporal_module.", "temporal")):
        for torch_layer, layer in (("0", "linear_1"), ("2", "linear_2")):
            for leaf, array in trained[group][layer].items():
                want[f"{prefix}{torch_layer}.{leaf}"] = array
    want = {name: torch.from_numpy(array) for name, array in want.items()}
    assert_same_bits(load_file(tmp_path / "export" / "projectors.safetensors"), want)
    config = plain_config(demo.get_config("llava")) | {"num_frames": 9, "sampling": "uniform", "int8": False}
    assert meta["method"] == {name: config[name] for name in method_fields(config)} and meta["trained"]
    assert json.loads((tmp_path / "export" / "redvillm.json").read_text())["family"] == "llava"

    to_torch(run, tmp_path / "full", full=True)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in want.items()}
    assert_same_bits(load_published(tmp_path / "full"), load_published(tmp_path / "v15") | rounded)
    again = from_torch("llava", tmp_path / "full", tmp_path / "again")
    assert again["tensors"] == len(load_published(tmp_path / "full"))
    to_torch(tmp_path / "again", tmp_path / "projectors_again")
    assert_same_bits(load_file(tmp_path / "projectors_again" / "projectors.safetensors"), rounded)
    said = json.loads((tmp_path / "projectors_again" / "redvillm.json").read_text())
    assert said.pop("files").keys() == meta.pop("files").keys() == {"projectors.safetensors"}
    assert said.pop("checksum") != meta.pop("checksum")
    assert said == json.loads(json.dumps(meta))


def test_an_export_says_every_switch_that_answering_needs():
    for family in known_families():
        config = plain_config(demo.get_config(family))
        needed = {*red_villm.FIELDS, *load_family(family).PROJECTOR_OPTIONS, *ANSWERING} - {"seed"}
        assert needed <= set(method_fields(config))


def test_what_a_run_did_not_train_is_the_base_s(tmp_path):
    source = write_v15(tmp_path / "v15")
    from_torch("llava", source, tmp_path / "base")
    run = write_run(tmp_path / "run", tmp_path / "base", {"temporal": {"linear_1": {"bias": np.ones(16, "f")}}})
    to_torch(run, tmp_path / "export")
    published = load_published(source)
    got = load_file(tmp_path / "export" / "projectors.safetensors")
    assert torch.equal(got["temporal_module.0.bias"], torch.ones(16))
    for name, leaf in (("temporal_module.2.weight", "2.weight"), ("model.mm_projector.0.bias", "0.bias")):
        assert torch.equal(got[name], published[f"model.mm_projector.{leaf}"].float())


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    from_torch("llava", write_hf(tmp_path / "hf"), tmp_path / "base")
    to_torch(tmp_path / "base", tmp_path / "export")
    to_torch(tmp_path / "base", tmp_path / "export", full=True)
    assert not (tmp_path / "export" / "projectors.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "export", "hf"]
    whole = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
    for name in ("thesis.tex", "empty/"):
        mine = tmp_path / "export" / name
        mine.mkdir() if name.endswith("/") else mine.write_text("x")
        with pytest.raises(UserError, match=f"export: holds {mine.name} beside an earlier export"):
            to_torch(tmp_path / "base", tmp_path / "export")
        assert mine.exists()
        mine.rmdir() if name.endswith("/") else mine.unlink()
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.to_torch.write_safetensors", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_torch(tmp_path / "base", tmp_path / "export")
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == whole
    for taken in (tmp_path / "hf", tmp_path / "base"):
        with pytest.raises(UserError, match="not empty, and not written by this command"):
            to_torch(tmp_path / "base", taken)
        assert (taken / "model.safetensors").is_file()
    with pytest.raises(UserError, match="the run was trained on abc"):
        trained = {"temporal": {"linear_1": {"bias": np.ones(16, "f")}}}
        run = write_run(tmp_path / "run", tmp_path / "base", trained, fingerprint="abc")
        to_torch(run, tmp_path / "x")


# ---- mistakes


def changed(change) -> dict:
    tensors = random_tensors(TINY)
    change(tensors)
    return {"model.safetensors": tensors}


def test_all_tensors_that_do_not_fit_are_in_one_line(tmp_path):
    def change(tensors):
        del tensors["language_model.lm_head.weight"], tensors["vision_tower.pre_layrnorm.bias"]
        tensors["language_model.model.norm.weight"] = torch.ones(17)
        tensors["vision_tower.post_layernorm.bias"] = torch.ones(5)  # unused, but it must be what it says it is
        tensors |= {f"language_model.model.layers.{i}.mlp.up_proj.lora_A": torch.ones(2) for i in range(30)}
        tensors["vision_tower.vision_model.pre_layrnorm.weight"] = tensors["vision_tower.pre_layrnorm.weight"] + 1

    source = write(tmp_path / "hf", hf_config(TINY), changed(change))
    with pytest.raises(UserError) as caught:
        from_torch("llava", source, tmp_path / "base")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        f"{source}: tensors do not fit its config.json: 2 missing: ",
        "vision_tower.pre_layrnorm.bias",
        "language_model.lm_head.weight",
        "2 wrong shape: ",
        "language_model.model.norm.weight (17,) should be (16,)",
        "vision_tower.post_layernorm.bias (5,) should be (32,)",
        "30 unknown: language_model.model.layers.0.mlp.up_proj.lora_A, ",
        "… and 10 more",
        "1 twice: vision_tower.pre_layrnorm.weight = vision_tower.vision_model.pre_layrnorm.weight",
    ):
        assert part in message, message
    assert not (tmp_path / "base").exists()


def v1_without_clip(tmp_path):
    source, _ = write_v1(tmp_path)
    return {"source": source}


def v1_without_named_clip(tmp_path):
    source, _ = write_v1(tmp_path)
    config = json.loads((source / "config.json").read_text())
    own = {"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}
    (source / "config.json").write_text(json.dumps(config | own))
    return {"source": source}


def v1_with(config: dict | None = None, **clip_changes):
    def make(tmp_path):
        source, clip = write_v1(tmp_path)
        published = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(published | (config or {})))
        vision = clip_config(TINY) | clip_changes
        (clip / "config.json").write_text(json.dumps({"vision_config": vision}))
        return {"source": source, "vision": clip}

    return make


def delta(tmp_path):
    return {"source": write_hf(tmp_path / "LLaVA-Lightning-7B-delta-v1-1")}


def delta_in_hub_cache(tmp_path):
    return {"source": write_hf(tmp_path / "models--liuhaotian--LLaVA-13b-delta-v0" / "snapshots" / "0a1b")}


def missing_shard(tmp_path):
    source = write(tmp_path / "hf", hf_config(TINY), halves(random_tensors(TINY), "model", "safetensors"))
    (source / "model-00002-of-00002.safetensors").unlink()
    return {"source": source}


def truncated(name: str):
    def make(tmp_path):
        source = write(tmp_path / "hf", hf_config(TINY), {name: random_tensors(TINY)})
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[: len(content) // 2])
        return {"source": source}

    return make


def git_lfs_pointer(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    return {"source": source}


def without_weights(tmp_path):
    return {"source": write(tmp_path / "hf", hf_config(TINY), {})}


def without_config(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "config.json").unlink()
    return {"source": source}


def training_checkpoint(tmp_path):
    source = write_v15(tmp_path / "v15")
    torch.save({"state_dict": {}, "step": 3}, source / "pytorch_model.bin")
    return {"source": source}


def index_of(weight_map):
    def make(tmp_path):
        source = write_hf(tmp_path / "hf")
        (source / "model.safetensors.index.json").write_text(json.dumps(weight_map))
        return {"source": source}

    return make


def outside(shard: str):
    """An index whose first shard lies elsewhere, where it can be read."""

    def make(tmp_path):
        parts = halves(random_tensors(TINY), "model", "safetensors")
        source = write(tmp_path / "hf", hf_config(TINY), parts)
        index = source / "model.safetensors.index.json"
        first = next(iter(parts))
        shutil.copy(source / first, tmp_path / first)
        name = shard.format(folder=tmp_path, first=first)
        index.write_text(index.read_text().replace(first, name))
        return {"source": source}

    return make


def config_is(text: str):
    def make(tmp_path):
        source = write_hf(tmp_path / "hf")
        (source / "config.json").write_text(text)
        return {"source": source}

    return make


def link(name: str, target: str):
    """The published folder with a link in place of one of its files."""

    def make(tmp_path):
        source = write_hf(tmp_path / "hf")
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(target)
        return {"source": source}

    return make


def circular_source(tmp_path):
    (tmp_path / "hf").symlink_to(tmp_path / "hf")
    return {"source": tmp_path / "hf"}


def folder_for_a_file(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    return {"source": source}


def tensor_is(change, name: str = "language_model.model.norm.weight"):
    """The model in a .bin file, one of its tensors changed."""

    def make(tmp_path):
        tensors = random_tensors(TINY)
        return {
            "source": write(
                tmp_path / "hf", hf_config(TINY), {"pytorch_model.bin": tensors | {name: change(tensors[name])}}
            )
        }

    return make


def tokenizer_is(change):
    def make(tmp_path):
        source = write_hf(tmp_path / "hf")
        change(source)
        return {"source": source}

    return make


def without_tokenizer(source):
    for file in source.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(source):
    (source / "tokenizer.json").write_text("{")


def larger_tokenizer(source):
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] += [dict(content["added_tokens"][-1], id=600 + i, content=f"<{i}>") for i in range(9)]
    file.write_text(json.dumps(content))


def missing_marker(tmp_path):
    return v1_with({"mm_use_im_start_end": True})(tmp_path)


def foreign_out(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.tex").write_text("x")
    return {"source": write_hf(tmp_path / "hf")}


def other_base_there(tmp_path):
    from_torch("llava", write_hf(tmp_path / "other"), tmp_path / "base")
    return {"source": write_hf(tmp_path / "hf")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: {"source": tmp_path / "nothing"}, "nothing: not found; --source takes"),
        (without_config, r"config\.json: not found"),
        (without_weights, r"no \*\.safetensors and no pytorch_model\*\.bin"),
        (missing_shard, r"index\.json names files that are missing: model-00002-of-00002\.safetensors"),
        (truncated("model.safetensors"), r"model\.safetensors: not a readable safetensors file"),
        (truncated("pytorch_model.bin"), r"pytorch_model\.bin: not a readable PyTorch file"),
        (git_lfs_pointer, "Git LFS pointer"),
        (training_checkpoint, "not a state dict of tensors"),
        (delta, "delta weights.*apply_delta.*mmaaz60/LLaVA-7B-Lightening-v1-1"),
        (delta_in_hub_cache, "models--liuhaotian--LLaVA-13b-delta-v0 holds delta weights"),
        (v1_without_clip, 'mm_vision_tower is "", supported: .*--vision'),
        (v1_without_named_clip, "missing: vision_tower.*no vision tower.*openai/clip-vit-large-patch14 .*--vision"),
        (v1_with(hidden_size=64), "a CLIP with hidden_size 64, but .* was trained with 32"),
        (v1_with({"mm_vision_tower": "openai/clip-vit-large-patch8-48"}), "image_size 32, but .* with 48"),
        (v1_with(image_size=48), r"position_embedding.weight \(17, 32\) should be \(37, 32\)"),
        (
            lambda tmp_path: {"source": write_hf(tmp_path / "hf"), "vision": tmp_path / "no"},
            "no: not found; --vision takes",
        ),
        (lambda tmp_path: {"source": write_hf(tmp_path / "hf"), "family": "blip"}, "unknown family 'blip'"),
        (index_of([]), r"index\.json: expected a JSON object, found list"),
        (index_of(None), r"index\.json: expected a JSON object, found NoneType"),
        (index_of({"weight_map": ["model.safetensors"]}), "no weight_map in it"),
        (index_of({"weight_map": {"x": 3}}), "x is in 3, expected the name of a"),
        (index_of({"weight_map": {"x": "config.json"}}), "x is in 'config.json', expected the name of a"),
        (outside("../{first}"), r"is in '\.\./model-00001-of-00002\.safetensors', expected the name of a .* beside"),
        (outside("{folder}/{first}"), "is in '/.*/model-00001-of-00002.safetensors', expected the name of a .* beside"),
        (config_is("[]"), r"config\.json: expected a JSON object, found list"),
        (config_is("null"), r"config\.json: expected a JSON object, found NoneType"),
        (config_is("{"), r"config\.json: not valid JSON"),
        (config_is("[" * 200_000), r"config\.json: not valid JSON"),
        (folder_for_a_file, r"config\.json: not a file"),
        (link("config.json", "../blobs/0a1b"), r"config\.json: a link to \.\./blobs/0a1b, which is not there"),
        (link("config.json", "config.json"), r"config\.json: a link that leads back to itself"),
        (link("model.safetensors", "gone"), r"model\.safetensors: a link to gone, which is not there"),
        (link("model.safetensors", "model.safetensors"), "model.safetensors: a link that leads back to itself"),
        (link("tokenizer.json", "gone"), r"tokenizer\.json: a link to gone, which is not there"),
        (circular_source, "hf: a link that leads back to itself; --source takes the folder"),
        (tensor_is(lambda t: t.to_sparse()), "norm.weight is a sparse_coo tensor, expected a dense one"),
        (tensor_is(lambda t: t.to("meta")), "norm.weight is a meta tensor, expected a dense one"),
        (tensor_is(lambda t: t.to(torch.int8)), r"1 not floating point: language_model\.model\.norm\.weight int8"),
        (tensor_is(lambda t: t > 0), r"1 not floating point: language_model\.model\.norm\.weight bool"),
        (
            tensor_is(lambda t: t.index_fill(0, torch.tensor(3), torch.nan)),
            "norm.weight has 1 values of 16 that are NaN",
        ),
        (tensor_is(lambda t: t.half() / 0), "norm.weight has 16 values of 16 that are NaN or infinite"),
        (tokenizer_is(without_tokenizer), "no tokenizer that can be read.*--without_tokenizer"),
        (tokenizer_is(broken_tokenizer), "no tokenizer that can be read.*--without_tokenizer"),
        (tokenizer_is(larger_tokenizer), "its tokenizer has 596 tokens, vocab_size in config.json is 592"),
        (missing_marker, "its tokenizer has no <im_start>"),
        (foreign_out, "not empty, and not written by this command"),
        (other_base_there, "holds a llava base made from .*other; choose another --out"),
    ],
)
def test_mistakes_end_in_one_line(make, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        from_torch(**{"family": "llava", "out": tmp_path / "base"} | make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*base.*"))


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_pickle_runs(tmp_path):
    ran = tmp_path / "ran"
    tensors = random_tensors(TINY) | {"language_model.model.norm.weight": Touch(ran)}
    source = write(tmp_path / "hf", hf_config(TINY), {"pytorch_model.bin": tensors})
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable PyTorch file"):
        from_torch("llava", source, tmp_path / "base")
    assert not ran.exists()


def test_links_are_followed(tmp_path):
    """A hub cache holds nothing but links to files of other names."""
    source = write_hf(tmp_path / "hf")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0a1b", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    from_torch("llava", snapshot, tmp_path / "base")
    assert not any(file.is_symlink() for file in (tmp_path / "base").iterdir())
    assert_same_bits(load_published(tmp_path / "base"), load_published(snapshot))


def test_integers_that_a_base_does_not_load_are_kept(tmp_path):
    name = "vision_tower.embeddings.position_ids"
    tensors = random_tensors(TINY) | {name: torch.arange(17)[None]}
    from_torch("llava", write(tmp_path / "hf", hf_config(TINY), {"model.safetensors": tensors}), tmp_path / "base")
    assert load_published(tmp_path / "base")[name].dtype == torch.int64


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
    name = "vision_tower.embeddings.position_ids"
    tensors = random_tensors(TINY) | {name: torch.zeros(3, dtype=torch.float8_e4m3fn)}
    for file, dtype in (("model.safetensors", "F8_E4M3"), ("pytorch_model.bin", "float8_e4m3fn")):
        source = write(tmp_path / dtype, hf_config(TINY), {file: tensors})
        with pytest.raises(UserError, match=f"{file}: {name} has dtype {dtype}, expected one of (F64|float64), "):
            from_torch("llava", source, tmp_path / "base")


def test_weights_alone_make_a_base_that_says_what_it_lacks(tmp_path):
    source = tokenizer_is(without_tokenizer)(tmp_path)["source"]
    flags = ["--family=llava", f"--source={source}", f"--out={tmp_path / 'base'}"]
    from_torch_command([*flags, "--without_tokenizer"])
    base = open_base(tmp_path / "base")
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        base.module.Tokenizer(base.path)


def test_pictures_of_a_qwen_vl_begin_where_its_tokenizer_says(bases, tmp_path):
    source = shutil.copytree(bases["qwen_vl"], tmp_path / "source")
    (source / "base.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config["visual"]["image_start_id"] -= 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"visual\.image_start_id is 810, supported: 811, the id of <img>"):
        from_torch("qwen_vl", source, tmp_path / "base")
    lines = (source / "qwen.tiktoken").read_text().splitlines()
    for cut in (lines[:100], [*lines[:-1], lines[-2]], []):
        (source / "qwen.tiktoken").write_text("\n".join(cut))
        with pytest.raises(UserError, match=r"qwen\.tiktoken: expected each rank from 0 on once"):
            from_torch("qwen_vl", source, tmp_path / "base")


def test_the_wrong_family_is_named(tmp_path):
    with pytest.raises(UserError, match="model_type is 'llava'; it looks like --family=llava"):
        from_torch("qwen_vl", write_hf(tmp_path / "hf"), tmp_path / "base")
    if REFERENCE.is_dir():
        with pytest.raises(UserError, match=r"not a llava model, its model_type is 'qwen'.*--family=qwen_vl"):
            from_torch("llava", REFERENCE / "qwen_vl_tiny" / "ckpt", tmp_path / "base")


def test_bin_files_without_torch_say_what_to_install(tmp_path, monkeypatch):
    source = write_v15(tmp_path / "v15")
    names.load_bin.cache_clear()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'redvillm_jax\[convert\]'"):
        from_torch("llava", source, tmp_path / "base")
    shutil.rmtree(source)
    monkeypatch.undo()
    safetensors_only = write_hf(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "torch", None)
    from_torch("llava", safetensors_only, tmp_path / "base")
