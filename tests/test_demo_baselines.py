"""The baselines of the demo's accuracies, and the table that shows them."""

import json
import random

import numpy as np
import pytest

from redvillm_jax.demo import __main__ as demo
from redvillm_jax.demo.baselines import commonest_answer, without_order
from redvillm_jax.demo.moving_shapes import LANGUAGES, TEMPORAL, WORDS, ask, video_rng, video_scene

ORDERED = ("first_colour", "last_colour", "first_shape", "last_shape")


def rows(split, count):
    """The questions of `count` videos, as `make_video` writes them beside the video."""
    found = []
    for index in range(count):
        rng = video_rng(0, split, index)
        scene = video_scene(rng)
        found += [{"video": f"{split}-{index:05d}", **question} for question in ask(scene, rng, 6, LANGUAGES)]
    return found


@pytest.fixture(scope="module")
def questions():
    return {split: rows(split, count) for split, count in (("train", 400), ("test", 200))}


def test_the_commonest_answer_is_that_of_the_kind_and_language():
    def row(kind, language, answer):
        return {"kind": kind, "language": language, "answer": answer}

    train = [row("count", "en", "two")] * 2 + [row("count", "en", "three"), row("count", "zh", "三个")]
    train += [row("colour", "en", "red"), row("colour", "en", "blue")]  # as often: the first in the alphabet
    test = [
        row("count", "en", "two"),
        row("count", "en", "three"),
        row("count", "zh", "三个"),
        row("count", "zh", "两个"),
    ]
    test += [row("colour", "en", "red"), row("colour", "en", "blue")]
    assert commonest_answer(train, test).tolist() == [1, 0, 1, 0, 0, 1]


def test_the_words_of_a_question_say_no_more_than_its_kind(questions):
    """Always saying the commonest answer to the very same words is right no more often: what `text only` can learn."""
    train, test = questions["train"], questions["test"]
    same_words = [{**row, "kind": row["question"]} for row in train]
    known = {row["question"] for row in train}
    asked = [i for i, row in enumerate(test) if row["question"] in known]
    by_words = commonest_answer(same_words, [{**test[i], "kind": test[i]["question"]} for i in asked]).mean()
    assert len(asked) > 1000 and by_words < commonest_answer(train, test)[asked].mean() + 0.02


def test_who_does_not_know_the_order_guesses_it(questions):
    """Against a reader who is shown the video's ticks in random order."""
    test = questions["test"]
    chances = without_order(test)
    guess, hits = random.Random(0), {True: [], False: []}
    for row, chance in zip(test, chances, strict=True):
        split, index = row["video"].split("-")
        scene = video_scene(video_rng(0, split, int(index)))
        if row["kind"] in ORDERED:
            part = row["kind"].split("_")[1]
            seen = [WORDS[row["language"]][part][getattr(thing, part)] for thing in scene]
            assert row["answer"] in seen
        elif row["kind"] == "direction":
            words, at = WORDS[row["language"]]["direction"], WORDS[row["language"]]["direction"].index(row["answer"])
            seen = words[at // 2 * 2 : at // 2 * 2 + 2]  # left or right, or up or down
        else:
            seen = [row["answer"]]
        assert chance == 1 / len(seen)
        hits[row["kind"] in TEMPORAL].append(guess.choice(seen) == row["answer"])
    temporal = np.array([row["kind"] in TEMPORAL for row in test])
    assert chances[temporal].mean() == pytest.approx(0.46, abs=0.02)
    assert np.mean(hits[True]) == pytest.approx(chances[temporal].mean(), abs=0.06)
    assert (chances[~temporal] == 1).all() and all(hits[False])


def test_the_table_shows_baselines_beside_accuracies(questions, tmp_path):
    train = [{"id": str(i), **row} for i, row in enumerate(questions["train"])]
    test = questions["test"]
    (tmp_path / "videos" / "train").mkdir(parents=True)
    (tmp_path / "videos" / "train" / "instructions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in train))
    work = tmp_path / "llava"
    wrong = {"text_only": 9, "before_training": 5, "seed-7/spatial_only/test": 4, "seed-7/shared_projector/test": 3}
    for folder, every in (wrong | {"seed-7/red_villm/test": 2}).items():
        answers = [{**row, "prediction": None if i % every == 0 else row["answer"]} for i, row in enumerate(test)]
        (work / folder).mkdir(parents=True)
        (work / folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in answers))
    found, hits = demo.results(tmp_path, "llava", 7)
    assert [row["question"] for row in found] == [row["question"] for row in test]
    assert list(hits) == [*demo.BASELINES, demo.UNTRAINED, *demo.TRAININGS]
    assert hits["RED-VILLM"].tolist() == [float(i % 2 != 0) for i in range(len(test))]
    np.testing.assert_array_equal(hits["commonest answer"], commonest_answer(train, test))

    lines = {
        line[:14].strip(): [float(x) for x in line[14:].split()] for line in demo.table(found, hits).split("\n")[2:]
    }
    assert set(lines) == {*(k.replace("_", " ") for kinds in demo.KINDS.values() for k in kinds)} | {
        *("TEMPORAL", "SPATIAL", "ENGLISH", "CHINESE", "ALL")
    }
    assert lines["ALL"] == [round(100 * of.mean(), 1) for of in hits.values()]
    count = [i for i, row in enumerate(test) if row["kind"] == "count"]
    assert lines["count"] == [round(100 * of[count].mean(), 1) for of in hits.values()]
    chinese = [i for i, row in enumerate(test) if row["language"] == "zh"]
    assert lines["CHINESE"] == [round(100 * of[chinese].mean(), 1) for of in hits.values()]

    losses = {}
    for row in demo.TRAININGS:
        losses[row] = tmp_path / f"{row}.jsonl"
        losses[row].write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0}\n')
    demo.draw(tmp_path / "result.png", "llava", found, hits, losses)
    assert (tmp_path / "result.png").stat().st_size > 10_000
