"""The family of a published folder, from its config.json."""

import json

import pytest

from conversion.families import UNFIT, find_family
from conversion.from_torch import from_torch
from data_pipeline.common.errors import UserError
from redvillm_jax.bases.contract import known_families, load_family

TYPES = [(one, name) for name in known_families() for one in load_family(name).MODEL_TYPES if one not in UNFIT]


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("model_type", "family"), TYPES)
def test_the_family_comes_from_config_json(model_type, family, tmp_path):
    assert find_family(write_config(tmp_path, model_type=model_type)) == family


def test_no_model_type_has_two_families():
    types = [model_type for model_type, _ in TYPES]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("model_type", UNFIT)
def test_a_model_that_the_method_does_not_fit_is_refused_with_the_reason(model_type, tmp_path):
    source = write_config(tmp_path / ".", model_type=model_type)
    with pytest.raises(UserError) as error:
        from_torch(None, source, tmp_path / "base")
    said = str(error.value)
    assert said.startswith(f"{source / 'config.json'}: model_type {model_type}: {UNFIT[model_type]}; supported: ")
    assert "llava: llava, llava_llama" in said and "\n" not in said and not (tmp_path / "base").exists()


def test_reasons_name_what_is_wrong():
    assert "trained on video" in UNFIT["qwen2_5_vl"] and "three axes" in UNFIT["qwen3_vl"]
    assert "cross-attention" in UNFIT["mllama"] and "varying number" in UNFIT["pixtral"]
    assert "SmolVLM 2" in UNFIT["smolvlm"] and "--family=smolvlm" in UNFIT["smolvlm"]


@pytest.mark.parametrize("config", [{"model_type": "flamingo"}, {}, {"model_type": 3}])
def test_an_unknown_model_is_told_what_is_supported(config, tmp_path):
    with pytest.raises(UserError, match=r"model_type is .*, supported: .*llava: llava.*qwen_vl: qwen.*--family=MODULE"):
        find_family(write_config(tmp_path, **config))


def test_a_family_that_is_asked_for_must_fit(tmp_path):
    with pytest.raises(UserError, match=r"not a qwen_vl model, its model_type is 'qwen2_vl': it is trained on video"):
        from_torch("qwen_vl", write_config(tmp_path, model_type="qwen2_vl"), tmp_path / "base")
