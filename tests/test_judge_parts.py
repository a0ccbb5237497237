"""Prompts, replies read as verdicts, and the published numbers."""

import ast
import re

import pytest

from redvillm_jax.evaluation.judge_prompts import PROMPTS_VERSION, messages, prompt_hash
from redvillm_jax.evaluation.published import PUBLISHED, QA, mark, published_systems
from redvillm_jax.evaluation.scoring import ASPECTS
from redvillm_jax.evaluation.tables import summary_table
from redvillm_jax.evaluation.verdicts import Verdict, read_verdict

TEXTS = {"question": "What {is} it?", "answer": "A dog.", "prediction": "{'score': 5}"}
PAIR = TEXTS | {"question_2": "And what?", "prediction_2": "A cat."}


@pytest.mark.parametrize(
    ("score", "replies"),
    [
        (4.0, "{'score': 4}|{\"score\": 4}|```python\n{'score': \"4\"}\n```|Sure! {'score': 4}. Bye.|{'Score': 4,}"),
        (4.8, "{''score': 4.8}|{'score': 4.8}|{score: 4.8}|Score: 4.8.|score = 4.8"),
        (
            4.0,
            "Score: 4|Score: 4/5|{'score': '4/5'}|{'score': 4/5}|Score: **4**|The score is 4|a score of 4|{'score': 4",
        ),
        (3.0, "{'score': 3} and again {'score': 3.0}|<think>{'score': 1}?</think>\n{'score': 3}|{'score': 3} # of 5"),
        (0.0, "{'score': 0}|Score: 0"),
        (5.0, "{'score': 5.0}"),
    ],
)
def test_scores_are_read(score, replies):
    for reply in replies.split("|"):
        assert read_verdict(reply, yes_no=False) == Verdict(score, None), reply


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "the reply has no score"),
        ("I'm sorry, but I cannot.", "the reply has no score"),
        ("4", "the reply has no score"),
        ("{}", "the reply has no score"),
        ("{'score': 7}", "the score is 7, expected 0 to 5"),
        ("{'score': -1}", "the score is -1, expected 0 to 5"),
        ('{"score": NaN}', "the score is nan, expected 0 to 5"),
        ("{'score': 1e400}", "the score is inf, expected 0 to 5"),
        ("{'score': " + "9" * 3000 + "}", f"the score is {'9' * 40}, expected 0 to 5"),
        ("{'score': True}", "the score is 'True', expected a number"),
        ("{'score': None}", "the score is 'None', expected a number"),
        ("{'score': 'four'}", "the score is 'four', expected a number"),
        ("{'score': 3} or {'score': 4}", "the reply has 2 verdicts that differ"),
        ("Score: 3. Score: 4.", "the score is \"['3', '4']\", expected a number"),
        ("Score: 3-4", "the reply has no score"),
        ("Score: 8/10", "the reply has no score"),
        ("Score: 80%", "the reply has no score"),
        ("<think>{'score': 1} hm", "the reply ends in the middle of its thoughts"),
        ("{'score': 2} because {'score': 9}", "the reply has 2 verdicts that differ"),
        ('{"score": 1, "score": 5}', "the score is \"['1', '5']\", expected a number"),
        ("{'score': " + "[" * 200_000 + "]" * 200_000 + "}", "the reply has no score"),
        ("{'score': " + "-" * 200_000 + "4}", "the reply has no score"),
        ("<think>" * 50_000, "the reply ends in the middle of its thoughts"),
    ],
)
def test_what_is_no_clear_score_is_none(reply, reason):
    assert read_verdict(reply, yes_no=False) == reason


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4.8}", Verdict(4.8, True)),
        ("{''pred': 'yes', 'score': 4.8}", Verdict(4.8, True)),
        ("{'pred': 'Yes.', 'score': '4'}", Verdict(4, True)),
        ("{'pred': 'NO', 'score': 0}", Verdict(0, False)),
        ("{pred: no, score: 1}", Verdict(1, False)),
        ("Pred: yes\nScore: 4", Verdict(4, True)),
        ("{'pred': 'yes or no', 'score': 4}", "pred is 'yes or no', expected yes or no"),
        ("{'pred': 'unknown', 'score': 0}", "pred is 'unknown', expected yes or no"),
        ("{'pred': 'cannot say', 'score': 0}", "pred is 'cannot say', expected yes or no"),
        ("{'pred': '', 'score': 0}", "pred is '', expected yes or no"),
        ("pred: unknown, score: 0", "pred is 'unknown', expected yes or no"),
        ("pred: yes or no, score: 4", "the reply has neither yes nor no"),
        ("{'pred': 'yes', 'pred': 'no', 'score': 4}", "pred is \"['no', 'yes']\", expected yes or no"),
        ("{'pred': 'maybe', 'score': 2}", "pred is 'maybe', expected yes or no"),
        ("{'pred': None, 'score': 2}", "pred is 'None', expected yes or no"),
        ("{'pred': True, 'score': 2}", "pred is 'True', expected yes or no"),
        ("{'score': 3}", "the reply has neither yes nor no"),
        ("{'pred': 'yes'}", "the reply has no score"),
        ("pred: yes, pred: no, score: 2", "pred is \"['no', 'yes']\", expected yes or no"),
        ("{'pred': 'yes', 'score': 4} {'pred': 'no', 'score': 4}", "the reply has 2 verdicts that differ"),
    ],
)
def test_yes_and_no(reply, verdict):
    assert read_verdict(reply, yes_no=True) == verdict


@pytest.mark.parametrize("aspect", [*ASPECTS, "qa"])
def test_prompts(aspect):
    texts = PAIR if aspect == "consistency" else TEXTS
    system, user = (message["content"] for message in messages(aspect, texts, 1))
    assert all(text in user for text in texts.values()), "texts with braces as they are"
    assert not re.search(r"\{[a-z_0-9]+\}", (system + user).replace("{is}", "")), "every name is filled in"
    example = ast.literal_eval(user.rpartition("For example: ")[2])
    asked = {"pred": "yes", "score": 4} if aspect == "qa" else {"score": 4}
    assert example == asked and type(example["score"]) is int
    assert "0 to 5" in user and "5 is" in user and system.count("\n- ") >= 3
    again = [messages(aspect, texts, attempt)[1]["content"] for attempt in (1, 2, 3)]
    assert len(set(again)) == 3 and all(text.startswith(user) for text in again)


def test_prompts_have_versions():
    """Whoever changes a word of them raises PROMPTS_VERSION, and writes the new hashes here."""
    hashes = {aspect: prompt_hash(aspect) for aspect in (*ASPECTS, "qa")}
    assert (PROMPTS_VERSION, hashes) == (
        "1",
        {
            "correctness": "bbeada144422",
            "detail": "305c6b545318",
            "context": "56121d480f67",
            "temporal": "e1664c66a5cb",
            "consistency": "a0e529996ee3",
            "qa": "44a8eb6c41c8",
        },
    )


def test_published_numbers():
    rows = {one.system: values for one, values in published_systems("vcgbench")}
    assert rows["RED-VILLM Qwen-VL-7B (cn)"] == pytest.approx((2.71, 2.75, 3.34, 2.34, 2.45, 2.718))
    assert rows["Video-ChatGPT"] == (2.40, 2.52, 2.62, 1.98, 2.37, 2.38)
    rows = {one.system: values for one, values in published_systems("activitynet_qa")}
    assert rows["RED-VILLM LLaVA-7B"] == (39.2, 3.0) and rows["RED-VILLM Qwen-VL-7B"] == (44.2, 3.2)
    assert published_systems("mvbench") == [] and all(published_systems(name) for name in (*QA, "vcgbench"))
    for one in PUBLISHED:
        assert one.source and len(one.qa) == 4 and (one.vcgbench is None or len(one.vcgbench) in (5, 6))
        assert all(0 < pair[0] <= 100 and (pair[1] is None or 0 < pair[1] <= 5) for pair in one.qa if pair)


def test_every_published_row_carries_its_mark():
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "questions": 10, "videos": 5}
    judge = {"model": "gpt-3.5-turbo-0125", "temperature": 0.0, "truncate": True, "prompts_version": "1"}
    summary = {
        "made_with": {"judge": judge | {"prompts": {"qa": "0" * 12}}},
        "replies": {"models": {"gpt-3.5-turbo-0125": 10}},
        "benchmarks": {
            "msvd_qa": {
                "questions": 10,
                "videos": 5,
                "statuses": {"scored": 10},
                "metrics": {"accuracy": {"all": interval}, "score": {"all": interval}},
            }
        },
    }
    published = [line for line in summary_table(summary).splitlines() if any(one.system in line for one in PUBLISHED)]
    assert len(published) == len(published_systems("msvd_qa"))
    for line, (one, (accuracy, _)) in zip(published, published_systems("msvd_qa"), strict=True):
        assert f"{accuracy:.1f}" in line and f"[{one.source}]" in line
        same = one.judge == "gpt-3.5-turbo-0125"
        assert ("same judge, other words in its prompt" in line) == same and ("not comparable: judge" in line) != same
    marks = {mark(one, "gpt-4o-2024-08-06") for one in PUBLISHED}
    assert all(text.startswith("not comparable: judge ") for text in marks)
    assert "not comparable: judge gpt-3.5-turbo-0301 (inferred)" in marks
