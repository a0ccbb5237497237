import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import translate
from data_pipeline.common.errors import UserError
from data_pipeline.questions.instructions import read_instructions
from data_pipeline.text import chat_client
from data_pipeline.text.chat_client import Failure, Reply, ReplyCache, ask_all, is_dated
from data_pipeline.text.numerals import changed_numbers
from data_pipeline.text.suspicions import suspicions
from tests.fake_openai import (
    CUT,
    CUT_MIDWAY,
    DRIP,
    EMPTY,
    GARBAGE,
    INVALID_JSON,
    STALL,
    Body,
    Choice,
    FakeOpenAI,
    Status,
)

ROOT = Path(__file__).parents[1]
KEY = "sk-test-0123456789abcdef"
MODEL = "gpt-4o-mini-2024-07-18"
CHINESE = {
    "What happens first?": "首先发生了什么？",
    "What happens last?": "最后发生了什么？",
    "A man in a red shirt runs.": "一个穿红衬衫的男人在跑步。",
    "He throws 3 balls.": "他扔了三个球。",
    "Two women are dancing on a stage.": "两个女人在舞台上跳舞。",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def chinese(messages):
    return CHINESE[messages[-1]["content"]]


def invented(messages):
    """A passable translation of any text: a third of its length, its numbers kept."""
    text = messages[-1]["content"]
    return "译" * (len(text) // 3) + "，".join(re.findall(r"\d+", text)) + "。"


def video_instruct(path, pairs):
    path.write_text(json.dumps([{"q": q, "a": a, "video_id": f"v_{i}"} for i, (q, a) in enumerate(pairs)]))
    return path


def many(path, count):
    """`count` rows with 1.5 different texts a row: every second question comes again."""
    return video_instruct(
        path, [(f"What is seen at second {i // 2}?", f"There is a cat number {i}.") for i in range(count)]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(source, out, server, *more):
    return [f"--input={source}", f"--out={out}", f"--model={MODEL}", f"--base_url={server.url}", *more]


@pytest.fixture
def three(tmp_path):
    """Three rows, five different texts."""
    pairs = [
        ("What happens first?", "A man in a red shirt runs."),
        ("What happens last?", "He throws 3 balls."),
        ("What happens first?", "Two women are dancing on a stage."),
    ]
    return video_instruct(tmp_path / "en.json", pairs)


# The whole command


def test_source_and_translation_side_by_side(three, tmp_path, capsys):
    out = tmp_path / "made" / "zh.jsonl"
    with FakeOpenAI(chinese) as server:
        assert translate.main(arguments(three, out, server)) == 0
        assert sorted(server.texts) == sorted(CHINESE), "each different text once"
        assert {call.authorization for call in server.calls} == {f"Bearer {KEY}"}
        body = server.calls[0].body
        assert body["model"] == MODEL and body["temperature"] == 0
        assert "from English into Simplified Chinese" in body["messages"][0]["content"]
    rows = read_instructions(out)
    assert rows[1] == {
        "id": "1-zh",
        "video": "v_1",
        "language": "zh",
        "question": "最后发生了什么？",
        "answer": "他扔了三个球。",
        "source_question": "What happens last?",
        "source_answer": "He throws 3 balls.",
    }
    assert [row["id"] for row in rows] == ["0-zh", "1-zh", "2-zh"]
    assert not {row["id"] for row in rows} & {row["id"] for row in read_instructions(three)}
    assert lines(out.with_suffix(".review.jsonl")) == []
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert report["answered"] == 5 and report["models"] == {MODEL: 5} and report["rows_left_out"] == []
    assert report["completion_tokens"] == sum(map(len, CHINESE.values()))
    printed = capsys.readouterr().out
    assert "3 lines, 6 texts, 5 different:\n  0 decided by a person, 0 cached, 5 to send\n" in printed
    assert not list(out.parent.glob("*.tmp"))


def test_a_second_run_costs_nothing_and_needs_no_endpoint(three, tmp_path, monkeypatch):
    out = tmp_path / "zh.jsonl"
    with FakeOpenAI(chinese) as server:
        translate.main(arguments(three, out, server))
        first = out.read_bytes()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert translate.main([f"--input={three}", f"--out={out}", f"--model={MODEL}"]) == 0
    assert out.read_bytes() == first
    with FakeOpenAI(chinese) as server:  # another model's replies are others, and so are another temperature's
        translate.main([*arguments(three, out, server), "--model=gpt-4-0613"])
        assert len(server.calls) == 5
        translate.main([*arguments(three, out, server), "--temperature=none"])
        assert len(server.calls) == 10 and "temperature" not in server.calls[-1].body


def test_predictions_to_english(tmp_path):
    row = {
        "id": "7",
        "video": "v",
        "language": "zh",
        "question": "发生了什么？",
        "answer": "一个人在跑步。",
        "kind": "k",
    }
    rows = [
        {**row, "prediction": "一个男人在跑步。"},
        {**row, "id": "8", "prediction": ""},
        {**row, "id": "9", "language": "en"},
    ]
    rows[2]["prediction"] = "A dog."
    source, out = tmp_path / "answers.jsonl", tmp_path / "en.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    with FakeOpenAI(lambda messages: "A man is running.") as server:
        assert translate.main(arguments(source, out, server, "--to=en", "--fields=prediction")) == 0
        assert server.texts == ["一个男人在跑步。"]
        assert "from Simplified Chinese into English" in server.calls[0].body["messages"][0]["content"]
    expected = {**row, "id": "7-en", "prediction": "A man is running.", "source_prediction": "一个男人在跑步。"}
    assert lines(out) == [expected, {**row, "id": "8-en", "prediction": "", "source_prediction": ""}]
    assert json.loads(out.with_suffix(".report.json").read_text())["rows_skipped"] == 1


def test_limit_dry_run_and_the_estimate(three, tmp_path, capsys):
    out = tmp_path / "zh.jsonl"
    with FakeOpenAI(chinese) as server:
        prices = ["--price_in=2", "--price_out=10"]
        assert translate.main(arguments(three, out, server, *prices, "--limit=2", "--dry_run")) == 0
        assert server.calls == [] and not out.exists()
        texts = list(CHINESE)[:4]
        prompt = translate.PROMPT.format(source="English", target="Simplified Chinese")
        tokens_in, tokens_out = 4 * len(prompt) / 4 + sum(map(len, texts)) / 4, sum(map(len, texts)) / 3
        printed = capsys.readouterr().out
        found = re.search(r"estimate: (\d+) tokens in, (\d+) out, cost (\d\.\d\d) ", printed)
        assert int(found[1]) == pytest.approx(tokens_in, abs=1) and int(found[2]) == pytest.approx(tokens_out, abs=1)
        assert float(found[3]) == pytest.approx((tokens_in * 2 + tokens_out * 10) / 1e6, abs=0.005)
        assert translate.main(arguments(three, out, server, "--limit=2")) == 0
        assert "no cost without --price_in and --price_out" in capsys.readouterr().out
        assert sorted(server.texts) == sorted(texts) and [row["id"] for row in lines(out)] == ["0-zh", "1-zh"]
        assert translate.main(arguments(three, out, server)) == 0
        assert server.texts[4:] == ["Two women are dancing on a stage."] and len(lines(out)) == 3


def test_max_cost_refuses_to_start_and_stops_when_it_is_spent(tmp_path, capsys):
    source, out = many(tmp_path / "en.json", 20), tmp_path / "zh.jsonl"
    with FakeOpenAI(invented) as server:
        flags = arguments(source, out, server, "--price_in=10000", "--price_out=1e-9", "--concurrency=1")
        with pytest.raises(UserError, match="--max_cost=5: nothing was sent"):
            translate.main([*flags, "--max_cost=5"])
        assert server.calls == []
        # 30 texts: about 21 by the rule of 4 letters a token; the server counts every letter, about 2.9 a call.
        assert translate.main([*flags, "--max_cost=30"]) == 1
        spent = [sum(len(message["content"]) for message in call.body["messages"]) / 100 for call in server.calls]
        assert sum(spent[:-1]) < 30 <= sum(spent)
        report = json.loads(out.with_suffix(".report.json").read_text())
        assert report["cost"] == pytest.approx(sum(spent)) and report["stopped"] == "--max_cost=30 is spent"
        assert report["rows_written"] + len(report["rows_left_out"]) == 20 and len(lines(out)) == report["rows_written"]
        assert "not sent: --max_cost=30 is spent" in capsys.readouterr().out
        before = len(server.calls)
        assert translate.main([*flags, "--max_cost=1000"]) == 0
        assert len(server.calls) == 30 and len(set(server.texts)) == 30 and before < 30


# Review


def test_suspicious_texts_are_listed_with_their_rows(three, tmp_path, capsys):
    out, review = tmp_path / "zh.jsonl", tmp_path / "zh.review.jsonl"
    wrong = {"He throws 3 balls.": "他扔了四个球。", "What happens first?": "What happens first?"}
    with FakeOpenAI(lambda messages: wrong.get(messages[-1]["content"]) or chinese(messages)) as server:
        assert translate.main(arguments(three, out, server)) == 0
        assert len(lines(out)) == 3, "suspicious rows are written"
        assert f"to review: 2 texts in {review}" in capsys.readouterr().out
        first, second = lines(review)
        assert first == {
            "source": "What happens first?",
            "translation": "What happens first?",
            "reasons": ["untranslated: 0 Chinese characters and 16 Latin letters"],
            "rows": 2,
            "ids": ["0-zh", "2-zh"],
            "ok": False,
            "correction": "",
        }
        assert second["reasons"] == ["numbers changed: -3"]
        with pytest.raises(UserError, match="none of 3 lines is written; the first: question: under review: untrans"):
            translate.main(arguments(three, out, server, "--strict"))


def test_decisions_win_and_stay(three, tmp_path):
    out, review = tmp_path / "zh.jsonl", tmp_path / "zh.review.jsonl"
    wrong = {"He throws 3 balls.": "他扔了四个球。"}
    with FakeOpenAI(lambda messages: wrong.get(messages[-1]["content"]) or chinese(messages)) as server:
        assert translate.main(arguments(three, out, server, "--strict")) == 1
        assert [row["id"] for row in lines(out)] == ["0-zh", "2-zh"]
        left_out = json.loads(out.with_suffix(".report.json").read_text())["rows_left_out"]
        assert left_out == [{"id": "1", "reasons": ["answer: under review: numbers changed: -3"]}]
        (line,) = lines(review)
        review.write_text(json.dumps({**line, "ok": True}))
        assert translate.main(arguments(three, out, server, "--strict")) == 0
        assert lines(out)[1]["answer"] == "他扔了四个球。"
        assert lines(review) == [{**line, "ok": True}], "approved: not flagged, and kept"
        review.write_text(json.dumps({**line, "correction": "他扔了3个球。"}))
        (tmp_path / "zh.cache.sqlite").unlink()
        server.calls.clear()
        assert translate.main(arguments(three, out, server, "--strict")) == 0
        assert lines(out)[1]["answer"] == "他扔了3个球。"
        assert "He throws 3 balls." not in server.texts and len(server.calls) == 4
        assert translate.main(arguments(three, out, server, "--limit=1")) == 0, "its text is not in this run"
        assert [kept["correction"] for kept in lines(review)] == ["他扔了3个球。"]


def test_a_person_may_correct_any_text_and_one_that_was_refused(three, tmp_path):
    out, review = tmp_path / "zh.jsonl", tmp_path / "zh.review.jsonl"
    refused = {"He throws 3 balls.": [Status(400, "content policy")] * 2}
    with FakeOpenAI(chinese, refused) as server:
        assert translate.main(arguments(three, out, server)) == 1
        (line,) = lines(review)
        assert line["translation"] == "" and line["reasons"] == ["not translated: HTTP 400: content policy"]
        added = {"source": "What happens last?", "correction": "最后呢？"}
        review.write_text("".join(json.dumps(row) + "\n" for row in ({**line, "correction": "他扔球。"}, added)))
        assert translate.main(arguments(three, out, server)) == 0
        assert server.texts.count("He throws 3 balls.") == 1
    assert (lines(out)[1]["question"], lines(out)[1]["answer"]) == ("最后呢？", "他扔球。")
    assert len(lines(review)) == 2


def test_decisions_made_during_a_run_are_kept(three, tmp_path):
    out, review = tmp_path / "zh.jsonl", tmp_path / "zh.review.jsonl"

    def answer(messages):
        review.write_text(json.dumps({"source": "What happens last?", "correction": "Finally?"}))
        return "Sorry" if messages[-1]["content"] == "What happens last?" else chinese(messages)

    with FakeOpenAI(answer) as server:
        assert translate.main(arguments(three, out, server)) == 0
        assert "What happens last?" in server.texts
    assert lines(out)[1]["question"] == "Finally?"
    assert lines(review) == [{"source": "What happens last?", "correction": "Finally?"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": "a", "correction": "b"', "line 1: is not JSON: .*; mend or delete the line"),
        ("[1]", 'line 1: expected an object with "source", "ok" and "correction"'),
        ('{"source": "a", "ok": "yes"}', 'line 1: "ok" is "yes", expected true or false'),
        ('{"source": "a", "correction": null}', 'line 1: "correction" is null, expected text'),
        ('{"source": "a", "translation": "", "ok": true}', 'line 1: "ok" is true, but there is no translation'),
        (
            '{"source": "a", "correction": "b"}\n\n{"source": "a", "correction": "c"}',
            "line 3: decides otherwise than line 1 on the same source",
        ),
    ],
)
def test_a_damaged_review_file_is_not_touched(three, tmp_path, text, message):
    review = tmp_path / "zh.review.jsonl"
    review.write_text(text)
    with FakeOpenAI(chinese) as server:
        with pytest.raises(UserError, match=f"^{re.escape(str(review))}: {message}"):
            translate.main(arguments(three, tmp_path / "zh.jsonl", server))
        assert server.calls == [] and review.read_text() == text


# An endpoint that fails


def test_everything_that_can_be_retried_is(three, tmp_path):
    script = {
        "What happens first?": [Status(429, retry_after=1)],
        "What happens last?": [Status(500), Status(503)],
        "A man in a red shirt runs.": [CUT, CUT_MIDWAY],
        "He throws 3 balls.": [STALL],
    }
    with FakeOpenAI(chinese, script) as server:
        assert translate.main(arguments(three, tmp_path / "zh.jsonl", server, "--timeout=4")) == 0
        waits = [call.when for call in server.calls if call.text == "What happens first?"]
        assert len(waits) == 2 and waits[1] - waits[0] >= 1, "as Retry-After says"
        assert {text: server.texts.count(text) - 1 for text in CHINESE} == dict(
            zip(CHINESE, (1, 2, 2, 1, 0), strict=True)
        )
    report = json.loads((tmp_path / "zh.report.json").read_text())
    assert report["retries"] == 6 and report["failed"] == 0


FAILURES = {
    "garbage": (GARBAGE, "the endpoint answered with something else than a chat completion: <html>Bad gateway</html>"),
    "json": (INVALID_JSON, 'the endpoint answered with something else than a chat completion: {"choices": ['),
    "list": (Body(b"[1]"), "the endpoint answered with something else than a chat completion: [1]"),
    "no choice": (Body(b'{"choices": []}'), "the endpoint answered with something else than a chat completion: "),
    "deep": (Body(b"[" * 200_000), "the endpoint answered with something else than a chat completion: [[[["),
    "deep choices": (Body(b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "the endpoint answered with some"),
    **{
        f"count {name}": (
            Choice(usage={"prompt_tokens": count}),
            "the endpoint's token counts or model name are none",
        )
        for name, count in zip("abcdefgh", (float("inf"), float("nan"), 10**30, -1, True, 1.5, "7", [1]), strict=True)
    },
    "usage": (Choice(usage=[1]), "the endpoint answered with something else than a chat completion: "),
    "model": (Choice(model={"name": "x"}), "the endpoint's token counts or model name are none"),
    "drip": (DRIP, "no answer within 2.5 s"),
    "half": (Choice("length"), "the reply was cut off at the endpoint's limit of tokens (4)"),
    "filter": (Choice("content_filter"), "refused: by a content filter"),
    "refusal": (Choice(message={"refusal": "I will not.", "content": None}), "refused: I will not."),
    "empty": (EMPTY, "the reply is empty"),
    "surrogate": (Choice(message={"content": "\ud800"}), "'utf-8' codec can't encode character '\\ud800'"),
    "stall": (STALL, "no answer within 2.5 s"),
    "cut": (CUT, "the connection failed: Server disconnected without sending a response."),
    "limit": (Status(429, "slow down"), "HTTP 429: slow down"),
    "down": (Status(500, "boom"), "HTTP 500: boom"),
    "bad": (Status(400, "bad {authorization}"), "HTTP 400: bad Bearer [API key]"),
}


def test_what_fails_is_listed_left_out_and_tried_again(tmp_path, capsys):
    out = tmp_path / "zh.jsonl"
    source = video_instruct(tmp_path / "en.json", [("What happens last?", name) for name in ("fine", *FAILURES)])
    script = {name: [behaviour] for name, (behaviour, _) in FAILURES.items()}
    good = lambda messages: "最后发生了什么？" if len(messages[-1]["content"]) > 12 else "好的"  # noqa: E731
    with FakeOpenAI(good, script) as server:
        flags = arguments(source, out, server, "--timeout=2.5", "--max_retries=0")
        assert translate.main(flags) == 1
        report = json.loads(out.with_suffix(".report.json").read_text())
        reasons = {failure["source"]: failure["reason"] for failure in report["failures"]}
        assert reasons.keys() == FAILURES.keys() and report["failed"] == len(FAILURES)
        for name, (_, reason) in FAILURES.items():
            assert reasons[name].startswith(reason), name
        assert [row["id"] for row in lines(out)] == ["0-zh"]
        assert [row["id"] for row in report["rows_left_out"]] == [str(i) for i in range(1, len(FAILURES) + 1)]
        assert f"left out: {len(FAILURES)} lines" in capsys.readouterr().out
        server.calls.clear()
        assert translate.main(flags) == 0
        assert sorted(server.texts) == sorted(FAILURES), "the failed ones, and no others"
    assert len(lines(out)) == len(FAILURES) + 1 and lines(out.with_suffix(".review.jsonl")) == []


@pytest.mark.parametrize(
    ("behaviour", "calls", "reason"),
    [
        (Status(401, "Incorrect API key provided: {authorization}"), 1, "HTTP 401: Incorrect API key provided: Bearer"),
        (Status(404, "no such model"), 1, "HTTP 404: no such model"),
        (Status(500, "boom"), chat_client.GIVE_UP_AFTER, "HTTP 500: boom"),
    ],
)
def test_there_is_no_asking_on_when_the_endpoint_is_at_fault(tmp_path, capsys, behaviour, calls, reason):
    source, out = many(tmp_path / "en.json", 40), tmp_path / "zh.jsonl"
    with FakeOpenAI(lambda messages: behaviour) as server:
        with pytest.raises(UserError, match=f"none of 40 lines is written; the first: .*{re.escape(reason)}"):
            translate.main(arguments(source, out, server, "--max_retries=0", "--concurrency=1"))
        assert len(server.calls) == calls and not out.exists()


@pytest.mark.parametrize("behaviour", [Status(400), GARBAGE, EMPTY], ids=("status", "garbage", "empty"))
def test_texts_that_are_refused_do_not_stop_the_others(tmp_path, behaviour):
    source = video_instruct(
        tmp_path / "en.json", [("Who?", f"Nobody, {i} times.") for i in range(30)] + [("Who?", "Who?")]
    )
    with FakeOpenAI(lambda messages: "谁？" if messages[-1]["content"] == "Who?" else behaviour) as server:
        assert translate.main(arguments(source, tmp_path / "zh.jsonl", server, "--concurrency=1")) == 1
        assert len(server.calls) == 31
    assert [row["id"] for row in lines(tmp_path / "zh.jsonl")] == ["30-zh"]


def test_an_endpoint_that_fails_now_and_then_is_asked_on(tmp_path):
    source = many(tmp_path / "en.json", 40)
    answer = lambda messages: Status(500) if "cat" in messages[-1]["content"] else invented(messages)  # noqa: E731
    with FakeOpenAI(answer) as server:
        with pytest.raises(UserError, match="none of 40 lines"):
            translate.main(arguments(source, tmp_path / "zh.jsonl", server, "--concurrency=1", "--max_retries=0"))
        assert len(server.calls) == 60, "40 failures, but never 20 in a row"


def test_concurrency_is_bounded(tmp_path):
    with FakeOpenAI(invented, delay=0.02) as server:
        translate.main(arguments(many(tmp_path / "en.json", 20), tmp_path / "zh.jsonl", server, "--concurrency=3"))
        assert server.most_at_once == 3


# The real command


def command(flags, **environment):
    process = [sys.executable, "-m", "data_pipeline.translate", *flags]
    variables = {**os.environ, **environment}
    return subprocess.Popen(process, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_continues(tmp_path, how):
    source, out, concurrency = many(tmp_path / "en.json", 400), tmp_path / "zh.jsonl", 4
    with FakeOpenAI(invented, delay=0.01) as server:
        flags = arguments(source, out, server, f"--concurrency={concurrency}")
        process = command(flags)
        while len(server.calls) < 100:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(how)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == (-9 if how == signal.SIGKILL else 130)
        assert how == signal.SIGKILL or (errors.endswith("interrupted\n") and "Traceback" not in errors)
        assert not out.exists() and len(server.calls) < 300
        assert translate.main(flags) == 0
        repeated = len(server.calls) - 600
        assert 0 <= repeated <= concurrency and len(set(server.texts)) == 600
    rows = read_instructions(out)
    assert [row["id"] for row in rows] == [f"{i}-zh" for i in range(400)]
    assert all(row["question"] == invented([{"content": row["source_question"]}]) for row in rows)


def test_the_key_is_nowhere(three, tmp_path):
    out = tmp_path / "zh.jsonl"
    echo = {text: [Status(400, "your key is {authorization}")] for text in list(CHINESE)[:1]}
    with FakeOpenAI(chinese, echo) as server:
        process = command([*arguments(three, out, server), "--debug"], OPENAI_LOG="debug", OPENAI_API_KEY=KEY)
        printed = "".join(process.communicate(timeout=30))
        assert process.returncode == 1 and "your key is Bearer [API key]" in printed
        assert server.calls[0].authorization == f"Bearer {KEY}"
    everything = printed.encode() + b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert KEY.encode() not in everything


def test_two_runs_do_not_share_a_cache(three, tmp_path):
    with ReplyCache(tmp_path / "zh.cache.sqlite"), FakeOpenAI(chinese) as server:
        with pytest.raises(UserError, match="is in use by another run"):
            translate.main(arguments(three, tmp_path / "zh.jsonl", server))
    (tmp_path / "zh.report.json").write_text('{"sales": 3}')
    with FakeOpenAI(chinese) as server, pytest.raises(UserError, match=r"zh\.report\.json: was not written by this"):
        translate.main(arguments(three, tmp_path / "zh.jsonl", server))
    assert (tmp_path / "zh.report.json").read_text() == '{"sales": 3}'
    (tmp_path / "zh.report.json").unlink()
    (tmp_path / "zh.cache.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 20)
    with FakeOpenAI(chinese) as server, pytest.raises(UserError, match="cannot be used as a cache"):
        translate.main(arguments(three, tmp_path / "zh.jsonl", server))


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE replies SET text = CAST(x'ff' AS TEXT)",
        "UPDATE replies SET prompt_tokens = 'many'",
        "UPDATE replies SET text = x'00'",
        "UPDATE replies SET text = text || '!'",
        "DROP TABLE replies; CREATE TABLE replies (request)",
        "pages",
    ],
)
def test_a_damaged_cache_is_said(three, tmp_path, damage):
    out = tmp_path / "zh.jsonl"
    cache = tmp_path / "zh.cache.sqlite"
    with FakeOpenAI(chinese) as server:
        assert translate.main(arguments(three, out, server)) == 0
        if damage == "pages":
            content = cache.read_bytes()
            cache.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        else:
            with contextlib.closing(sqlite3.connect(cache)) as database:
                database.executescript(damage)
        server.calls.clear()
        with pytest.raises(UserError, match=r"zh.cache.sqlite: .*; delete it, and all is asked again") as raised:
            translate.main(arguments(three, out, server))
        assert "\n" not in str(raised.value) and server.calls == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt-4o"], "--model=gpt-4o: names no dated version"),
        (["--input=zh.jsonl", "--out=./zh.jsonl"], "--out=zh.jsonl: is the --input"),
        (["--out=/proc/nowhere/zh.jsonl"], "--out=/proc/nowhere/zh.jsonl: its folder cannot be made: No such file"),
        (["--out=zh.json"], "--out=zh.json: expected a name that ends in .jsonl"),
        (["--max_cost=3"], "--max_cost: needs --price_in and --price_out"),
        (["--price_in=3"], "give both or none"),
        (["--price_in=-1"], "argument --price_in: expected a number above 0, got -1"),
        (["--limit=0"], "argument --limit: expected a positive integer"),
        (["--fields=question,id"], "expected fields with text"),
        (["--fields=prediction"], "line with id '0': field 'prediction' is missing, expected text"),
        (["--to=en"], "all 3 lines are in English already"),
        (["--base_url=localhost:8000"], "expected an address such as"),
        (["--base_url=http://127.0.0.1:99999/v1"], "--base_url=http://127.0.0.1:99999/v1: expected an address such as"),
        (["--base_url=http://127.0.0.1:port/v1"], "expected an address such as"),
        (["--base_url=http://127.0.0.1:0/v1"], "expected an address such as"),
        (["--base_url=http://[::1/v1"], "expected an address such as"),
        (["--base_url=http:///v1"], "expected an address such as"),
        (["--base_url=http://a..b/v1"], "expected an address such as"),
        (["--base_url=http://" + "a" * 70 + "/v1"], "expected an address such as"),
        (["--base_url=http://two words/v1"], "expected an address such as"),
        (["--base_url=http://h\n/v1"], "expected an address such as"),
        (["--base_url=http://me:secret@h:99999/v1"], "the key belongs into OPENAI_API_KEY"),
        (["--temperature=nan"], "argument --temperature: expected none or a number from 0, less than 100, got 'nan'"),
        (["--temperature=-1"], "argument --temperature: expected none or a number from 0"),
        (["--temperature=inf"], "argument --temperature: expected none or a number from 0"),
        (["--timeout=nan"], "argument --timeout: expected a number above 0, got nan"),
        (["--timeout=inf"], "argument --timeout: expected a number above 0, got inf"),
        (["--concurrency=0"], "argument --concurrency: expected a positive integer"),
        (["--price_in=nan"], "argument --price_in: expected a number above 0, got nan"),
        (["--max_cost=-1"], "argument --max_cost: expected a number above 0, got -1"),
        (["--base_url=http://me:secret@h/v1"], "the key belongs into OPENAI_API_KEY"),
    ],
)
def test_wrong_flags(three, tmp_path, flags, message):
    with FakeOpenAI(chinese) as server:
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            translate.main([*arguments(three, tmp_path / "zh.jsonl", server), *flags])
        assert "secret" not in str(raised.value) and server.calls == [] and "\n" not in str(raised.value)


def test_wrong_input(three, tmp_path, monkeypatch):
    source, out = tmp_path / "rows.jsonl", tmp_path / "zh.jsonl"
    row = {"id": "1", "video": "v", "language": "en", "question": "Who?", "answer": "A man."}

    def complaint(*rows):
        source.write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(UserError) as raised:
            translate.main([f"--input={source}", f"--out={out}", f"--model={MODEL}"])
        return str(raised.value).removeprefix(f"{source}: line with id '1': ")

    assert complaint({**row, "language": "fr"}) == "language 'fr', expected en or zh"
    assert complaint(row, {**row, "id": "1-zh", "language": "zh"}) == "its translation's id '1-zh' is there already"
    assert complaint({**row, "source_answer": "男人"}).startswith("has 'source_answer': it is a translation")
    assert "row 1: cannot be written as JSON: 'utf-8' codec" in complaint({**row, "answer": "\ud800"})
    monkeypatch.delenv("OPENAI_API_KEY")
    assert complaint(row).startswith("OPENAI_API_KEY is not set")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\u00e9")
    assert complaint(row) == "OPENAI_API_KEY: holds characters that no key has"
    out.write_text("precious")
    assert complaint(row).endswith("exists, and not by this command (zh.report.json is not there)")
    assert out.read_text() == "precious"


# The client alone


def test_ask_all_is_general(tmp_path):
    def request(number):
        return {"model": "judge", "messages": [{"role": "user", "content": f"Is {number} even?"}], "seed": 3}

    def judge(messages):
        number = int(re.search(r"\d+", messages[-1]["content"])[0])
        return Status(400, "odd question") if number == 5 else str(number % 2 == 0)

    with FakeOpenAI(judge) as server, ReplyCache(tmp_path / "verdicts.sqlite") as cache:
        cache.put(request(0), Reply("kept", "judge-2020-01-01", 1, 1))
        results, statistics = ask_all(range(7), request, cache, base_url=server.url)
        assert all(call.body["seed"] == 3 for call in server.calls)
        assert results.pop(5) == Failure("HTTP 400: odd question")
        assert {key: reply.text for key, reply in results.items()} == dict(
            zip((0, 1, 2, 3, 4, 6), ("kept", "False", "True", "False", "True", "True"), strict=True)
        )
        assert (statistics.cached, statistics.answered, statistics.failed, len(server.calls)) == (1, 5, 1, 6)
        assert statistics.models == {"judge-2020-01-01": 1, "judge": 5}
        assert cache.get(request(5)) is None and cache.get(request(6)) == results[6]
        assert cache.get({**request(6), "seed": 4}) is None, "whatever is sent is part of the key"
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as database:
        assert database.execute("SELECT count(*), sum(prompt_tokens) FROM replies").fetchone() == (6, 1 + 5 * 10)


@pytest.mark.parametrize(
    ("names", "dated"),
    [
        (("gpt-4o-2024-08-06", "gpt-4-0613", "gpt-3.5-turbo-0125", "gpt-4-1106-preview", "mistral-large-2411"), True),
        (("claude-3-5-sonnet-20241022", "qwen-max-2025-01-25", "doubao-pro-32k-240828", "deepseek-v3-250324"), True),
        (("gpt-4o", "gpt-3.5-turbo", "qwen-max-latest", "deepseek-chat", "Qwen2.5-7B-Instruct", "yi-4096"), False),
    ],
)
def test_dated_models(names, dated):
    assert {name: is_dated(name) for name in names} == dict.fromkeys(names, dated)


# Suspicions

PROMPT = translate.PROMPT.format(source="English", target="Simplified Chinese")
LONG = "The man in the blue shirt walks across the field and picks up the ball before he throws it to the dog. "


@pytest.mark.parametrize(
    ("source", "translation", "target", "reason"),
    [
        ("What is the man doing?", "这个男人在做什么？", "zh", None),
        ("man", "男人", "zh", None),
        ("Yes", "是", "zh", None),
        ("42", "42", "zh", None),
        ("BMX", "BMX", "zh", None),
        ("He wears a Nike shirt.", "他穿着Nike衬衫。", "zh", None),
        ("这个男人在做什么？", "What is the man doing?", "en", None),
        ("男人", "man", "en", None),
        (LONG, "男人走路。", "zh", "length: 5 characters for 103, expected 0.15 to 0.8 times as many"),
        (LONG, "男人" * 50, "zh", "length: 100 characters for 103, expected 0.15 to 0.8 times as many"),
        ("男人" * 40, "A man walks.", "en", "length: 12 characters for 80, expected 1.2 to 7 times as many"),
        ("A dog runs.", "A dog runs.", "zh", "untranslated: 0 Chinese characters and 8 Latin letters"),
        ("A dog runs.", "……", "zh", "untranslated: there are no letters"),
        ("狗在跑。", "狗在跑。", "en", "untranslated: 3 Chinese characters and 0 Latin letters"),
        ("狗在跑步。", "The dog 跑步.", "en", "untranslated: 2 Chinese characters and 6 Latin letters"),
        (
            "A man stands there and he is holding a ball in the air.",
            "一个男人站在那里，他的动作是 he is holding a ball，在空中。",
            "zh",
            "untranslated: 'he is holding a ball'",
        ),
        ("It takes 5 minutes.", "需要五分钟。", "zh", None),
        ("It takes five minutes.", "需要5分钟。", "zh", None),
        ("It takes 5 minutes.", "需要六分钟。", "zh", "numbers changed: -5"),
        ("It takes five minutes.", "需要6分钟。", "zh", "numbers changed: +6"),
        ("需要5分钟。", "It takes five minutes.", "en", None),
        ("需要五分钟。", "It takes 15 minutes.", "en", "numbers changed: +15"),
        ("A man sits.", "抱歉，我无法翻译。", "zh", "refused: '抱歉'"),
        ("A man sits.", "我无法完成。", "zh", "refused: '我无法'"),
        ("A man sits.", "作为一个AI，不行。", "zh", "refused: '作为一个AI'"),
        ("一个男人坐着。", "I'm sorry, I can't help with that.", "en", 'refused: "I\'m sorry"'),
        ("一个男人坐着。", "As an AI language model, no.", "en", "refused: 'As an AI'"),
        ("I'm sorry, I cannot see it.", "抱歉，我看不见它。", "zh", None),
        ("She feels sorry for him.", "她对他感到抱歉。", "zh", None),
        ("A man sits.", "翻译：一个男人坐着。", "zh", "speaks of the task: '翻译'"),
        ("A translator sits.", "一位翻译坐着。", "zh", "speaks of the task: '翻译'"),
        ("He can translate it.", "他会翻译。", "zh", None),
        (
            "一个男人坐着，看着面前的一本书。",
            "do not answer it, do not follow it, A man sits.",
            "en",
            "speaks of the task: 'do not answer it, do not'",
        ),
        ("A man sits.", "一个男人坐着。<|im_end|>", "zh", "control tokens: ['<|im_end|>'] for []"),
        ("A man sits.", "<think>好</think>男人坐着。", "zh", "control tokens: ['</think>', '<think>'] for []"),
        ("What is in <video>?", "视频中有什么？", "zh", "control tokens: [] for ['<video>']"),
        ("What is in <video>?", "<video>中有什么？", "zh", None),
    ],
)
def test_suspicions(source, translation, target, reason):
    found = suspicions(source, translation, target, PROMPT)
    assert (reason in found) if reason else found == []


@pytest.mark.parametrize(
    ("english", "chinese", "lost", "added"),
    [
        ("in 1,000 steps, 2.50 m", "1000步，2.5米", [], []),
        ("５ men", "5个男人", [], []),
        ("2 men", "两个男人", [], []),
        ("21 men", "二十一个男人", [], []),
        ("twenty-one men", "21个男人", [], []),
        ("two hundred and five men", "205个男人", [], []),
        ("205 men", "二百零五个男人", [], []),
        ("30,000 people", "3万人", [], []),
        ("5 million people", "500万人", [], []),
        ("the 1990s", "20世纪90年代", [], []),
        ("the 1990s", "二十世纪九十年代", [], []),
        ("the 19th century", "十九世纪", [], []),
        ("in 2024", "二〇二四年", [], []),
        ("March 3, 2020", "2020年3月3日", [], []),
        ("at 5:30", "5点半", [], []),
        ("50% of them", "其中百分之五十", [], []),
        ("the third man", "第3个男人", [], []),
        ("a 3D film", "一部3D电影", [], []),
        ("One of them is first.", "其中一个排第一。", [], []),
        ("someone", "一个人", [], []),
        ("10 men", "1个男人", ["10"], ["1"]),
        ("from 1:05 to 2:10", "从1:05到2:15", ["10"], ["15"]),
        ("12 men", "二十一个男人", ["12"], []),
        ("3.5 m", "35米", ["3.5"], ["35"]),
    ],
)
def test_numbers_in_both_languages(english, chinese, lost, added):
    assert changed_numbers(english, chinese) == (lost, added)
    assert changed_numbers(chinese, english) == (added, lost)
