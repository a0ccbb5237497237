"""Scores answers by rule, one result for each, and averages results with intervals.

A result is {"id", "video", "language", "benchmark", "status", "values": {metric: number}}, with the optional fields
"kind", "group", "reason" and "chosen". Statuses:

    "scored"        "values" are right or wrong, or a judge's numbers
    "no_choice"     the prediction names no option, or several: wrong, and counted
    "unanswered"    there is no prediction: left out
    "incomplete"    another answer of its group is missing or has no prediction: left out
    "not_judged"    the answer needs a judge, or a field that it does not have: left out
    "unparsed", "failed"   the judge's reply was unusable, or there was none: left out
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipeline.common.errors import UserError
from redvillm_jax.evaluation.choices import chosen, option, yes_or_no
from redvillm_jax.evaluation.intervals import Interval, means
from redvillm_jax.evaluation.short_answers import exact_match, token_f1

OWN = "own questions"  # the "benchmark" of answers without that field
ASPECTS = ("correctness", "detail", "context", "temporal", "consistency")
CAPTION = "TempCompass asks the judge a question about the caption that the row does not have"

Answer = Mapping[str, Any]  # a line of answers.jsonl
Result = dict[str, Any]


def score(answers: Iterable[Answer]) -> list[Result]:
    """Scores every answer by rule, in the order given.

    "values" are {"accuracy": 0 or 1} for choices and yes/no, and {"exact_match", "f1"} for short answers. Raises
    UserError naming an instruction whose reference answer is none of its choices.
    """
    answers = list(answers)
    sizes = Counter((_benchmark(answer), answer["group"]) for answer in answers if "group" in answer)
    whole = {name: max(size for (of, _), size in sizes.items() if of == name) for name, _ in sizes}
    answered = Counter(
        (_benchmark(answer), answer["group"])
        for answer in answers
        if "group" in answer and answer["prediction"] is not None
    )
    results = []
    for answer in answers:
        result = {
            "id": answer["id"],
            "video": answer["video"],
            "language": answer["language"],
            "benchmark": _benchmark(answer),
        }
        result |= {field: answer[field] for field in ("kind", "group") if field in answer}
        group = (result["benchmark"], answer.get("group"))
        if answer["prediction"] is None:
            found = {"status": "unanswered", "reason": answer.get("error", "without prediction"), "values": {}}
        elif "group" in answer and answered[group] < whole[group[0]]:
            missing = f"{answered[group]} of the {whole[group[0]]} questions of its group are answered"
            found = {"status": "incomplete", "reason": missing, "values": {}}
        else:
            found = SCORERS[protocol(answer)](answer)
        results.append(result | found)
    return results


def protocol(answer: Answer) -> str:
    """The protocol that scores an answer: "choice", "yes_no", "caption", "vcgbench" or "qa"."""
    if answer.get("choices"):
        return "choice"
    if answer.get("benchmark") == "tempcompass":
        return "caption" if answer.get("kind", "").startswith("captioning") else "yes_no"
    return "vcgbench" if answer.get("benchmark") == "vcgbench" else "qa"


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Returns {benchmark: {"questions", "videos", "statuses", "metrics": {metric: {group: interval}}}}.

    Groups are "all", "kind:…" for every level of a kind, and "language:…" when there are several languages. VCGBench
    has "aspect:…" and their "mean", MVBench the "mean" of its tasks. A question of VNBench is a group of four tries.
    """
    summary = {}
    for name in sorted({result["benchmark"] for result in results}):
        own = [result for result in results if result["benchmark"] == name]
        summary[name] = {
            "questions": len({result["id"] for result in own}),
            "videos": len({result["video"] for result in own}),
            "statuses": dict(Counter(result["status"] for result in own)),
            "metrics": estimates(name, observations(own)),
        }
    return summary


def observations(results: Sequence[Result]) -> dict[tuple, dict[str, Any]]:
    """The averaged units of one benchmark: {key: {"video", "groups", "values"}}, with VNBench's tries as one."""
    languages = {result["language"] for result in results}
    found: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        together = result["benchmark"] == "vnbench" and "group" in result
        found[(result["group"],) if together else (result["id"], result.get("aspect"))].append(result)
    return {key: _observation(several, languages) for key, several in found.items() if several[0]["values"]}


def estimates(benchmark: str, observed: Mapping[tuple, Mapping[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Means with intervals by metric and group. A metric's mean is over the units that have the metric."""
    result = {}
    for metric in dict.fromkeys(metric for one in observed.values() for metric in one["values"]):
        own = [one for one in observed.values() if metric in one["values"]]
        groups = [one["groups"] for one in own]
        names = {name for of in groups for name in of}
        mean_of: set[str] = set()
        if benchmark == "mvbench":
            mean_of = {name for name in names if name.startswith("kind:")}
        if benchmark == "vcgbench" and len(names & {f"aspect:{aspect}" for aspect in ASPECTS}) == len(ASPECTS):
            mean_of = {f"aspect:{aspect}" for aspect in ASPECTS}
        values = {metric: [one["values"][metric] for one in own]}
        result |= means([one["video"] for one in own], groups, values, sorted(mean_of))
    return result


def _observation(several: Sequence[Result], languages: set[str]) -> dict[str, Any]:
    first = several[0]
    if "aspect" in first:
        groups = [f"aspect:{first['aspect']}"]
    else:
        levels = _levels(first)
        groups = ["all", *("kind:" + "/".join(levels[: i + 1]) for i in range(len(levels)))]
        groups += [f"language:{first['language']}"] if len(languages) > 1 else []
    values = first["values"]
    if first["benchmark"] == "vnbench":
        tries = [result["values"]["accuracy"] for result in several]
        values = {"accuracy": float(all(tries)), "accuracy_of_tries": sum(tries) / len(tries)}
    return {"video": first["video"], "groups": groups, "values": values}


def _levels(result: Result) -> list[str]:
    """The levels of a kind. Only two sets have levels; "yes/no" is a single kind of ActivityNet-QA."""
    if "kind" not in result:
        return []
    return result["kind"].split("/") if result["benchmark"] in ("videomme", "tempcompass") else [result["kind"]]


def _choice(answer: Answer) -> Result:
    right = [
        o.label
        for o, choice in ((option(c), c) for c in answer["choices"])
        if answer["answer"] in (o.label, o.text, choice)
    ]
    if not right:
        raise UserError(f"answer with id {answer['id']!r}: the reference {answer['answer']!r} is none of the choices")
    return _wrong_or_right(chosen(answer["prediction"], answer["choices"]), right[0])


def _yes_no(answer: Answer) -> Result:
    if (right := yes_or_no(answer["answer"])) is None:
        raise UserError(f"answer with id {answer['id']!r}: the reference {answer['answer']!r} is neither yes nor no")
    return _wrong_or_right(yes_or_no(answer["prediction"]), right)


def _wrong_or_right(label: str | None, right: str) -> Result:
    status = "no_choice" if label is None else "scored"
    return {"status": status, "chosen": label, "values": {"accuracy": float(label == right)}}


def _short_answer(answer: Answer) -> Result:
    pair = (answer["prediction"], answer["answer"])
    return {"status": "scored", "values": {"exact_match": exact_match(*pair), "f1": token_f1(*pair)}}


SCORERS = {
    "choice": _choice,
    "yes_no": _yes_no,
    "qa": _short_answer,
    "caption": lambda answer: {"status": "not_judged", "reason": CAPTION, "values": {}},
    "vcgbench": lambda answer: {"status": "not_judged", "reason": "needs a judge", "values": {}},
}


def _benchmark(answer: Answer) -> str:
    return answer.get("benchmark", OWN)
