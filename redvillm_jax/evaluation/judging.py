"""From rows with predictions to what a judge is asked, and from its replies to verdicts."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.text.chat_client import Failure, Reply, ReplyCache, Request, Statistics
from data_pipeline.text.suspicions import chinese_characters
from redvillm_jax.evaluation.judge_prompts import messages, prompt_hash
from redvillm_jax.evaluation.scoring import Result, Row, protocol
from redvillm_jax.evaluation.verdicts import Verdict, read_verdict

GENERIC = ("correctness", "detail", "context")  # what VCGBench's generic predictions are judged for
REPLY_TOKENS = 12  # {'pred': 'yes', 'score': 4}
RULE = f"a token: 4 letters or 1 Chinese character; {REPLY_TOKENS} a reply"


class Question(NamedTuple):
    """What a judge is asked, once for all rows with the same texts; texts: (name, text) as the prompt has them."""

    aspect: str
    texts: tuple[tuple[str, str], ...]


class Judged(NamedTuple):
    """What came of a question: a verdict or the reason why there is none, "unparsed" or "failed"."""

    status: str
    verdict: Verdict | None = None
    reason: str = ""
    reply: str = ""
    model: str = ""
    attempts: int = 0
    tokens: tuple[int, int] = (0, 0)  # (in, out) of all replies so far


def questions(rows: Sequence[Row], results: Sequence[Result]) -> list[tuple[Result, Question | None]]:
    """Returns the results with what a judge is asked for each, None where nothing.

    rows, results: as `scoring.score` takes and gives them. A generic row of VCGBench becomes a result for each aspect,
    a pair of consistency one, whose id is the group's. Raises UserError for rows that are none of VCGBench's.
    """
    asked: list[tuple[Result, Question | None]] = []
    pairs: dict[str, list[tuple[Row, Result]]] = defaultdict(list)
    for row, scored in zip(rows, results, strict=True):
        form, result = protocol(row), {**scored, **_shown(row)}
        if form not in ("qa", "vcgbench"):
            asked.append((result, None))
        elif form == "qa":
            asked.append(_ask(row, result, "qa"))
        elif row.get("kind") == "consistency":
            pairs[row["group"]].append((row, result))
        else:
            if row.get("kind") not in ("generic", "temporal"):
                raise UserError(f"row with id {row['id']!r}: kind {row.get('kind')!r} is none of VCGBench's")
            aspects = GENERIC if row["kind"] == "generic" else ("temporal",)
            asked += [_ask(row, result, aspect) for aspect in aspects]
    for group, pair in pairs.items():
        asked.append(_ask_pair(group, pair))
    return asked


def ask_judge(
    asked: Iterable[Question],
    sampling: Mapping[str, Any],
    attempts: int,
    ask: Callable[[list[Question], Callable[[Question], Request], Statistics], tuple[dict, Statistics]],
) -> tuple[dict[Question, Judged], Statistics]:
    """Asks each question until its reply can be read, at most `attempts` times, in rounds.

    Every attempt is a request of its own, so that a cache has the useless replies as well and a second run sends
    nothing. sampling: what else is in a request. ask: `ask_all` but for its options; it gets what was spent before.
    """
    judged: dict[Question, Judged] = {}
    spent = Statistics()
    left = list(dict.fromkeys(asked))
    for attempt in range(1, attempts + 1):
        if not left:
            break
        replies, statistics = ask(left, lambda question, n=attempt: request(question, n, sampling), spent)
        spent.add(statistics)
        for question in left:
            before = judged[question].tokens if attempt > 1 else (0, 0)
            judged[question] = _judged(question, replies.get(question), attempt, before, spent.stopped)
        left = [question for question in left if judged[question].status == "unparsed"]
        if spent.stopped:
            break
    return judged, spent


def unsent(asked: Iterable[Question], sampling: Mapping[str, Any], attempts: int, cache: ReplyCache) -> list[Request]:
    """The requests that have to be sent at least; more if replies to them cannot be read."""
    missing = []
    for question in dict.fromkeys(asked):
        for attempt in range(1, attempts + 1):
            one = request(question, attempt, sampling)
            if (reply := cache.get(one)) is None:
                missing.append(one)
                break
            if isinstance(read_verdict(reply.text, yes_no=question.aspect == "qa"), Verdict):
                break
    return missing


def request(question: Question, attempt: int, sampling: Mapping[str, Any]) -> Request:
    """The request of an attempt, from 1."""
    return {"messages": messages(question.aspect, dict(question.texts), attempt), **sampling}


def estimate(requests: Iterable[Request]) -> tuple[int, int]:
    """Tokens (in, out) of requests, by `RULE`."""
    tokens_in, count = 0.0, 0
    for one in requests:
        text = "".join(message["content"] for message in one["messages"])
        chinese = chinese_characters(text)
        tokens_in, count = tokens_in + chinese + (len(text) - chinese) / 4, count + 1
    return math.ceil(tokens_in), REPLY_TOKENS * count


def with_verdict(result: Result, question: Question, judged: Judged, *, truncate: bool) -> Result:
    """The result with what the judge said; truncate: 4.8 counts 4, as in the published scripts."""
    found: Result = {"status": judged.status, "values": {}}
    if judged.verdict is None:
        found["reason"] = judged.reason
    else:
        if judged.verdict.correct is not None:
            found["values"]["accuracy"] = float(judged.verdict.correct)
        found["values"]["score"] = float(int(judged.verdict.score)) if truncate else judged.verdict.score
    found["values"] |= result["values"]
    said = {"reply": judged.reply, "model": judged.model, "attempts": judged.attempts}
    return {**result, **found, **dict(question.texts), **said, "prompt": prompt_hash(question.aspect)}


def _judged(
    question: Question, reply: Reply | Failure | None, attempt: int, before: tuple[int, int], stopped: str | None
) -> Judged:
    if not isinstance(reply, Reply):
        return Judged("failed", reason=reply.reason if reply else f"not sent: {stopped}", tokens=before)
    tokens = (before[0] + reply.prompt_tokens, before[1] + reply.completion_tokens)
    said = {"reply": reply.text, "model": reply.model, "attempts": attempt, "tokens": tokens}
    verdict = read_verdict(reply.text, yes_no=question.aspect == "qa")
    if isinstance(verdict, Verdict):
        return Judged("scored", verdict, **said)
    return Judged("unparsed", reason=f"{verdict}: {' '.join(reply.text.split())[:100]}", **said)


def _shown(row: Row) -> Result:
    """A row's texts; "question_id" is that of the question before translations, where there were some."""
    shown = {field: row[field] for field in ("question", "answer", "prediction")}
    if any(field.startswith("source_") for field in row):
        shown["question_id"] = _before_translations(row["id"])
    return shown


def _before_translations(id: str) -> str:
    return re.sub(r"(?:-(?:en|zh))+$", "", id)


def _ask(row: Row, result: Result, aspect: str) -> tuple[Result, Question | None]:
    if aspect != "qa":
        result = {**result, "aspect": aspect}
    if row["prediction"] is None:
        return result, None
    texts = {field: row[field] for field in ("question", "answer", "prediction")}
    return result, Question(aspect, tuple(texts.items()))


def _ask_pair(group: str, pair: Sequence[tuple[Row, Result]]) -> tuple[Result, Question | None]:
    (row, result), *others = pair
    question_id = _before_translations(group) if "question_id" in result else group
    result = {**result, "id": group, "question_id": question_id, "aspect": "consistency"}
    unanswered = next((one for _, one in pair if one["status"] == "unanswered"), None)
    if unanswered:
        return {**result, "status": "unanswered", "reason": unanswered["reason"]}, None
    if len(pair) != 2:
        reason = f"a pair has two questions, this one has {len(pair)}"
        return {**result, "status": "incomplete", "reason": reason}, None
    other = others[0][0]
    if (row["language"], row["answer"]) != (other["language"], other["answer"]):
        raise UserError(f"rows with ids {row['id']!r} and {other['id']!r}: a pair has one answer, in one language")
    texts = {"question": row["question"], "question_2": other["question"], "answer": row["answer"]}
    texts |= {"prediction": row["prediction"], "prediction_2": other["prediction"]}
    return result, Question("consistency", tuple(texts.items()))
