"""Command: judges answers through a chat model, or scores them by rule, with intervals."""

import argparse
import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.cli import Parser, local_path, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.locks import locked
from data_pipeline.questions.eval_sets import BENCHMARKS
from data_pipeline.text.chat_client import ReplyCache, Statistics, ask_all
from data_pipeline.text.chat_options import (
    add_endpoint,
    announce,
    check_endpoint,
    cost_of,
    sampling,
    too_dear,
)
from redvillm_jax.evaluation.answers import first, read_answers
from redvillm_jax.evaluation.comparison import compare
from redvillm_jax.evaluation.judge_prompts import PROMPTS_VERSION, prompt_hash
from redvillm_jax.evaluation.judged_folder import check_folder, make_folder, remove_others, write_judged
from redvillm_jax.evaluation.judging import (
    RULE,
    Judged,
    JudgeTask,
    ask_judge,
    estimate,
    judge_tasks,
    unsent,
    with_verdict,
)
from redvillm_jax.evaluation.scoring import OWN, Answer, Result, score
from redvillm_jax.evaluation.tables import comparison_table, summary_table

HELP = """\
Judge the answers of redvillm_jax.evaluate through any OpenAI-compatible endpoint.

  python -m redvillm_jax.judge --answers=answers/ --out=judged/ --model=gpt-4o-mini-2024-07-18 \\
      --price_in=PRICE --price_out=PRICE --max_cost=5
  python -m redvillm_jax.judge --answers=answers/ --out=judged/ --base_url=http://127.0.0.1:8000/v1 \\
      --model=Qwen2.5-7B-Instruct --allow_undated
  python -m redvillm_jax.judge --compare judged_a/ judged_b/

An answer's "benchmark" and "kind" select its protocol; multiple choice and yes/no are scored by rule, without a model.
Use --dry_run to print the estimate without sending anything. Every reply is kept in OUT's cache.sqlite, so a stopped
run continues and a second run costs nothing. OUT's verdicts.jsonl has a line for every verdict, and summary.json has
the means with 95 % intervals. Both always come from one command, and are replaced when answers, model or settings
change. Questions without a verdict are listed, left out and never counted as 0, and the exit code is then 1; run again
to repeat the failed requests. The key is read from OPENAI_API_KEY."""


def main(argv: list[str]) -> int:
    """Runs the command. Returns 1 when a question has no verdict. Raises UserError for a mistake of the user."""
    flags = _parse(argv)
    if flags.compare:
        if flags.answers or flags.out:
            raise UserError("--compare: reads two judged folders; give it alone")
        print(comparison_table(*map(str, flags.compare), compare(*flags.compare)))
        return 0
    for name in ("answers", "out"):
        if getattr(flags, name) is None:
            raise UserError(f"--{name} is needed (see --help)")
    check_endpoint(flags)
    path = flags.answers / "answers.jsonl" if flags.answers.is_dir() else flags.answers
    answers = first(read_answers(path, flags.benchmark), flags.limit)
    asked = judge_tasks(answers, score(answers))
    to_ask = [task for _, task in asked if task]
    if to_ask and flags.model is None:
        raise UserError(f"--model is needed: {len(to_ask)} verdicts of {path} need a judge (see --help)")
    with contextlib.nullcontext() if flags.dry_run else locked(flags.out):
        return judge(path, answers, asked, flags)


def judge(
    path: Path, answers: Sequence[Answer], asked: Sequence[tuple[Result, JudgeTask | None]], flags: argparse.Namespace
) -> int:
    """Judges the tasks of `judge_tasks` and writes the folder. Returns the exit code."""
    to_ask = [task for _, task in asked if task]
    made_with = _made_with(path, answers, to_ask, flags)
    check_folder(flags.out)
    judged, tokens = _judge(path, answers, to_ask, made_with, flags)
    if flags.dry_run:
        return 0
    results = [
        with_verdict(result, task, judged[task], truncate=flags.truncate) if task else result for result, task in asked
    ]
    if to_ask and all(one.status == "failed" for one in judged.values()):
        reason = next(iter(judged.values())).reason
        raise UserError(f"{flags.out}: none of {len(to_ask)} questions could be judged; the first: {reason}")
    summary = write_judged(flags.out, results, made_with, tokens)
    print(summary_table(summary))
    left_out = [result for result in results if result["status"] in ("unparsed", "failed")]
    if left_out:
        again = "run again for what failed, with more --attempts for what could not be read"
        print(f"without a verdict: {len(left_out)}, listed in {flags.out / 'verdicts.jsonl'}; {again}")
        for result in left_out[:5]:
            print(f"  {result['id']}{' ' + result['aspect'] if 'aspect' in result else ''}: {result['reason']}")
    return 1 if left_out else 0


def _judge(
    path: Path,
    answers: Sequence[Answer],
    to_ask: Sequence[JudgeTask],
    made_with: Mapping[str, Any],
    flags: argparse.Namespace,
) -> tuple[dict[JudgeTask, Judged], tuple[int, int]]:
    """Prints the work and its estimated cost, and asks the judge. Returns outcomes and the tokens of all replies."""
    sets = Counter(answer.get("benchmark", OWN) for answer in answers)
    model = made_with["answered_by"] or {}
    by = f" of {model.get('name')} ({str(model.get('fingerprint'))[:12]})" if model else ""
    print(f"{path}: answers{by} to {', '.join(f'{count} {name}' for name, count in sets.items())}")
    if not flags.dry_run:
        make_folder(flags.out)
    if not to_ask:
        return {}, (0, 0)
    file = flags.out / "cache.sqlite"
    with ReplyCache(file if file.exists() or not flags.dry_run else Path(":memory:")) as cache:
        missing = unsent(to_ask, sampling(flags), flags.attempts, cache)
        different = len(set(to_ask))
        known = f"{different - len(missing)} cached, {len(missing)} to send"
        print(f"  {len(to_ask)} to judge, {different} different: {known}")
        announce(*estimate(missing), flags, RULE)
        if flags.dry_run:
            return {}, (0, 0)
        remove_others(flags.out, made_with)

        def ask(left: list[JudgeTask], request: Any, spent: Statistics) -> Any:
            def stop(now: Statistics) -> str | None:
                total = Statistics()
                total.add(spent)
                total.add(now)
                return too_dear(total, flags)

            return ask_all(
                left,
                request,
                cache,
                base_url=flags.base_url,
                concurrency=flags.concurrency,
                timeout=flags.timeout,
                max_retries=flags.max_retries,
                stop=stop,
                unit="verdict",
            )

        judged, spent = ask_judge(to_ask, sampling(flags), flags.attempts, ask)
    if spent.answered + spent.failed:
        cost = cost_of(spent.prompt_tokens, spent.completion_tokens, flags)
        tokens = f"{spent.prompt_tokens} tokens in, {spent.completion_tokens} out"
        price = "" if cost is None else f", cost {cost:.2f}"
        print(f"answered: {spent.answered} requests with {spent.retries} retries, {tokens}{price}")
    if spent.stopped:
        print(f"stopped: {spent.stopped}")
    return judged, tuple(sum(one.tokens[i] for one in judged.values()) for i in (0, 1))


def _made_with(
    path: Path, answers: Sequence[Answer], to_ask: Sequence[JudgeTask], flags: argparse.Namespace
) -> dict[str, Any]:
    """Everything on which the results depend."""
    prompts = {aspect: prompt_hash(aspect) for aspect in sorted({task.aspect for task in to_ask})}
    judge = {
        "model": flags.model,
        "temperature": flags.temperature,
        "attempts": flags.attempts,
        "truncate": flags.truncate,
        "prompts_version": PROMPTS_VERSION,
        "prompts": prompts,
    }
    return {
        "answers": str(path.absolute()),
        "answers_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "benchmark": flags.benchmark,
        "limit": flags.limit,
        "answered_by": answers[0].get("model"),
        "judge": judge if to_ask else None,
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m redvillm_jax.judge", HELP, arguments="(--answers=FILE --out=DIR | --compare DIR DIR)")
    parser.add_argument("--answers", type=local_path, metavar="FILE", help="answers.jsonl, or the folder that has it")
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder for verdicts.jsonl, summary.json and the replies"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="two judged folders: second minus first")
    parser.add_argument(
        "--benchmark",
        choices=tuple(BENCHMARKS),
        metavar="NAME",
        help=f"evaluation set of the answers that name none: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--limit", type=whole(), metavar="N", help="judge only the first so many questions")
    parser.add_argument(
        "--attempts",
        type=whole(),
        default=3,
        metavar="N",
        help="requests for a readable reply to a question (%(default)s)",
    )
    parser.add_argument(
        "--no_truncate",
        dest="truncate",
        action="store_false",
        help="count a score of 4.8 as 4.8, not as 4, which the published scripts do",
    )
    add_endpoint(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
