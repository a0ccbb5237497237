"""Reads answer files, lines of instructions with "prediction", of redvillm_jax.evaluate or data_pipeline.translate."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.questions.eval_sets import BENCHMARKS
from data_pipeline.questions.instructions import read_instructions
from redvillm_jax.evaluation.scoring import OWN, Answer

KINDS = {"prediction": str | None, "benchmark": str, "group": str, "choices": list, "model": dict}
EXPECTED = {"prediction": "text or null", "choices": "a list", "model": "an object"}  # others: text


def read_answers(path: Path, benchmark: str | None) -> list[Answer]:
    """Reads answers, each with its texts in one language. benchmark: for answers without that field.

    Raises UserError naming file, id and field.
    """
    answers, models = [], set()
    for answer in read_instructions(path):
        where = f"{path}: answer with id {answer['id']!r}"
        if "prediction" not in answer:
            raise UserError(f"{where}: has no 'prediction'; expected answers, as redvillm_jax.evaluate writes them")
        for field, kind in KINDS.items():
            if field in answer and not isinstance(answer[field], kind):
                found, expected = json.dumps(answer[field])[:40], EXPECTED.get(field, "text")
                raise UserError(f"{where}: field {field!r} is {found}, expected {expected}")
        if not all(isinstance(choice, str) for choice in answer.get("choices", ())):
            raise UserError(f"{where}: field 'choices' is {json.dumps(answer['choices'])[:40]}, expected texts")
        if benchmark is not None:
            answer.setdefault("benchmark", benchmark)
        if answer.get("benchmark", OWN) not in (OWN, *BENCHMARKS):
            raise UserError(
                f"{where}: unknown benchmark {answer['benchmark']!r}, expected one of {', '.join(BENCHMARKS)}"
            )
        if answer.get("benchmark") == "vcgbench" and answer.get("kind") == "consistency" and "group" not in answer:
            raise UserError(f"{where}: a question of a pair, but has no field 'group'")
        models.add(json.dumps(answer.get("model"), sort_keys=True))
        answers.append(in_one_language(answer, where))
    if len(models) > 1:
        raise UserError(
            f"{path}: has answers of {len(models)} models: {', '.join(sorted(models))[:200]}; judge each alone"
        )
    return answers


def in_one_language(answer: Answer, where: str) -> Answer:
    """The answer with "language", "question" and "answer" in the language of its prediction.

    After data_pipeline.translate the end of the id (-en, -zh) states that language. Question and answer are the fields
    themselves, or their sources before translation. where: the beginning of messages. Raises UserError when no question
    and answer in that language are there.
    """
    if "source_prediction" not in answer:
        return answer
    translated = re.search(r"-(en|zh)$", answer["id"])
    if translated is None:
        raise UserError(f"{where}: has 'source_prediction', but its id does not end in -en or -zh")
    if translated[1] == answer["language"]:
        return answer
    if not all(isinstance(answer.get(field), str) for field in ("source_question", "source_answer")):
        raise UserError(
            f"{where}: its prediction was translated ({translated[1]}), its question and answer were not "
            f"({answer['language']}); translate all: --fields=question,answer,prediction"
        )
    return {
        **answer,
        "language": translated[1],
        "question": answer["source_question"],
        "answer": answer["source_answer"],
    }


def first(answers: Sequence[Answer], limit: int | None) -> list[Answer]:
    """The first `limit` answers, and the other answers of their groups."""
    groups = {(answer.get("benchmark"), answer["group"]) for answer in answers[:limit] if "group" in answer}
    return [answer for i, answer in enumerate(answers) if limit is None or i < limit or _in_group(answer, groups)]


def _in_group(answer: Answer, groups: set[tuple]) -> bool:
    return "group" in answer and (answer.get("benchmark"), answer["group"]) in groups
