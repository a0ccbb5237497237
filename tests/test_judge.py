"""The judge command against a real HTTP server: what is asked, what comes of it, and an endpoint that fails."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from redvillm_jax import judge
from tests.fake_openai import CUT, CUT_MIDWAY, DRIP, EMPTY, INVALID_JSON, STALL, Body, Choice, FakeOpenAI, Status

ROOT = Path(__file__).parents[1]
KEY = "sk-test-0123456789abcdef"
MODEL = "gpt-4o-mini-2024-07-18"
OURS = {"name": "runs-qwen", "fingerprint": "ab" * 32}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def row(id, prediction, video=None, **more):
    own = {"id": str(id), "video": video or f"v{id}", "language": "en", "question": f"Question {id}?"}
    return own | {"answer": "dog", "benchmark": "activitynet_qa", "prediction": prediction, "model": OURS} | more


def answers(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(source, out, server, *more):
    return [f"--answers={source}", f"--out={out}", f"--model={MODEL}", f"--base_url={server.url}", *more]


def lines(out):
    return [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def means_of(out, benchmark, metric):
    metrics = summary_of(out)["benchmarks"][benchmark]["metrics"]
    return {group: one["mean"] for group, one in metrics[metric].items()}


def number(text):
    """The id of the question in a request."""
    return int(re.search(r"Question (\d+)\?", text)[1])


def by_number(replies):
    """A judge that answers by the question's id."""
    return lambda messages: replies[number(messages[-1]["content"])]


def always(messages):
    return "{'pred': 'yes', 'score': 4}"


# What is asked and what comes of it


def test_verdicts_and_means(tmp_path, capsys):
    rows = [row(0, "a dog", "v"), row(1, "a cat", "v", kind="color"), row(2, "", "w", kind="color")]
    rows.append(row(3, None, "w", error="w: cannot be read"))
    source, out = answers(tmp_path / "answers", rows), tmp_path / "made" / "judged"
    replies = [
        "{'pred': 'yes', 'score': 4.8}",
        'Sure:\n```json\n{"pred": "No.", "score": "1"}\n```',
        "pred: no\nscore: 0",
    ]
    with FakeOpenAI(by_number(replies)) as server:
        assert judge.main(flags(source, out, server)) == 0
        assert len(server.calls) == 3 and {call.authorization for call in server.calls} == {f"Bearer {KEY}"}
        body = server.calls[0].body
        assert body["model"] == MODEL and body["temperature"] == 0 and len(body["messages"]) == 2
        assert "Question: Question 0?\nCorrect answer: dog\nPredicted answer: a dog\n" in "".join(server.texts)
        assert means_of(out, "activitynet_qa", "accuracy") == {"all": 1 / 3, "kind:color": 0}
        assert means_of(out, "activitynet_qa", "score") == {"all": 5 / 3, "kind:color": 0.5}, "4.8 counts 4"
        assert means_of(out, "activitynet_qa", "exact_match") == {"all": 1 / 3, "kind:color": 0}
        first, *_, last = lines(out)
        assert first["values"] == {"accuracy": 1, "score": 4, "exact_match": 1, "f1": 1} and first["model"] == MODEL
        assert (first["reply"], first["attempts"], len(first["prompt"])) == (replies[0], 1, 12)
        assert last["status"] == "unanswered" and last["reason"] == "w: cannot be read" and last["values"] == {}
        summary = summary_of(out)
        assert summary["benchmarks"]["activitynet_qa"]["statuses"] == {"scored": 3, "unanswered": 1}
        assert summary["benchmarks"]["activitynet_qa"]["metrics"]["accuracy"]["all"]["videos"] == 2
        assert summary["made_with"]["answered_by"] == OURS and summary["replies"]["models"] == {MODEL: 3}
        assert summary["made_with"]["judge"]["prompts"] == {"qa": first["prompt"]}
        assert summary["replies"]["tokens_out"] == sum(map(len, replies))
        printed = capsys.readouterr().out
        assert "3 to judge, 3 different: 0 cached, 3 to send" in printed and "1 unanswered, left out" in printed
        assert f"judged by {MODEL} (the endpoint says {MODEL}), temperature 0, scores truncated, prompts 1" in printed
        assert judge.main(flags(source, out, server, "--no-truncate")) == 0
        assert len(server.calls) == 3, "the same replies, read otherwise"
        assert means_of(out, "activitynet_qa", "score")["all"] == pytest.approx(5.8 / 3)
    assert not list(out.glob("*.tmp"))


def test_vcgbench_is_judged_aspect_by_aspect(tmp_path):
    def vcg(id, kind, question, **more):
        own = {"id": id, "video": "v", "language": "en", "question": question, "answer": "The answer.", "kind": kind}
        return own | {"prediction": f"Said to {question}", "benchmark": "vcgbench", **more}

    rows = [vcg("generic/0", "generic", "G?"), vcg("temporal/0", "temporal", "T?")]
    rows += [vcg(f"consistency/0/{i}", "consistency", f"C{i}?", group="consistency/0") for i in (1, 2)]
    rows += [vcg("consistency/1/1", "consistency", "D1?", group="consistency/1")]
    rows += [vcg("consistency/1/2", "consistency", "D2?", group="consistency/1", prediction=None, error="gone")]
    scores = {"factual": 1, "detail": 2, "context": 3, "time": 4, "similar": 5}

    def said(messages):
        (word,) = [word for word in scores if word in messages[0]["content"].split(".")[0]]
        return f"{{'score': {scores[word]}}}"

    with FakeOpenAI(said) as server:
        assert judge.main(flags(answers(tmp_path / "a", rows), tmp_path / "j", server)) == 0
        texts = Counter(re.search(r"[Qq]uestion: (\w+\?)", text)[1] for text in server.texts)
        assert texts == {"G?": 3, "T?": 1, "C1?": 1}
        pair = next(text for text in server.texts if "C1?" in text)
        assert "First question: C1?\nSecond question: C2?\nCorrect answer to both: The answer.\n" in pair
        assert "first question: Said to C1?\nPredicted answer to the second question: Said to C2?\n" in pair
    assert means_of(tmp_path / "j", "vcgbench", "score") == {
        "aspect:correctness": 1,
        "aspect:detail": 2,
        "aspect:context": 3,
        "aspect:temporal": 4,
        "aspect:consistency": 5,
        "mean": 3,
    }
    last = lines(tmp_path / "j")[-1]
    assert (last["id"], last["aspect"], last["status"], last["reason"]) == (
        "consistency/1",
        "consistency",
        "unanswered",
        "gone",
    )


def test_choices_need_no_model_no_key_and_no_endpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    more = {"benchmark": "mvbench", "choices": ["A. cat", "B. dog"], "answer": "B"}
    rows = [row(0, "B. dog", kind="x", **more), row(1, "It is a cat", kind="x", **more), row(2, "?", kind="y", **more)]
    source, out = answers(tmp_path / "a", rows), tmp_path / "j"
    assert judge.main([f"--answers={source}", f"--out={out}"]) == 0
    assert means_of(out, "mvbench", "accuracy") == {"all": 1 / 3, "kind:x": 0.5, "kind:y": 0, "mean": 0.25}
    assert summary_of(out)["made_with"]["judge"] is None and not (out / "cache.sqlite").exists()
    assert "1 without a choice, counted wrong" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--model is needed: 1 verdicts of .* need a judge"):
        judge.main([f"--answers={answers(tmp_path / 'b', [row(0, 'x')])}", f"--out={out}"])


def test_captions_of_tempcompass_are_not_judged(tmp_path, capsys):
    source = answers(tmp_path / "a", [row(0, "A man.", benchmark="tempcompass", kind="captioning/speed")])
    assert judge.main([f"--answers={source}", f"--out={tmp_path / 'j'}"]) == 0
    assert lines(tmp_path / "j")[0]["reason"].startswith("TempCompass asks the judge a question about the caption")
    assert "1 not judged, left out\n  nothing to average" in capsys.readouterr().out


def test_equal_questions_are_asked_once_and_limit_keeps_groups(tmp_path):
    same = {"question": "Question 0?", "benchmark": "msvd_qa"}
    rows = [row(0, "x", **same), row(1, "x", **same), row(2, "y", **same)]
    with FakeOpenAI(always) as server:
        assert judge.main(flags(answers(tmp_path / "a", rows), tmp_path / "j", server)) == 0
        assert len(server.calls) == 2 and means_of(tmp_path / "j", "msvd_qa", "accuracy") == {"all": 1}
        assert summary_of(tmp_path / "j")["benchmarks"]["msvd_qa"]["questions"] == 3
    more = {"benchmark": "vnbench", "choices": ["A. cat", "B. dog"], "answer": "B"}
    rows = [row(i, "B", group=f"g{i % 2}", **more) for i in range(8)]
    judge.main([f"--answers={answers(tmp_path / 'b', rows)}", f"--out={tmp_path / 'k'}", "--limit=1"])
    assert [line["id"] for line in lines(tmp_path / "k")] == ["0", "2", "4", "6"]


def test_own_questions_and_the_benchmark_that_is_told(tmp_path):
    rows = [{key: value for key, value in row(0, "x").items() if key != "benchmark"}]
    source = answers(tmp_path / "a", rows)
    with FakeOpenAI(always) as server:
        judge.main(flags(source / "answers.jsonl", tmp_path / "j", server))
        assert means_of(tmp_path / "j", "own questions", "accuracy") == {"all": 1}
        judge.main(flags(source, tmp_path / "j", server, "--benchmark=msrvtt_qa"))
        assert means_of(tmp_path / "j", "msrvtt_qa", "score") == {"all": 4} and len(server.calls) == 1


# Replies that cannot be read


def test_what_cannot_be_read_is_asked_again_a_few_times_and_never_twice(tmp_path, capsys):
    rows = [row(i, "x", f"v{i}") for i in range(4)]
    replies = {0: ["Hm.", "{''score': 3.9, 'pred': 'yes'}"], 1: ["I'm sorry, I cannot."] * 9, 2: ["{'score': 9}"] * 9}
    source, out = answers(tmp_path / "a", rows), tmp_path / "j"

    def said(messages):
        queue = replies.get(number(messages[-1]["content"]))
        return queue.pop(0) if queue else "{'pred': 'no', 'score': 1}"

    with FakeOpenAI(said) as server:
        assert judge.main(flags(source, out, server)) == 1
        assert Counter(map(number, server.texts)) == {0: 2, 1: 3, 2: 3, 3: 1}
        asked = [call.body for call in server.calls if number(call.text) == 1]
        assert len({json.dumps(body) for body in asked}) == 3, "a server at temperature 0 repeats itself"
        found = {line["id"]: line for line in lines(out)}
        assert found["1"]["status"] == found["2"]["status"] == "unparsed" and found["0"]["attempts"] == 2
        assert (
            found["1"]["reason"] == "the reply has no score: I'm sorry, I cannot."
            and "score" not in found["1"]["values"]
        )
        assert means_of(out, "activitynet_qa", "score") == {"all": 2}, "(3 + 1) / 2: those without are not 0"
        assert summary_of(out)["benchmarks"]["activitynet_qa"]["statuses"] == {"scored": 2, "unparsed": 2}
        assert "2 without a readable verdict, left out" in capsys.readouterr().out
        before = (out / "verdicts.jsonl").read_bytes(), (out / "summary.json").read_bytes()
        assert judge.main(flags(source, out, server)) == 1
        assert (
            len(server.calls) == 9
            and ((out / "verdicts.jsonl").read_bytes(), (out / "summary.json").read_bytes()) == before
        )
        assert judge.main(flags(source, out, server, "--attempts=4")) == 1
        assert len(server.calls) == 11


# An endpoint that fails


def test_everything_that_can_be_retried_is(tmp_path):
    rows = [row(i, "x") for i in range(5)]
    plan = {0: [Status(429, retry_after=1)], 1: [Status(500), Status(503)], 2: [CUT, CUT_MIDWAY], 3: [STALL]}

    def said(messages):
        queue = plan.get(number(messages[-1]["content"]))
        return queue.pop(0) if queue else "{'pred': 'yes', 'score': 5}"

    with FakeOpenAI(said) as server:
        assert judge.main(flags(answers(tmp_path / "a", rows), tmp_path / "j", server, "--timeout=2")) == 0
        assert Counter(map(number, server.texts)) == {0: 2, 1: 3, 2: 3, 3: 2, 4: 1}
        waited = [call.when for call in server.calls if number(call.text) == 0]
        assert waited[1] - waited[0] >= 1, "as Retry-After says"
    assert means_of(tmp_path / "j", "activitynet_qa", "score") == {"all": 5}


def test_what_fails_is_left_out_and_tried_again_alone(tmp_path, capsys):
    broken = {1: INVALID_JSON, 2: Choice(message={"refusal": "No.", "content": None}), 3: EMPTY, 4: Choice("length")}
    broken |= {5: Status(400, "bad {authorization}"), 6: Status(500, "boom"), 7: STALL, 9: Body(b"[" * 200_000)}
    broken |= {10: Choice(usage={"prompt_tokens": float("inf")}), 11: Choice(usage={"completion_tokens": 10**30})}
    broken[12] = DRIP
    source, out = answers(tmp_path / "a", [row(i, "x", kind=f"k{i % 2}") for i in range(13)]), tmp_path / "j"
    with FakeOpenAI(lambda messages: broken.get(number(messages[-1]["content"]), always(messages))) as server:
        more = flags(source, out, server, "--timeout=2", "--max_retries=0")
        assert judge.main(more) == 1
        statuses = {line["id"]: (line["status"], line.get("reason", "")) for line in lines(out)}
        assert [id for id, (status, _) in statuses.items() if status == "failed"] == [str(i) for i in broken]
        assert statuses["2"][1] == "refused: No." and statuses["5"][1] == "HTTP 400: bad Bearer [API key]"
        assert statuses["7"][1] == statuses["12"][1] == "no answer within 2 s"
        found = summary_of(out)["benchmarks"]["activitynet_qa"]
        assert found["statuses"] == {"scored": 2, "failed": 11} and found["metrics"]["score"]["all"]["questions"] == 2
        assert found["metrics"]["score"]["all"]["mean"] == 4, "not 8 / 13"
        assert len(server.calls) == 13, "what failed is not asked in other words"
        printed = capsys.readouterr().out
        assert "11 failed, left out" in printed and "without a verdict: 11, listed in" in printed
        server.calls.clear()
        broken.clear()
        assert judge.main(more) == 0
        assert sorted(map(number, server.texts)) == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert means_of(out, "activitynet_qa", "accuracy") == {"all": 1, "kind:k0": 1, "kind:k1": 1}


def test_a_refused_key_stops_at_once(tmp_path):
    source = answers(tmp_path / "a", [row(i, "x") for i in range(40)])
    with FakeOpenAI(lambda messages: Status(401, "wrong key {authorization}")) as server:
        with pytest.raises(
            UserError, match=r"none of 40 questions could be judged; the first: HTTP 401: wrong key Bearer \["
        ):
            judge.main(flags(source, tmp_path / "j", server, "--concurrency=1"))
        assert len(server.calls) == 1 and not (tmp_path / "j" / "summary.json").exists()


# Costs


def test_the_estimate_and_the_limit(tmp_path, capsys):
    source, out = answers(tmp_path / "a", [row(i, "x") for i in range(20)]), tmp_path / "j"
    with FakeOpenAI(always) as server:
        assert judge.main(flags(source, out, server, "--price_in=10000", "--price_out=1000", "--dry_run")) == 0
        assert server.calls == [] and not out.exists()
        tokens_in, tokens_out, cost = re.search(
            r"estimate: (\d+) tokens in, (\d+) out, cost ([\d.]+) ", capsys.readouterr().out
        ).groups()
        prices = ["--price_in=10000", "--price_out=1000", "--concurrency=1"]
        assert float(cost) == pytest.approx((int(tokens_in) * 10000 + int(tokens_out) * 1000) / 1e6, abs=0.005)
        with pytest.raises(UserError, match="--max_cost=1: nothing was sent; raise it, or do less with --limit"):
            judge.main(flags(source, out, server, *prices, "--max_cost=1"))
        assert server.calls == []
        # The server counts letters, four times the estimate: the money is gone before all is judged.
        assert judge.main(flags(source, out, server, *prices, "--max_cost=60")) == 1
        letters = [sum(len(message["content"]) for message in call.body["messages"]) for call in server.calls]
        assert int(tokens_in) == pytest.approx(20 * letters[0] / 4, rel=0.01) and int(tokens_out) == 20 * 12
        spent = [count / 100 + 27 / 1000 for count in letters]
        assert sum(spent[:-1]) < 60 <= sum(spent)
        judged = len(server.calls)
        assert summary_of(out)["benchmarks"]["activitynet_qa"]["statuses"] == {"scored": judged, "failed": 20 - judged}
        assert "stopped: --max_cost=60 is spent" in capsys.readouterr().out
        assert lines(out)[-1]["reason"] == "not sent: --max_cost=60 is spent"
        assert judge.main(flags(source, out, server)) == 0
        assert len(server.calls) == 20 == len(set(server.texts))


def test_the_second_attempts_count_too(tmp_path):
    source, out = answers(tmp_path / "a", [row(i, "x") for i in range(10)]), tmp_path / "j"
    with FakeOpenAI(lambda messages: "Hm.") as server:
        more = ["--price_in=10000", "--price_out=1000", "--concurrency=1", "--max_cost=100"]
        assert judge.main(flags(source, out, server, *more)) == 1
        spent = [sum(len(message["content"]) for message in call.body["messages"]) / 100 for call in server.calls]
        assert 10 < len(server.calls) < 30 and sum(spent[:-1]) < 100 <= sum(spent) + 0.003 * len(spent)


# One folder, one command


def test_other_answers_replace_and_never_mix(tmp_path):
    source, out = answers(tmp_path / "a", [row(0, "x"), row(1, "x")]), tmp_path / "j"
    with FakeOpenAI(always) as server:
        judge.main(flags(source, out, server))
        answers(source, [row(0, "x"), row(1, "y"), row(2, "z")])
        judge.main(flags(source, out, server))
        assert len(server.calls) == 4 and [line["prediction"] for line in lines(out)] == ["x", "y", "z"]
        judge.main([*flags(source, out, server), "--model=gpt-4-0613"])
        assert len(server.calls) == 7 and {line["model"] for line in lines(out)} == {"gpt-4-0613"}
        judge.main(flags(source, out, server, "--temperature=none"))
        assert len(server.calls) == 10 and "temperature" not in server.calls[-1].body
        assert summary_of(out)["made_with"]["judge"]["temperature"] is None
    with FakeOpenAI(lambda messages: Status(401)) as server:
        with pytest.raises(UserError, match="HTTP 401"):
            judge.main([*flags(source, out, server), "--model=gpt-4-0314"])
    assert sorted(path.name for path in out.iterdir()) == ["cache.sqlite"], "what another judge said is gone"


def test_other_commands_files_are_not_touched(tmp_path):
    source = answers(tmp_path / "a", [row(0, "x")])
    with FakeOpenAI(always) as server:
        with pytest.raises(UserError, match=r"holds answers.jsonl and what was made with it; choose another folder"):
            judge.main(flags(source, source, server))
        (tmp_path / "summary.json").write_text('{"exact_match": {}}')
        with pytest.raises(UserError, match=r"has a summary.json that is not of redvillm_jax.judge"):
            judge.main(flags(source, tmp_path, server))
        assert server.calls == []
        (tmp_path / "j").mkdir()
        (tmp_path / "j" / "verdicts.jsonl").write_text('{"court": "high"}\n')
        with pytest.raises(UserError, match=r"has a verdicts.jsonl that is not of redvillm_jax.judge"):
            judge.main(flags(source, tmp_path / "j", server))
        (tmp_path / "c").mkdir()
        with contextlib.closing(sqlite3.connect(tmp_path / "c" / "cache.sqlite")) as mine:
            mine.execute("CREATE TABLE recipes (name TEXT)")
        with pytest.raises(UserError, match=r"cache\.sqlite: holds recipes, it is no cache of replies"):
            judge.main(flags(source, tmp_path / "c", server))
        assert server.calls == []
    assert (tmp_path / "summary.json").read_text() == '{"exact_match": {}}'
    assert (tmp_path / "j" / "verdicts.jsonl").read_text() == '{"court": "high"}\n'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=gpt-4o"], "--model=gpt-4o: names no dated version"),
        (["--out=/proc/nowhere"], "--out=/proc/nowhere: cannot be made: No such file"),
        (["--max_cost=3"], "--max_cost: needs --price_in and --price_out"),
        (["--attempts=0"], "argument --attempts: expected a positive integer"),
        (["--benchmark=msvd"], "argument --benchmark: invalid choice: 'msvd'"),
        (["--base_url=localhost:8000"], "expected an address such as"),
        (["--answers=/nowhere"], "/nowhere"),
        (["--compare", "/nowhere", "/nowhere"], "--compare: reads two judged folders; give it alone"),
    ],
)
def test_wrong_flags(tmp_path, more, message):
    source = answers(tmp_path / "a", [row(0, "x")])
    with FakeOpenAI(always) as server:
        with pytest.raises(UserError) as error:
            judge.main([*flags(source, tmp_path / "j", server), *more])
        assert message in str(error.value) and "\n" not in str(error.value)
        assert server.calls == []
    with pytest.raises(UserError, match=r"/nowhere: expected a folder with verdicts.jsonl and summary.json"):
        judge.main(["--compare", "/nowhere", "/nowhere"])
    for name in ("answers", "out"):
        with pytest.raises(UserError, match=f"--{name} is needed"):
            judge.main([flag for flag in (f"--answers={source}", "--out=x") if not flag.startswith(f"--{name}")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": 3}, "field 'prediction' is 3, expected text or null"),
        ({"benchmark": "msvd"}, "unknown benchmark 'msvd', expected one of vcgbench"),
        ({"choices": ["A. x", 3]}, "field 'choices' is [\"A. x\", 3], expected texts"),
        ({"benchmark": "vcgbench", "kind": "consistency"}, "a question of a pair, but has no field 'group'"),
        ({"benchmark": "vcgbench", "kind": "detail"}, "kind 'detail' is none of VCGBench's"),
        ({"model": {"name": "other"}}, "has answers of 2 models"),
    ],
)
def test_rows_that_are_no_answers(tmp_path, change, message):
    source = answers(tmp_path / "a", [row(0, "x"), row(1, "x") | change])
    with pytest.raises(UserError) as error:
        judge.main([f"--answers={source}", f"--out={tmp_path / 'j'}", f"--model={MODEL}"])
    assert message in str(error.value) and "\n" not in str(error.value)
    (source / "answers.jsonl").write_text(json.dumps({k: v for k, v in row(0, "x").items() if k != "prediction"}))
    with pytest.raises(UserError, match="answer with id '0': has no 'prediction'; expected answers"):
        judge.main([f"--answers={source}", f"--out={tmp_path / 'j'}", f"--model={MODEL}"])


# The real command


def command(more, **environment):
    process = [sys.executable, "-m", "redvillm_jax.judge", *more]
    variables = {**os.environ, **environment}
    return subprocess.Popen(process, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_continues_without_one_repeated_call(tmp_path):
    """The server answers 60 calls and then none: whoever waits there is killed with all replies so far on disk."""
    source, out = answers(tmp_path / "a", [row(i, "x", f"v{i // 5}") for i in range(150)]), tmp_path / "j"
    answered = set()

    def said(messages):
        id = number(messages[-1]["content"])
        if len(answered) == 60 and not continuing:
            return STALL
        answered.add(id)
        return f"{{'pred': 'yes', 'score': {id % 6}}}"

    continuing = False
    with FakeOpenAI(said) as server:
        process = command(flags(source, out, server, "--concurrency=4"))
        while len(server.calls) < 64:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        assert process.returncode == -9 and len(answered) == 60
        assert sorted(path.name for path in out.iterdir() if "-" not in path.name) == ["cache.sqlite"]
        paid, continuing = set(answered), True
        server.calls.clear()
        assert judge.main(flags(source, out, server)) == 0
        again = [number(text) for text in server.texts]
        assert not paid & set(again) and len(again) == len(set(again)) == 90
    assert means_of(out, "activitynet_qa", "score") == {"all": 2.5} and len(lines(out)) == 150


def test_the_key_is_nowhere_and_jax_is_not_imported(tmp_path):
    source, out = answers(tmp_path / "a", [row(i, "x") for i in range(4)]), tmp_path / "j"
    with FakeOpenAI(lambda m: Status(400, "{authorization}") if number(m[-1]["content"]) == 1 else always(m)) as server:
        code = (
            "import runpy, sys\n"
            f"sys.argv = ['judge', *{flags(source, out, server, '--debug')!r}]\n"
            "try:\n    runpy.run_module('redvillm_jax.judge', run_name='__main__')\n"
            "finally:\n    print('loaded:', sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'openai'}))"
        )
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "OPENAI_LOG": "debug"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert server.calls[0].authorization == f"Bearer {KEY}"
    printed = process.stdout + process.stderr
    assert process.returncode == 1 and "Bearer [API key]" in printed and "loaded: ['openai']" in printed, printed
    everything = printed.encode() + b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.encode() not in everything and (out / "verdicts.jsonl").exists()
