"""Makes tasks for a judge from answers, and verdicts from its replies."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.text.chat_client import Failure, Reply, ReplyCache, Request, Statistics
from data_pipeline.text.suspicions import chinese_characters
from redvillm_jax.evaluation.judge_prompts import messages, prompt_hash
from redvillm_jax.evaluation.scoring import Answer, Result, protocol
from redvillm_jax.evaluation.verdicts import Verdict, read_verdict

GENERIC = ("correctness", "detail", "context")  # the aspects of VCGBench's generic answers
REPLY_TOKENS = 12  # {'pred': 'yes', 'score': 4}
RULE = f"a token: 4 letters or 1 Chinese character; {REPLY_TOKENS} a reply"


class JudgeTask(NamedTuple):
    """A task for a judge, shared by all answers with the same texts. texts: (name in the prompt, text)."""

    aspect: str
    texts: tuple[tuple[str, str], ...]


class Judged(NamedTuple):
    """The outcome of a task: a verdict, or the reason why there is none ("unparsed" or "failed")."""

    status: str
    verdict: Verdict | None = None
    reason: str = ""
    reply: str = ""
    model: str = ""
    attempts: int = 0
    tokens: tuple[int, int] = (0, 0)  # (in, out) of all replies so far


def judge_tasks(answers: Sequence[Answer], results: Sequence[Result]) -> list[tuple[Result, JudgeTask | None]]:
    """Returns (result, task) pairs; a result that needs no judge has the task None.

    answers, results: arguments and results of `scoring.score`. A generic answer of VCGBench becomes a result for each
    aspect; a consistency pair becomes one result, whose id is the group's. Raises UserError for a kind that VCGBench
    does not have.
    """
    asked: list[tuple[Result, JudgeTask | None]] = []
    pairs: dict[str, list[tuple[Answer, Result]]] = defaultdict(list)
    for answer, scored in zip(answers, results, strict=True):
        form, result = protocol(answer), {**scored, **_shown(answer)}
        if form not in ("qa", "vcgbench"):
            asked.append((result, None))
        elif form == "qa":
            asked.append(_ask(answer, result, "qa"))
        elif answer.get("kind") == "consistency":
            pairs[answer["group"]].append((answer, result))
        else:
            if answer.get("kind") not in ("generic", "temporal"):
                raise UserError(f"answer with id {answer['id']!r}: kind {answer.get('kind')!r} is none of VCGBench's")
            aspects = GENERIC if answer["kind"] == "generic" else ("temporal",)
            asked += [_ask(answer, result, aspect) for aspect in aspects]
    for group, pair in pairs.items():
        asked.append(_ask_pair(group, pair))
    return asked


def ask_judge(
    asked: Iterable[JudgeTask],
    sampling: Mapping[str, Any],
    attempts: int,
    ask: Callable[[list[JudgeTask], Callable[[JudgeTask], Request], Statistics], tuple[dict, Statistics]],
) -> tuple[dict[JudgeTask, Judged], Statistics]:
    """Asks each task until its reply can be read, at most `attempts` times, in rounds.

    Every attempt is a different request, so that the cache also keeps unreadable replies and a second run sends
    nothing. sampling: the other fields of a request. ask: `ask_all` with its options; its last argument is the
    statistics of the rounds before.
    """
    judged: dict[JudgeTask, Judged] = {}
    spent = Statistics()
    left = list(dict.fromkeys(asked))
    for attempt in range(1, attempts + 1):
        if not left:
            break
        replies, statistics = ask(left, lambda task, n=attempt: request(task, n, sampling), spent)
        spent.add(statistics)
        for task in left:
            before = judged[task].tokens if attempt > 1 else (0, 0)
            judged[task] = _judged(task, replies.get(task), attempt, before, spent.stopped)
        left = [task for task in left if judged[task].status == "unparsed"]
        if spent.stopped:
            break
    return judged, spent


def unsent(asked: Iterable[JudgeTask], sampling: Mapping[str, Any], attempts: int, cache: ReplyCache) -> list[Request]:
    """The requests that must be sent at least. Unreadable replies lead to more."""
    missing = []
    for task in dict.fromkeys(asked):
        for attempt in range(1, attempts + 1):
            one = request(task, attempt, sampling)
            if (reply := cache.get(one)) is None:
                missing.append(one)
                break
            if isinstance(read_verdict(reply.text, yes_no=task.aspect == "qa"), Verdict):
                break
    return missing


def request(task: JudgeTask, attempt: int, sampling: Mapping[str, Any]) -> Request:
    """The request of an attempt, counted from 1."""
    return {"messages": messages(task.aspect, dict(task.texts), attempt), **sampling}


def estimate(requests: Iterable[Request]) -> tuple[int, int]:
    """Tokens (in, out) of requests, by `RULE`."""
    tokens_in, count = 0.0, 0
    for one in requests:
        text = "".join(message["content"] for message in one["messages"])
        chinese = chinese_characters(text)
        tokens_in, count = tokens_in + chinese + (len(text) - chinese) / 4, count + 1
    return math.ceil(tokens_in), REPLY_TOKENS * count


def with_verdict(result: Result, task: JudgeTask, judged: Judged, *, truncate: bool) -> Result:
    """The result with the judge's verdict. truncate: 4.8 counts 4, as in the published scripts."""
    found: Result = {"status": judged.status, "values": {}}
    if judged.verdict is None:
        found["reason"] = judged.reason
    else:
        if judged.verdict.correct is not None:
            found["values"]["accuracy"] = float(judged.verdict.correct)
        found["values"]["score"] = float(int(judged.verdict.score)) if truncate else judged.verdict.score
    found["values"] |= result["values"]
    said = {"reply": judged.reply, "model": judged.model, "attempts": judged.attempts}
    return {**result, **found, **dict(task.texts), **said, "prompt": prompt_hash(task.aspect)}


def _judged(
    task: JudgeTask, reply: Reply | Failure | None, attempt: int, before: tuple[int, int], stopped: str | None
) -> Judged:
    if not isinstance(reply, Reply):
        return Judged("failed", reason=reply.reason if reply else f"not sent: {stopped}", tokens=before)
    tokens = (before[0] + reply.prompt_tokens, before[1] + reply.completion_tokens)
    said = {"reply": reply.text, "model": reply.model, "attempts": attempt, "tokens": tokens}
    verdict = read_verdict(reply.text, yes_no=task.aspect == "qa")
    if isinstance(verdict, Verdict):
        return Judged("scored", verdict, **said)
    return Judged("unparsed", reason=f"{verdict}: {' '.join(reply.text.split())[:100]}", **said)


def _shown(answer: Answer) -> Result:
    """An answer's texts, and after translations the original question's id as "question_id"."""
    shown = {field: answer[field] for field in ("question", "answer", "prediction")}
    if any(field.startswith("source_") for field in answer):
        shown["question_id"] = _before_translations(answer["id"])
    return shown


def _before_translations(id: str) -> str:
    return re.sub(r"(?:-(?:en|zh))+$", "", id)


def _ask(answer: Answer, result: Result, aspect: str) -> tuple[Result, JudgeTask | None]:
    if aspect != "qa":
        result = {**result, "aspect": aspect}
    if answer["prediction"] is None:
        return result, None
    texts = {field: answer[field] for field in ("question", "answer", "prediction")}
    return result, JudgeTask(aspect, tuple(texts.items()))


def _ask_pair(group: str, pair: Sequence[tuple[Answer, Result]]) -> tuple[Result, JudgeTask | None]:
    (answer, result), *others = pair
    question_id = _before_translations(group) if "question_id" in result else group
    result = {**result, "id": group, "question_id": question_id, "aspect": "consistency"}
    unanswered = next((one for _, one in pair if one["status"] == "unanswered"), None)
    if unanswered:
        return {**result, "status": "unanswered", "reason": unanswered["reason"]}, None
    if len(pair) != 2:
        reason = f"a pair has two questions, this one has {len(pair)}"
        return {**result, "status": "incomplete", "reason": reason}, None
    other = others[0][0]
    if (answer["language"], answer["answer"]) != (other["language"], other["answer"]):
        raise UserError(
            f"answers with ids {answer['id']!r} and {other['id']!r}: a pair has one answer, in one language"
        )
    texts = {"question": answer["question"], "question_2": other["question"], "answer": answer["answer"]}
    texts |= {"prediction": answer["prediction"], "prediction_2": other["prediction"]}
    return result, JudgeTask("consistency", tuple(texts.items()))
