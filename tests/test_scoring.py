"""Scores without a judge: options in free text, yes and no, short answers, and what sets report by."""

import pytest

from data_pipeline.common.errors import UserError
from redvillm_jax.evaluation.choices import chosen, option, yes_or_no
from redvillm_jax.evaluation.scoring import score, summarize
from redvillm_jax.evaluation.short_answers import exact_match, token_f1

ANIMALS = ("A. cat", "B. the dog", "C. bird", "D. a red bird")
CAPTIONS = ("Option 1: He runs.", "Option 2: He sits: now.")
SENTENCES = ("Sentence A: He runs.", "Sentence B: He sits.")
NUMBERS = ("A. 3", "B. 1", "C. 2.5", "D. 3:30")


@pytest.mark.parametrize(
    ("choices", "label", "predictions"),
    [
        (ANIMALS, "A", "A|a|A.|A cat|a cat|A cat is sleeping|A is correct|The answer is A because he runs"),
        (ANIMALS, "B", "B|b.|(B)|(B) the dog|B) dog|B: dog|B - the dog|B\nIt runs.|The dog|the dog.|Ｂ|B。|**B**"),
        (
            ANIMALS,
            "B",
            "The answer is B|The answer is (B).|Answer: B|the answer is: “B”|The correct answer is B, a dog",
        ),
        (ANIMALS, "B", "I think it is B.|It's not A, it's B|My answer: option B|It is the dog|A dog: the dog"),
        (ANIMALS, "B", "答案是B|答案：B。|选 B|选项B"),
        (ANIMALS, "C", "A. cat: no.\nThe answer is C.|Option A is wrong; the answer is C|Best option: C|bird|a bird"),
        (ANIMALS, "D", "a red bird|red bird|It is a red bird."),
        (
            ANIMALS,
            None,
            "|E|A man is running|A or B|A, B|(A) (B)|Both A and B|The answer is B or C|cat and dog or bird",
        ),
        (ANIMALS, None, "The answer is not B|not the dog|It isn't the dog|He takes vitamin C.|A. cat\nB. the dog"),
        (CAPTIONS, "Option 1", "Option 1|1|1.|option 1: He runs|He runs|The best option is Option 1."),
        (CAPTIONS, "Option 2", "2|Option 2: He sits: now.|He sits now|2. He sits|The best option is 2."),
        (CAPTIONS, None, "2 men|Option 1 and Option 2|Option 3"),
        (SENTENCES, "Sentence B", "Sentence B|B|sentence b.|B. He sits|The answer is sentence B"),
        (SENTENCES, None, "A man runs|Sentence A, Sentence B"),
        (NUMBERS, "A", "3|3.|A. 3|There are 3 men"),
        (NUMBERS, "C", "2.5|C|about 2.5"),
        (NUMBERS, None, "3.5|35|at 3:31"),
        (("A. Yes", "B. No"), "B", "No, he does not.|no|B"),
        (("A. Yes", "B. No"), None, "He does not"),
        (("A. 红色", "B. 蓝色"), "A", "红色|是红色的|A. 红色"),
        (("A. 红色", "B. 蓝色"), None, "不是红色|红色和蓝色"),
        (("red", "blue"), "red", "red|Red.|It is red"),
        (("A. 4 (four)", "B. x*y"), "A", "A. 4 (four)|4 (four)"),
        (("A. 4 (four)", "B. x*y", "C. ?", "D."), "B", "x*y|B|“x*y”."),
        (("A. 4 (four)", "B. x*y", "C. ?", "D."), None, "|.|*"),
    ],
)
def test_the_option_that_is_chosen(choices, label, predictions):
    for prediction in predictions.split("|"):
        assert chosen(prediction, choices) == label, prediction


def test_of_equal_options_the_first_is_meant():
    assert chosen("cat", ("A. dog", "B. cat", "C. cat")) == "B"


def test_options_are_read_as_the_sets_write_them():
    assert option("A. 5:30 pm")[:] == ("A", "A", "5:30 pm")
    assert option("Option 2: He sits: now.")[:] == ("Option 2", "2", "He sits: now.")
    assert option("(C) dog")[:] == ("C", "C", "dog") and option("red")[:] == ("red", "", "red")


@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("yes", "Yes|yes, it is.|The answer is yes|是的|有"),
        ("no", "No.|no, yes it was|The answer is no|I would say no, he sits|不是|没有|否"),
        (None, "|maybe|It is yes or no|Not sure|nothing|There is no way to tell|I have no idea"),
    ],
)
def test_yes_or_no(said, texts):
    assert [yes_or_no(text) for text in texts.split("|")] == [said] * len(texts.split("|"))


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The red car.", "red car", 1, 1),
        ("car red", "red car", 0, 1),
        ("a big red car", "red car", 0, 0.8),
        ("red red", "red", 0, 2 / 3),
        ("", "red", 0, 0),
        ("the", "The", 1, 1),
        ("红色", "红色。", 1, 1),
        ("红色的车", "红车", 0, 2 / 3),
        ("two ２", "two 2", 1, 1),
        ("don't", "dont", 1, 1),
        ("2.5", "25", 0, 0),
        ("Tom's T-shirt", "toms t shirt", 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, answer, exact, f1):
    assert exact_match(prediction, answer) == exact and token_f1(prediction, answer) == pytest.approx(f1)


# Whole sets


def row(id, prediction, answer="A", video=None, **more):
    return {"id": id, "video": video or id, "language": "en", "question": "q", "answer": answer, **more} | {
        "prediction": prediction
    }


def means_of(rows, benchmark, metric="accuracy"):
    found = summarize(score(rows))[benchmark]
    return found, {group: one["mean"] for group, one in found["metrics"].get(metric, {}).items()}


def test_no_choice_is_wrong_and_counted_and_unanswered_is_left_out():
    more = {"benchmark": "mvbench", "choices": ["A. cat", "B. dog"]}
    rows = [
        row("1", "A", kind="x", **more),
        row("2", "hmm", kind="x", **more),
        row("3", "B", kind="x", **more),
        row("4", "the cat", kind="y", **more),
        row("5", None, kind="y", error="5: no such video", **more),
    ]
    found, means = means_of(rows, "mvbench")
    assert means == {"all": 2 / 4, "kind:x": 1 / 3, "kind:y": 1.0, "mean": 2 / 3}, "mean: every task counts alike"
    assert found["statuses"] == {"scored": 3, "no_choice": 1, "unanswered": 1} and found["questions"] == 5
    results = score(rows)
    assert results[1]["values"] == {"accuracy": 0.0} and results[1]["chosen"] is None
    assert results[4]["values"] == {} and results[4]["reason"] == "5: no such video"


def test_videomme_reports_every_level_of_its_kinds():
    more = {"benchmark": "videomme", "choices": ["A. cat", "B. dog"]}
    rows = [row("1", "A", kind="short/Counting", **more), row("2", "B", kind="short/OCR", **more)]
    _, means = means_of([*rows, row("3", "A", kind="long/OCR", **more)], "videomme")
    levels = {"kind:short": 0.5, "kind:short/Counting": 1, "kind:short/OCR": 0, "kind:long": 1, "kind:long/OCR": 1}
    assert means == {"all": 2 / 3, **levels}


def test_a_kind_may_have_a_slash_in_its_name():
    _, means = means_of([row("1", "yes", "yes", kind="yes/no", benchmark="activitynet_qa")], "activitynet_qa", "f1")
    assert means == {"all": 1, "kind:yes/no": 1}


def test_a_group_of_vnbench_is_right_if_all_its_tries_are():
    def group(name, said):
        more = {"benchmark": "vnbench", "kind": "ret", "group": name, "choices": ["A. cat", "B. dog"]}
        return [row(f"{name}_{i}", text, video=name, **more) for i, text in enumerate(said)]

    rows = group("v1", "AAAA") + group("v2", "AABA") + group("v3", "AAA") + group("v4", ["A", "A", "A", None])
    found, means = means_of(rows, "vnbench")
    assert means["all"] == 0.5 and found["metrics"]["accuracy"]["all"]["questions"] == 2
    assert found["metrics"]["accuracy_of_tries"]["all"]["mean"] == 7 / 8
    assert found["statuses"] == {"scored": 8, "incomplete": 6, "unanswered": 1}


def test_tempcompass_has_three_forms_without_a_judge_and_one_with():
    rows = [
        row("1", "B. passing", "B", kind="multi-choice/action", choices=["A. dunking", "B. passing"]),
        row("2", "No, he is not.", "yes", kind="yes_no/action"),
        row("3", "option 2", "Option 2", kind="caption_matching/speed", choices=list(CAPTIONS)),
        row("4", "A man runs.", "B. dunking", kind="captioning/action"),
    ]
    found, means = means_of([one | {"benchmark": "tempcompass"} for one in rows], "tempcompass")
    assert (means["kind:multi-choice"], means["kind:yes_no/action"], means["kind:caption_matching"]) == (1, 0, 1)
    assert means["all"] == 2 / 3 and "kind:captioning" not in means and found["statuses"]["not_judged"] == 1


def test_own_questions_by_language():
    rows = [row("1", "Red", "red", kind="k"), row("2", "绿色", "红色", kind="k") | {"language": "zh"}]
    _, means = means_of(rows, "own questions", "exact_match")
    assert means == {"all": 0.5, "kind:k": 0.5, "language:en": 1, "language:zh": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["A. cat"], "answer": "B"}, "answer with id '1': the reference 'B' is none of the choices"),
        (
            {"benchmark": "tempcompass", "kind": "yes_no/x"},
            "answer with id '1': the reference 'A' is neither yes nor no",
        ),
    ],
)
def test_answers_that_cannot_be_right(change, message):
    with pytest.raises(UserError, match=message):
        score([row("1", "A") | change])
