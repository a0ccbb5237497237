"""Which models are opened, in every form there is of one, and which stores a model takes."""

import json
import shutil
from pathlib import Path

import fake_gcs
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import NUM_FRAMES
from flax import nnx
from helpers import change_json, without_hashes
from safetensors.numpy import load_file, save_file
from test_prepare import write_video
from test_train import losses, make_config

from conversion.from_torch import from_torch
from conversion.to_torch import to_torch
from data_pipeline import prepare
from data_pipeline.common.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import evaluate, train
from redvillm_jax.inference.open_model import OpenedModel, model_fingerprint, open_model
from redvillm_jax.model import settings
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.model.build import load_model, put_trained
from redvillm_jax.model.settings import check_config, check_store, model_settings
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.runtime.sharding import make_mesh
from redvillm_jax.training import checkpoint

MESH = {"data": 1, "fsdp": 1, "tensor": 1}


# ---- one model, whatever it lies in


def write_run(folder: Path, family: str, base: Path, **switches) -> Path:
    """A run as training leaves it, its projectors moved at random: the model's own switches are all that counts."""
    config = make_config(family, base, Path("frames"), **switches)
    opened, mesh = open_base(base), make_mesh(MESH, jax.devices()[:1])
    projectors = load_model(opened, model_settings(config), mesh, dtype=jnp.float32, parts=("projector",)).projectors
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: jnp.asarray(x + rng.normal(0, 0.05, x.shape).astype("f")), nnx.to_pure_dict(nnx.state(projectors))
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {"trainable": moved, "optimizer": {"count": jnp.zeros(())}}
    identity = {"base": opened.fingerprint, "data": ""}
    with checkpoint.open_checkpoints(folder, keep=1) as checkpoints:
        checkpoint.save(checkpoints, 3, state, config=config, identity=identity)
    return folder


def export(run: Path, family: str, folder: Path) -> dict[str, Path]:
    """What conversion makes of a run: its projectors, a whole folder, and a base of that."""
    to_torch(run, folder / "projectors")
    to_torch(run, folder / "whole", full=True)
    from_torch(family, folder / "whole", folder / "again")
    return {name: folder / name for name in ("projectors", "whole", "again")}


def load(opened: OpenedModel) -> VideoLLM:
    """The model on one device, in fp32."""
    mesh = make_mesh(MESH, jax.devices()[:1])
    model = load_model(opened.base, model_settings(opened.config), mesh, dtype=jnp.float32)
    if opened.trained is not None:
        put_trained(model, opened.trained)
    return model


def visual_tokens(model: VideoLLM, store: Path) -> np.ndarray:
    """Of a store's first two videos."""
    videos = {name: jnp.asarray(array) for name, array in open_store(store).padded([0, 1]).items()}
    return np.asarray(model.video_tokens(videos, jnp.float32))


def answers(model: Path, store: Path, out: Path) -> list[str]:
    """Greedy, to all questions of a store."""
    evaluate.main([f"--model={model}", f"--data={store}", f"--out={out}", "--max_new_tokens=4"])
    return [json.loads(line)["prediction"] for line in (out / "answers.jsonl").read_text().splitlines()]


def assert_same_weights(got: dict, want: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)  # fails for other keys, too
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        ("llava", {"extra_mlp": True, "stream_order": "spatial_first"}),
        ("llava", {"temporal_module": False, "streams": "temporal"}),
        ("qwen_vl", {"qwen_align": "per_token", "spatial_pool": 2, "sampling": "fps=2"}),
        ("qwen_vl", {"streams": "temporal", "int8": True}),
    ],
)
def test_a_run_and_its_exports_are_one_model(family, switches, bases, tmp_path):
    run = write_run(tmp_path / "run", family, bases[family], **switches)
    forms = export(run, family, tmp_path)
    want = open_model(run)
    assert want.name == "run" and want.base.path == bases[family]
    shutil.copytree(bases[family], tmp_path / "moved")
    opened = [open_model(run, base=tmp_path / "moved"), open_model(forms["projectors"], base=tmp_path / "moved")]
    opened += [open_model(forms["whole"]), open_model(f"{forms['again']}/")]
    for other, name in zip(opened, ("run", "projectors", "whole", "again"), strict=True):
        assert_same_weights(other.trained, want.trained)
        assert other.fingerprint == want.fingerprint and other.name == name
        assert other.base.fingerprint == want.base.fingerprint and other.base.config == want.base.config
        said = json.loads((forms["projectors"] / "redvillm.json").read_text())["method"]
        assert {key: other.config[key] for key in said} == {key: want.config[key] for key in said}


def test_a_whole_export_answers_as_its_run_does(bases, stores, tmp_path):
    run = write_run(tmp_path / "run", "llava", bases["llava"])
    whole = export(run, "llava", tmp_path)["whole"]
    np.testing.assert_array_equal(*(visual_tokens(load(open_model(model)), stores["llava"]) for model in (run, whole)))
    want, got = (answers(model, stores["llava"], tmp_path / f"{model.name}-answers") for model in (run, whole))
    assert got == want and len(set(want)) > 1


def test_a_trained_export_is_no_base_to_train(bases, tmp_path):
    again = export(write_run(tmp_path / "run", "llava", bases["llava"]), "llava", tmp_path)["again"]
    with pytest.raises(UserError, match="again is a trained export; give the base that it was trained on"):
        settings.open_config_base(make_config("llava", again, ""))


def test_a_base_alone_is_untrained(bases, stores, tmp_path):
    config = make_config("llava", "", "")
    base, run = open_model(bases["llava"], config), open_model(write_run(tmp_path / "run", "llava", bases["llava"]))
    assert base.trained is None and base.config == config and base.fingerprint != run.fingerprint
    assert not np.allclose(*(visual_tokens(load(model), stores["llava"]) for model in (base, run)), atol=1e-2)


def test_an_export_in_16_bits_is_close(bases, stores, tmp_path):
    source = tmp_path / "published"
    shutil.copytree(bases["llava"], source)
    (source / "base.json").unlink()
    tensors = {
        name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    from_torch("llava", source, tmp_path / "base")
    run = write_run(tmp_path / "run", "llava", tmp_path / "base")
    forms = export(run, "llava", tmp_path)
    want, whole = open_model(run), open_model(forms["whole"])
    assert whole.fingerprint == open_model(forms["again"]).fingerprint != want.fingerprint
    projectors = open_model(forms["projectors"], base=tmp_path / "base")
    assert_same_weights(projectors.trained, want.trained)
    assert projectors.fingerprint == want.fingerprint
    got, wanted = (visual_tokens(load(model), stores["llava"]) for model in (whole, want))
    np.testing.assert_allclose(got, wanted, atol=0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), whole.trained, want.trained)


def test_exports_made_before_a_switch_have_its_default(bases, tmp_path):
    run = write_run(tmp_path / "run", "llava", bases["llava"], dtype="float32")
    forms = export(run, "llava", tmp_path)
    for name in ("sampling", "dtype", "int8"):
        change_json(forms["whole"] / "redvillm.json", lambda said, name=name: said["method"].pop(name))
    config = open_model(forms["whole"]).config
    assert config | {"sampling": "uniform", "dtype": "bfloat16", "int8": False, "seed": 0} == config
    assert open_model(forms["whole"]).fingerprint == open_model(run).fingerprint


def test_a_digit_that_changes_in_config_json_changes_no_answer(bases, tmp_path):
    """A checkpoint's own config, which its hashes cover, says how its weights are used."""
    run = write_run(tmp_path / "run", "llava", bases["llava"])
    before = open_model(run)
    change_json(run / "config.json", lambda said: said.update(num_frames=said["num_frames"] + 1, streams="spatial"))
    after = open_model(run)
    assert after.fingerprint == before.fingerprint and after.config == before.config


def test_exports_of_a_base_are_untrained(bases, tmp_path):
    to_torch(bases["llava"], tmp_path / "projectors")
    to_torch(bases["llava"], tmp_path / "whole", full=True)
    config = make_config("llava", "", "")
    want = open_model(bases["llava"], config)
    for opened in (
        open_model(tmp_path / "projectors", config, bases["llava"]),
        open_model(tmp_path / "whole", config),
    ):
        assert opened.trained is None and opened.fingerprint == want.fingerprint


def test_models_in_a_bucket(bases, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "llava", bases["llava"])
    forms = export(run, "llava", tmp_path)
    want = open_model(run)
    monkeypatch.setenv("REDVILLM_CACHE", str(tmp_path / "cache"))
    with fake_gcs.serve("bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for folder in (run, forms["whole"], forms["projectors"]):
            server.upload(folder, "bucket", f"models/{folder.name}")
        server.upload(bases["llava"], "bucket", "base")
        for opened, name in (
            (open_model("gs://bucket/models/whole"), "whole"),
            (open_model("gs://bucket/models/projectors/", base="gs://bucket/base"), "projectors"),
        ):
            assert opened.fingerprint == want.fingerprint and opened.name == name
        with pytest.raises(UserError, match="gs://bucket/none: not a run directory"):
            open_model("gs://bucket/none")


def test_the_fingerprint_covers_what_shapes_answers(bases, tmp_path):
    run = open_model(write_run(tmp_path / "run", "qwen_vl", bases["qwen_vl"]))

    def of(trained=run.trained, **changes) -> str:
        return model_fingerprint(run.base, model_settings(run.config | changes), trained)

    turned = {key: dict(reversed(value.items())) for key, value in reversed(run.trained.items())}
    same = [of(), of(turned), of(dtype="bfloat16"), of(seed=1), of(learning_rate=9.0), of(temporal_init="random")]
    same.append(of(attention="xla"))
    assert set(same) == {run.fingerprint} and len(run.fingerprint) == 64
    flipped = jax.tree.map(np.copy, run.trained)
    bits = flipped["temporal"]["proj"].view(np.uint32)
    bits[0, 0] ^= 1
    changes = [{"num_frames": 5}, {"sampling": "fps=1"}, {"streams": "spatial"}, {"spatial_pool": 2}, {"int8": True}]
    changes += [{"qwen_align": "per_token"}, {"extra_mlp": True}, {"short_video": "zero"}]
    random = {"temporal_init": "random"}
    others = [*(of(**change) for change in changes), of(flipped), of(None), of(None, **random)]
    others.append(of(None, **random, seed=1))
    assert len({run.fingerprint, *others}) == 1 + len(others)
    assert of(None) == of(None, seed=1)


@pytest.fixture(scope="module")
def models(bases, tmp_path_factory) -> dict[str, Path]:
    """A run with an extra MLP and its exports."""
    folder = tmp_path_factory.mktemp("models")
    run = write_run(folder / "run", "llava", bases["llava"], extra_mlp=True)
    return {"run": run, **export(run, "llava", folder)}


def copied(name: str, break_it, hashes: bool = False):
    def make(models, bases, tmp_path):
        folder = tmp_path / name
        shutil.copytree(models[name], folder)
        if not hashes and (folder / "redvillm.json").exists():
            without_hashes(folder, "redvillm.json")
        break_it(folder)
        return {"model": folder} | ({"base": bases["llava"]} if name == "projectors" else {})

    return make


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "projectors.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "extra_mlp_spatial.fc2.bias"}, folder / "projectors.safetensors"
    )


def with_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"temporal_module.linear_1.bias": np.zeros(3, "f")}, folder / "model.safetensors")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edited(name: str, change):
    return copied(
        name, lambda folder: change_json(folder / ("config.json" if name == "run" else "redvillm.json"), change)
    )


def published(models, bases, tmp_path):
    shutil.copytree(bases["llava"], tmp_path / "published")
    (tmp_path / "published" / "base.json").unlink()
    return {"model": tmp_path / "published"}


CONFIG = {"config": {"family": "llava"}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda models, bases, tmp_path: {"model": tmp_path}, "not a run directory .* or an export"),
        (lambda models, bases, tmp_path: {"model": tmp_path / "none", **CONFIG}, "none: not a run directory"),
        (published, "published files: make a base folder of them with conversion.from_torch"),
        (lambda models, bases, tmp_path: {"model": bases["llava"]}, "untrained: give its switches with --config"),
        (
            lambda models, bases, tmp_path: {"model": bases["llava"], "config": make_config("qwen_vl", "", "")},
            "is a llava base, this config is for qwen_vl",
        ),
        *(
            (lambda models, bases, tmp_path, form=form: {"model": models[form], **CONFIG}, "brings its own config")
            for form in ("run", "projectors", "whole", "again")
        ),
        *(
            (lambda models, bases, tmp_path, form=form: {"model": models[form], "base": bases["llava"]}, "leave it out")
            for form in ("whole", "again")
        ),
        (lambda models, bases, tmp_path: {"model": models["projectors"]}, "holds projectors alone: .* --base=BASE"),
        *(
            (
                lambda models, bases, tmp_path, form=form: {"model": models[form], "base": bases["qwen_vl"]},
                "qwen_vl.*: is base .*, the run was trained on",
            )
            for form in ("run", "projectors")
        ),
        (lambda models, bases, tmp_path: {"model": models["run"], "base": tmp_path}, "not a base folder"),
        (
            edited("run", lambda said: said.update(base="/moved")),
            "/moved: not a base folder.*say where with --base=BASE",
        ),
        (edited("run", lambda said: said.pop("streams")), "run: its config does not say streams"),
        (edited("run", lambda said: said.update(attend=3)), "config.json: attend=3 .* a newer one wrote it"),
        (edited("whole", lambda said: said["method"].update(attend=3)), "redvillm.json: attend=3 .* a newer one wrote"),
        (edited("whole", lambda said: said["method"].pop("extra_mlp")), "whole: its config does not say extra_mlp"),
        (edited("whole", lambda said: said["method"].update(video="blue")), "config.video is 'blue'"),
        (edited("whole", lambda said: said.pop("trained")), "redvillm.json: has no 'trained'; export the model again"),
        (edited("whole", lambda said: said.update(family="blip")), "unknown family 'blip'"),
        (
            copied("whole", lambda folder: (folder / "redvillm.json").write_text("{")),
            "redvillm.json: is not whole",
        ),
        (copied("projectors", without_tensor), r"lacks 1 tensors, extra_mlp_spatial\.fc2\.bias; export"),
        (copied("whole", with_another_shape), r"temporal_module\.linear_1\.bias \(3,\), expected \(96,\)"),
        (copied("whole", without_weights), r"no \.safetensors file found"),
        (
            copied("whole", with_another_shape, hashes=True),
            r"model\.safetensors: is not as it was .* export the model again",
        ),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(make, message, models, bases, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_model(**make(models, bases, tmp_path))
    assert "\n" not in str(error.value)


# ---- stores


@pytest.fixture(scope="module")
def by_seconds(tmp_path_factory, bases, videos):
    """Videos of one to five seconds with the generated ones' questions, a frame every two seconds."""
    folder = tmp_path_factory.mktemp("by_seconds")
    for i, file in enumerate(sorted((videos / "videos").iterdir())):
        write_video(folder / "videos" / file.name, i, num_frames=8 * (1 + i % 5))
    arguments = [f"--videos={folder / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}"]
    arguments += [f"--out={folder / 'store'}", f"--base={bases['llava']}", f"--num_frames={NUM_FRAMES}"]
    prepare.main([*arguments, "--sampling=fps=0.5"])
    return folder / "store"


def test_a_store_must_be_sampled_as_the_config_says(bases, stores, by_seconds):
    base, uniform, other = open_base(bases["llava"]), open_store(stores["llava"]), open_store(by_seconds)
    config = make_config("llava", bases["llava"], by_seconds)
    check_store(uniform, base, model_settings(config))
    with pytest.raises(UserError, match=r"made with sampling=fps=0.5, this model needs uniform: .*--sampling=uniform"):
        check_store(other, base, model_settings(config))
    config |= {"sampling": "fps=0.5"}
    check_store(other, base, model_settings(config))
    with pytest.raises(UserError, match=r"made with sampling=uniform, this model needs fps=0.5"):
        check_store(uniform, base, model_settings(config))
    with pytest.raises(UserError, match=r"config.sampling=fps=0.5 gives videos of different lengths.*short_video=mask"):
        check_config(config | {"short_video": "zero"})


def test_videos_of_different_lengths_train(bases, by_seconds, tmp_path):
    assert {video["num_frames"] for video in open_store(by_seconds).videos} == {1, 2, 3}
    one = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    config = make_config("llava", bases["llava"], by_seconds, sampling="fps=0.5", **one)
    train.train(config, tmp_path / "run", jax.devices()[:1])
    assert losses(tmp_path / "run")
