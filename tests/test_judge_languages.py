"""The two Chinese protocols, through data_pipeline.translate, and what the judge is shown in each."""

import json

import pytest

from data_pipeline import translate
from data_pipeline.common.errors import UserError
from redvillm_jax import judge
from tests.fake_openai import FakeOpenAI
from tests.test_judge import MODEL, always, answers, environment, flags, lines, means_of, row

__all__ = ["environment"]  # a fixture for every test here, too
WORDS = {
    "What is it?": "这是什么？",
    "A dog.": "一条狗。",
    "它是一条狗。": "It is a dog.",
    "一条狗。": "The dog.",
    "这是什么？": "What's that?",
}


def to(language, source, out, *more):
    with FakeOpenAI(lambda messages: WORDS[messages[-1]["content"]]) as server:
        arguments = [f"--input={source}", f"--out={out}", f"--to={language}", f"--model={MODEL}"]
        assert translate.main([*arguments, f"--base_url={server.url}", *more]) == 0
    return out


def english():
    return row(0, None) | {"question": "What is it?", "answer": "A dog."}


@pytest.fixture
def asked_in_chinese(tmp_path):
    """English questions, translated to be asked in Chinese, and answered in Chinese; one could not be answered."""
    questions = tmp_path / "en.jsonl"
    fields = ("id", "video", "language", "question", "answer", "benchmark")
    rows = [{key: row[key] for key in fields} for row in (english(), english() | {"id": "1"})]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in to("zh", questions, tmp_path / "zh.jsonl").read_text().splitlines()]
    assert rows[0]["question"] == "这是什么？" and rows[0]["source_question"] == "What is it?"
    said = ["它是一条狗。", None]
    rows = [
        row | {"prediction": text} | ({} if text else {"error": "gone"}) for row, text in zip(rows, said, strict=True)
    ]
    return answers(tmp_path / "answers", rows)


def test_chinese_is_judged_as_it_is(asked_in_chinese, tmp_path):
    with FakeOpenAI(always) as server:
        assert judge.main(flags(asked_in_chinese, tmp_path / "cn", server)) == 0
        (text,) = server.texts
    assert "Question: 这是什么？\nCorrect answer: 一条狗。\nPredicted answer: 它是一条狗。\n" in text
    assert [line["language"] for line in lines(tmp_path / "cn")] == ["zh", "zh"]


def test_predictions_in_english_are_judged_against_the_english_annotations(asked_in_chinese, tmp_path):
    source = to("en", asked_in_chinese / "answers.jsonl", tmp_path / "en_answers.jsonl", "--fields=prediction")
    with FakeOpenAI(always) as server:
        assert judge.main(flags(source, tmp_path / "en", server)) == 0
        (text,) = server.texts
    assert "Question: What is it?\nCorrect answer: A dog.\nPredicted answer: It is a dog.\n" in text
    first, second = lines(tmp_path / "en")
    assert (first["id"], first["question_id"], first["language"]) == ("0-zh-en", "0", "en")
    assert (second["status"], second["reason"]) == ("unanswered", "gone")
    assert means_of(tmp_path / "en", "activitynet_qa", "exact_match")["all"] == 0
    assert means_of(tmp_path / "en", "activitynet_qa", "f1")["all"] == pytest.approx(0.5), "it is dog, dog"


def test_questions_that_were_chinese_are_translated_with_the_predictions(tmp_path):
    chinese = row(0, "它是一条狗。") | {"language": "zh", "question": "这是什么？", "answer": "一条狗。"}
    source = answers(tmp_path / "a", [chinese]) / "answers.jsonl"
    alone = to("en", source, tmp_path / "alone.jsonl", "--fields=prediction")
    with FakeOpenAI(always) as server:
        with pytest.raises(UserError) as error:
            judge.main(flags(alone, tmp_path / "j", server))
        assert str(error.value) == (
            f"{alone}: answer with id '0-en': its prediction was translated (en), its question and answer were not "
            "(zh); translate all: --fields=question,answer,prediction"
        )
        every = to("en", source, tmp_path / "every.jsonl", "--fields=question,answer,prediction")
        assert judge.main(flags(every, tmp_path / "j", server)) == 0
        (text,) = server.texts
    assert "Question: What's that?\nCorrect answer: The dog.\nPredicted answer: It is a dog.\n" in text


def test_systems_asked_in_two_languages_are_compared_on_the_english_questions(asked_in_chinese, tmp_path, capsys):
    source = to("en", asked_in_chinese / "answers.jsonl", tmp_path / "en_answers.jsonl", "--fields=prediction")
    other = answers(
        tmp_path / "other", [english() | {"prediction": "A cat."}, english() | {"id": "1", "prediction": "x"}]
    )
    verdict = lambda messages: always(messages) if "dog.\n\n" in messages[-1]["content"] else "{'pred':'no','score':1}"  # noqa: E731
    with FakeOpenAI(verdict) as server:
        judge.main(flags(source, tmp_path / "qwen", server))
        judge.main(flags(other, tmp_path / "llava", server))
    capsys.readouterr()
    assert judge.main(["--compare", str(tmp_path / "llava"), str(tmp_path / "qwen")]) == 0
    printed = capsys.readouterr().out
    assert "activitynet_qa: 1 in common, 1 only in" in printed and "+100.0 [too few videos]" in printed
