"""Two judged folders: paired differences against a computation by hand, and what may not be compared."""

import hashlib
import json

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from redvillm_jax import judge
from redvillm_jax.evaluation.comparison import compare
from tests.fake_openai import FakeOpenAI, Status
from tests.test_judge import MODEL, answers, environment, flags, number, row

__all__ = ["environment"]  # a fixture for every test here, too


RESULT = {"id": "1", "video": "v", "language": "en", "benchmark": "msvd_qa", "status": "scored", "values": {"score": 1}}
FOREIGN = (
    {},
    [],
    None,
    {"id": "1"},
    RESULT | {"id": 1},
    RESULT | {"values": [1]},
    RESULT | {"values": {"score": "1"}},
    RESULT | {"values": {"score": True}},
    RESULT | {"values": {"score": float("nan")}},
    RESULT | {"group": ["x"]},
    "half a li",
    "[" * 200_000,
)


def judged(folder, rows, replies, *more, model=MODEL):
    """A folder of verdicts; replies by the number of the question."""
    source = answers(folder / "answers", rows)
    with FakeOpenAI(lambda messages: replies[number(messages[-1]["content"])]) as server:
        judge.main([*flags(source, folder / "judged", server, "--max_retries=0", *more), f"--model={model}"])
    return folder / "judged"


def verdict(score, yes=True):
    return f"{{'pred': '{'yes' if yes else 'no'}', 'score': {score}}}"


def test_the_paired_difference_by_hand(tmp_path, capsys):
    """Six questions about three videos; 4 failed in the first, 5 is only in the second."""
    videos = ["a", "a", "b", "b", "c", "c"]
    rows = [row(i, "x", video, kind="k" if i < 2 else "l") for i, video in enumerate(videos)]
    first = judged(tmp_path / "1", rows[:5], [verdict(1, False), verdict(2), verdict(3), verdict(4), Status(400)])
    second = judged(
        tmp_path / "2", rows, [verdict(5), verdict(3), verdict(3), verdict(2, False), verdict(0), verdict(5)]
    )
    found = compare(first, second)["activitynet_qa"]
    # Answered in both: 0 to 4 by rule, 0 to 3 by the judge.
    assert (found["common"], found["only_first"], found["only_second"]) == (5, 0, 1)
    score, accuracy = found["metrics"]["score"], found["metrics"]["accuracy"]
    assert score["all"]["mean"] == (4 + 1 + 0 - 2) / 4 and accuracy["all"]["mean"] == (1 + 0 + 0 - 1) / 4
    assert score["kind:k"]["mean"] == 2.5 and score["kind:l"]["mean"] == -1 and score["all"]["questions"] == 4
    # Two videos with differences 4, 1 and 0, -2: a resample's mean is 2.5, 0.75 or -1, a quarter of them at each end.
    assert (score["all"]["low"], score["all"]["high"]) == (-1, 2.5)
    assert (accuracy["all"]["low"], accuracy["all"]["high"]) == (-0.5, 0.5)
    assert compare(second, first)["activitynet_qa"]["metrics"]["score"]["all"]["mean"] == -0.75
    capsys.readouterr()
    assert judge.main(["--compare", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    assert f"5 in common, 0 only in {first}, 1 only in {second}; {second} minus {first}:" in printed
    assert "+0.75 [-1.00, +2.50]" in printed and "+0.0 [-50.0, +50.0]" in printed


def test_pairs_are_narrower_than_their_parts(tmp_path):
    """Two systems that differ on few of many hard and easy questions."""
    random = np.random.default_rng(0)
    rows = [row(i, "x", f"v{i // 2}") for i in range(120)]
    scores = random.integers(0, 6, 120)
    better = np.minimum(scores + (np.arange(120) % 10 == 0), 5)
    folders = [judged(tmp_path / n, rows, [verdict(s) for s in of]) for n, of in (("1", scores), ("2", better))]
    paired = compare(*folders)["activitynet_qa"]["metrics"]["score"]["all"]
    alone = json.loads((folders[0] / "summary.json").read_text())["benchmarks"]["activitynet_qa"]["metrics"]["score"][
        "all"
    ]
    assert paired["mean"] == pytest.approx((better - scores).mean()) and 0 < paired["low"] < paired["high"]
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 3


def test_choices_are_compared_without_a_judge_and_by_group(tmp_path):
    more = {"benchmark": "vnbench", "choices": ["A. cat", "B. dog"], "answer": "B"}
    folders = []
    for name, wrong in (("1", {0, 5}), ("2", {6})):
        rows = [row(i, "A" if i in wrong else "B", f"g{i // 4}", group=f"g{i // 4}", **more) for i in range(12)]
        folders.append(tmp_path / name / "judged")
        judge.main([f"--answers={answers(tmp_path / name, rows)}", f"--out={folders[-1]}"])
    found = compare(*folders)["vnbench"]
    assert found["common"] == 3 and found["metrics"]["accuracy"]["all"]["mean"] == pytest.approx(1 / 3)
    assert found["metrics"]["accuracy_of_tries"]["all"]["mean"] == pytest.approx(1 / 12)


def test_what_may_not_be_compared(tmp_path):
    rows, replies = [row(0, "x"), row(1, "y")], [verdict(1), verdict(2)]
    first = judged(tmp_path / "first", rows, replies)
    others = {
        "judged with model .* and gpt-4-0613": judged(tmp_path / "a", rows, replies, model="gpt-4-0613"),
        "judged with temperature 0.0 and None": judged(tmp_path / "b", rows, replies, "--temperature=none"),
        "judged with truncate True and False": judged(tmp_path / "c", rows, replies, "--no-truncate"),
        'id \'1\': the answer differs: "dog" and "cat"': judged(
            tmp_path / "d", [rows[0], rows[1] | {"answer": "cat"}], replies
        ),
        "id '1': the question differs": judged(
            tmp_path / "e", [rows[0], rows[1] | {"question": "Question 1?!"}], replies
        ),
        "have no scored question in common": judged(tmp_path / "f", [row(7, "x")], {7: verdict(1)}),
    }
    other_prompt = judged(tmp_path / "g", rows, replies)
    summary = json.loads((other_prompt / "summary.json").read_text())
    summary["made_with"]["judge"]["prompts"]["qa"] = "0" * 12
    (other_prompt / "summary.json").write_text(json.dumps(summary))
    others["judged with prompts"] = other_prompt
    for message, other in others.items():
        with pytest.raises(UserError, match=message) as error:
            compare(first, other)
        assert "\n" not in str(error.value)
    with (other_prompt / "verdicts.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"verdicts.jsonl is not the one that summary.json is about; judge again"):
        compare(first, other_prompt)
    for foreign in FOREIGN:
        content = json.dumps(foreign) + "\n" if not isinstance(foreign, str) else foreign
        summary["verdicts_sha256"] = hashlib.sha256(content.encode()).hexdigest()
        (other_prompt / "verdicts.jsonl").write_text(content)
        (other_prompt / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match=r"verdicts\.jsonl: line 1.*; judge again") as error:
            compare(first, other_prompt)
        assert "\n" not in str(error.value)
    content = (first / "verdicts.jsonl").read_text()
    (other_prompt / "verdicts.jsonl").write_text(content)
    summary["verdicts_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    for judge_of_it in ([], "x", {}, {"prompts": [1]}):
        summary["made_with"]["judge"] = judge_of_it
        (other_prompt / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match=r"summary\.json: .*; judge again"):
            compare(first, other_prompt)
    (other_prompt / "summary.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"summary\.json: is not whole JSON; judge again"):
        compare(first, other_prompt)
    (other_prompt / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"summary.json: has no .made_with.; judge again"):
        compare(first, other_prompt)
