"""The bounds of every field: what is refused is one line, and no field is without them."""

import json
import math
from pathlib import Path

import pytest
from conftest import EVERY_FAMILY

import redvillm_jax
from configs import demo, llava, qwen
from data_pipeline.common.errors import UserError, did_you_mean
from data_pipeline.media.reading import Clip, Picture
from redvillm_jax import encode, plan, train
from redvillm_jax.inference.assistant import check_question
from redvillm_jax.inference.engine import Generation
from redvillm_jax.model.config_bounds import FIELDS
from redvillm_jax.model.settings import check_config, complete, config_fields, plain_config
from redvillm_jax.video.contract import known_videos

CONFIGS = [
    complete(config)
    for config in (llava.get_config(), *map(qwen.get_config, qwen.LANGUAGES), *map(demo.get_config, EVERY_FAMILY))
]


def config(family: str = "qwen_vl", **changes) -> dict:
    return plain_config(demo.get_config(family)) | changes


def flat(tree, path: str = "") -> set[str]:
    if not hasattr(tree, "items"):
        return {path}
    return {leaf for name, value in tree.items() for leaf in flat(value, f"{path}.{name}")}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_every_bundled_config_has_bounds(config):
    assert flat(config_fields(config.family, config.video)) == flat(config)
    check_config(json.loads(config.to_json()))


GROUPS = ("spatial", "temporal", "extra_mlp")
NAMES = sorted(flat(config_fields("qwen_vl", "red_villm")))
TEXTS = (".base", ".data", ".language")  # any text; the family and the video are looked up


def with_value(path: str, value) -> dict:
    changed = config()
    *parents, name = path.strip(".").split(".")
    within = changed
    for parent in parents:
        within = within[parent]
    within[name] = value
    return changed


@pytest.mark.parametrize("path", NAMES)
def test_no_field_takes_what_it_cannot_mean(path):
    odd = [None, [], {}, [1, 2], (1.0,), b"x", object(), math.nan, math.inf, -math.inf, -5, 10**400, -1e-9, 1e300]
    if path not in TEXTS:
        odd += ["", "x", "1", "none,full", "\ud800"]
    if type(config_at(path)) is not float:
        odd += [2.5]
    for value in odd:
        with pytest.raises(UserError, match=rf"config{path} is |unknown family") as error:
            check_config(with_value(path, value))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for value in (True, False):
        if type(config_at(path)) is not bool:
            with pytest.raises(UserError):
                check_config(with_value(path, value))


def config_at(path: str):
    within = config()
    for name in path.strip(".").split("."):
        within = within[name]
    return within


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0}, r"learning_rate is 0, expected a number above 0 up to 1"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate_scale": dict.fromkeys(GROUPS, -1.0)}, r"learning_rate_scale\.spatial is -1\.0"),
        ({"learning_rate_scale": {"spatial": 1.0}}, r"learning_rate_scale\.temporal is missing"),
        ({"learning_rate_scale": 2.0}, "learning_rate_scale is 2.0, expected values for spatial, temporal, extra_mlp"),
        ({"weight_decay": dict.fromkeys(GROUPS, math.nan)}, r"weight_decay\.spatial is nan"),
        ({"warmup_ratio": -1}, "warmup_ratio is -1, expected a number from 0 to 1"),
        ({"warmup_ratio": 2}, "warmup_ratio is 2"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"num_frames": True}, "num_frames is True, expected a whole number from 1 to 10000"),
        ({"pack": 1}, "pack is 1, expected one of True, False"),
        ({"spatial_pool": True}, "spatial_pool is True, expected one of 1, 2"),
        ({"sampling": "fps=1.0"}, "sampling is 'fps=1.0', expected fps=1$"),
        ({"sampling": "fps=0"}, "sampling is 'fps=0', expected uniform, fps=F or every=N"),
        ({"mesh": {"data": 0, "fsdp": 1, "tensor": 1}}, r"mesh\.data is 0, expected a number of devices, or -1"),
        ({"remat": "gate,gates"}, "remat is 'gate,gates', expected none, full, or names out of query,"),
        ({"family": "llava"}, r"qwen_align is no field of a config of the family llava"),
        ({"foo": 3}, "config.foo is no field of a config of the family qwen_vl; take it out"),
        ({"num_epoch": 3}, r"num_epoch is no field .*did you mean num_epochs\?"),
    ],
)
def test_values_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        check_config(config() | change)


def test_a_config_of_another_family_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"config\.qwen_align is missing, which a config of the family qwen_vl has"):
        check_config(config("llava") | {"family": "qwen_vl"})
    for name in ("family", "video"):
        with pytest.raises(UserError, match=f"config.{name} is missing"):
            check_config({key: value for key, value in config().items() if key != name})


@pytest.mark.parametrize("command", [train.main, encode.main, plan.main])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.weight_decay.temporal=-0.1", r"config\.weight_decay\.temporal is -0\.1, expected a number from 0"),
        ("--config.clip_norm=nan", r"config\.clip_norm is nan"),
    ],
)
def test_every_command_that_takes_a_config_looks(command, flag, message, tmp_path):
    flags = {train.main: ["--workdir"], encode.main: ["--data", "--out"], plan.main: []}[command]
    more = [f"{name}={tmp_path / 'x'}" for name in flags] or ["--topology=v5e-4"]
    with pytest.raises(UserError, match=message):
        command(["--config=configs/llava.py", flag, *more])
    assert not list(tmp_path.iterdir())


def test_a_model_of_ones_own_config_looks(bases):
    with pytest.raises(UserError, match=r"config\.num_frames is 0"):
        redvillm_jax.load(bases["llava"], config=config("llava", num_frames=0))
    with pytest.raises(UserError, match="tensor is 0, expected a whole number from 1"):
        redvillm_jax.load(bases["llava"], config=demo.get_config("llava"), tensor=0)


# ---- what is asked about


@pytest.mark.parametrize(
    "part", [(2, 1), (1, 1), (math.nan, 1), (0, math.nan), (-5, 1), (0, math.inf), (0,), (0, 1, 2), "01", ("0", "1"), 3]
)
def test_a_part_that_cannot_be_meant_is_refused(part):
    with pytest.raises(UserError, match=r"^a\.mp4: .* is no part of a video, expected \(start, end\) in seconds"):
        Clip("a.mp4", part)


def test_a_part_is_two_floats():
    assert Clip("a.mp4", [0, 2]) == Clip("a.mp4", (0.0, 2.0)) and Clip("a.mp4").part is None
    assert hash(Clip(Path("a.mp4"), [0, 2])) == hash(Clip(Path("a.mp4"), (0, 2)))


@pytest.mark.parametrize("path", [None, 0, "", b"a.mp4", ["a.mp4"]])
@pytest.mark.parametrize("media", [Clip, Picture])
def test_a_path_is_a_path(media, path):
    with pytest.raises(UserError, match="expected the path of a"):
        media(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a whole number"),
        ({"temperature": "0"}, "temperature is '0', expected a number"),
        ({"temperature": math.nan}, "temperature is nan, expected 0"),
        ({"top_k": True}, "top_k is True, expected a whole number"),
        ({"seed": None}, "seed is None, expected a whole number"),
    ],
)
def test_generation_takes_what_it_means(settings, message):
    with pytest.raises(UserError, match=message):
        Generation(**settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *(("lr", "learning_rate"), ("epochs", "num_epochs"), ("frames", "num_frames"), ("LR", "learning_rate")),
        *(("learning-rate", "learning_rate"), ("batchsize", "batch_questions"), ("zzz", None)),
    ],
)
def test_the_nearest_name(name, nearest):
    assert did_you_mean(name, FIELDS) == (f"; did you mean {nearest}?" if nearest else "")


def test_the_video_representations_are_known():
    assert known_videos() == ["image_grid", "red_villm", "slow_fast"]


@pytest.mark.parametrize(
    ("question", "message"),
    [(5, "the question is 5, expected a text"), ("\ud800?", "has half a character"), (None, "None")],
)
def test_a_question_is_a_text(question, message):
    with pytest.raises(UserError, match=message) as error:
        check_question(question)
    str(error.value).encode()
