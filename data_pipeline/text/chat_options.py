"""The options of commands that ask a chat model: the model, its endpoint, and the cost."""

import argparse
import math
from typing import Any

from data_pipeline.common.cli import Parser, above_zero, whole
from data_pipeline.common.errors import UserError
from data_pipeline.text.chat_client import Statistics, check_address, is_dated


def add_endpoint(parser: Parser) -> None:
    """Adds --model and the options of its endpoint."""
    group = parser.add_argument_group("the model that is asked")
    group.add_argument("--model", metavar="NAME", help="its name at the endpoint, with its date")
    group.add_argument("--allow_undated", action="store_true", help="accept a model name without a date")
    group.add_argument("--base_url", metavar="URL", help="address of the endpoint (OPENAI_BASE_URL, or OpenAI's)")
    group.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="sampling temperature (0); none: the endpoint's own",
    )
    group.add_argument("--concurrency", type=whole(), default=16, metavar="N", help="requests at once (%(default)s)")
    group.add_argument(
        "--timeout", type=above_zero, default=120, metavar="SECONDS", help="to wait for an answer (%(default)s)"
    )
    group.add_argument(
        "--max_retries",
        type=int,
        choices=range(21),
        metavar="0..20",
        default=5,
        help="retries of a failed request (%(default)s)",
    )
    group = parser.add_argument_group("the cost")
    group.add_argument("--dry_run", action="store_true", help="print the estimate and stop")
    group.add_argument("--price_in", type=above_zero, metavar="PRICE", help="of a million prompt tokens")
    group.add_argument("--price_out", type=above_zero, metavar="PRICE", help="of a million reply tokens")
    group.add_argument(
        "--max_cost", type=above_zero, metavar="COST", help="refuse to start above it, stop when it is spent"
    )


def check_endpoint(flags: argparse.Namespace) -> None:
    """Raises UserError for options of `add_endpoint` that contradict each other, an impossible address, or a model
    without a date."""
    if flags.model is not None:
        check_address(flags.base_url)
    if (flags.price_in is None) != (flags.price_out is None):
        raise UserError("--price_in and --price_out: give both or none")
    if flags.max_cost is not None and flags.price_in is None:
        raise UserError("--max_cost: needs --price_in and --price_out")
    if flags.model is not None and not flags.allow_undated and not is_dated(flags.model):
        raise UserError(
            f"--model={flags.model}: names no dated version (as gpt-4o-mini-2024-07-18 does), so it may change under "
            "the same name; choose a dated name, or add --allow_undated"
        )


def sampling(flags: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request beside its messages: "model" and "temperature"."""
    return {"model": flags.model} | ({} if flags.temperature is None else {"temperature": flags.temperature})


def announce(prompt_tokens: int, completion_tokens: int, flags: argparse.Namespace, rule: str) -> None:
    """Prints the estimate. Raises UserError if it is above --max_cost. rule: how tokens were counted."""
    cost = cost_of(prompt_tokens, completion_tokens, flags)
    price = "no cost without --price_in and --price_out" if cost is None else f"cost {cost:.2f}"
    print(f"estimate: {prompt_tokens} tokens in, {completion_tokens} out, {price} ({rule})", flush=True)
    if flags.max_cost is not None and cost > flags.max_cost:
        raise UserError(f"--max_cost={flags.max_cost:g}: nothing was sent; raise it, or do less with --limit")


def cost_of(prompt_tokens: int, completion_tokens: int, flags: argparse.Namespace) -> float | None:
    """The cost of so many tokens, None without prices."""
    if flags.price_in is None:
        return None
    return (prompt_tokens * flags.price_in + completion_tokens * flags.price_out) / 1e6


def too_dear(statistics: Statistics, flags: argparse.Namespace) -> str | None:
    """A reason to stop asking when --max_cost is spent, else None; for `ask_all`."""
    cost = cost_of(statistics.prompt_tokens, statistics.completion_tokens, flags)
    return None if flags.max_cost is None or cost < flags.max_cost else f"--max_cost={flags.max_cost:g} is spent"


def _temperature(text: str) -> float | None:
    try:
        value = None if text == "none" else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"expected none or a number from 0, less than 100, got {text!r}")
    return value
