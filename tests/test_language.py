"""Which of a store's questions are trained on: config.language, and configs/qwen.py:zh, :en, :both."""

import pytest
from helpers import plan_of

from configs import demo, qwen
from data_pipeline.common.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import train
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.model.settings import plain_config
from redvillm_jax.runtime import cli


def plan(bases, stores, **changes):
    config = plain_config(demo.get_config("qwen_vl")) | {"num_frames": 4, "num_epochs": 1} | changes
    base, store = open_base(bases["qwen_vl"]), open_store(stores["qwen_vl"])
    return store, plan_of(config, base, store)


def asked(found):
    """The questions of all steps, as indices."""
    return sorted(index for step in found.steps for row in step for _, group in row for index in group)


def test_only_questions_in_the_language_are_planned(bases, stores):
    plans = {}
    for language in ("zh", "en", ""):
        store, plans[language] = plan(bases, stores, language=language)
        expected = [row for row in store.instructions if language in ("", row["language"])]
        assert 0 < len(expected) and plans[language].instructions == expected
        assert asked(plans[language]) == list(range(len(expected)))
    assert len(plans["zh"].instructions) + len(plans["en"].instructions) == len(plans[""].instructions)
    assert len({found.fingerprint(1) for found in plans.values()}) == 3
    tokens = [question.ids.tolist() for question in plans[""].row_fn.keywords["questions"]]
    chinese = [i for i, row in enumerate(plans[""].instructions) if row["language"] == "zh"]
    assert [q.ids.tolist() for q in plans["zh"].row_fn.keywords["questions"]] == [tokens[i] for i in chinese]


def test_a_language_that_no_question_has_ends_in_one_line(tmp_path, bases, stores):
    config = plain_config(demo.get_config("qwen_vl")) | {"num_frames": 4, "language": "fr"}
    config |= {"base": str(bases["qwen_vl"]), "data": str(stores["qwen_vl"])}
    with pytest.raises(
        UserError, match=r"has no question in config.language='fr', it has \d+ in '\w\w', \d+ in"
    ) as raised:
        train.train(config, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_configs():
    assert [qwen.get_config(name).language for name in ("zh", "en", "both")] == ["zh", "en", ""]
    assert qwen.get_config().language == demo.get_config("llava").language == ""
    assert cli.read_config("configs/qwen.py:zh")["language"] == "zh"
    assert cli.read_config("configs/qwen.py")["language"] == ""
    with pytest.raises(UserError, match="unknown language 'fr', expected one of zh, en, both"):
        cli.read_config("configs/qwen.py:fr")
