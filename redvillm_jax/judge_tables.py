"""Summaries and comparisons of judged answers as text."""

from collections.abc import Mapping
from typing import Any

from redvillm_jax.intervals import MEAN, Interval
from redvillm_jax.published import mark, published_rows
from redvillm_jax.scoring import ASPECTS

PERCENT = ("accuracy", "accuracy_of_tries", "exact_match", "f1")
STATUSES = {
    "no_choice": "without a choice, counted wrong",
    "unanswered": "unanswered, left out",
    "incomplete": "in incomplete groups, left out",
    "not_judged": "not judged, left out",
    "unparsed": "without a readable verdict, left out",
    "failed": "failed, left out",
}


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary of `redvillm_jax.judge`: every set's metrics, and the published numbers beside a judge's."""
    lines = []
    for name, found in summary["benchmarks"].items():
        head = f"{name}: {found['questions']} questions about {found['videos']} videos"
        lines += [
            head,
            *(
                f"  {found['statuses'][status]} {text}"
                for status, text in STATUSES.items()
                if status in found["statuses"]
            ),
        ]
        if not found["metrics"]:
            lines.append("  nothing to average")
            continue
        lines += metrics_table(found["metrics"])
        if "score" in found["metrics"]:
            lines.append(f"  judged by {_judge(summary)}")
            lines += _published_table(name, summary["judge"]["model"])
    return "\n".join(lines)


def metrics_table(metrics: Mapping[str, Mapping[str, Interval]], *, signed: bool = False) -> list[str]:
    """A line for each group: its means with intervals (rates in per cent), its questions and videos."""
    groups = list(dict.fromkeys(group for means in metrics.values() for group in means))
    first = [*("all", MEAN), *(f"aspect:{aspect}" for aspect in ASPECTS)]
    groups.sort(key=lambda group: (group not in first, first.index(group) if group in first else 0, group))
    width = max(len(group) for group in [*groups, " " * 20])
    lines = [f"  {'':<{width}}" + "".join(f"  {_title(metric):<24}" for metric in metrics) + "questions  videos"]
    for group in groups:
        cells = "".join(f"  {_cell(metric, means.get(group), signed):<24}" for metric, means in metrics.items())
        one = next(means[group] for means in metrics.values() if group in means)
        lines.append(f"  {group:<{width}}{cells}{one['questions']:>9}{one['videos']:>8}")
    return lines


def _title(metric: str) -> str:
    return f"{metric} %" if metric in PERCENT else metric


def _cell(metric: str, one: Interval | None, signed: bool) -> str:
    if one is None:
        return "–"
    factor, form = (100, ".1f") if metric in PERCENT else (1, ".2f")
    form = f"+{form}" if signed else form
    if one["low"] is None:
        return f"{one['mean'] * factor:{form}} [one video]"
    return f"{one['mean'] * factor:{form}} [{one['low'] * factor:{form}}, {one['high'] * factor:{form}}]"


def _judge(summary: Mapping[str, Any]) -> str:
    judge = summary["judge"]
    reported = ", ".join(f"{model} ({count})" for model, count in sorted(judge["reported"].items()))
    prompts = ", ".join(f"{aspect} {digest}" for aspect, digest in judge["prompts"].items())
    how = f"temperature {judge['temperature'] if judge['temperature'] is not None else 'of the endpoint'}, "
    how += f"scores {'truncated' if judge['truncate'] else 'as given'}"
    return f"{judge['model']} (the endpoint says: {reported}), {how}, prompts {judge['prompts_version']}: {prompts}"


def _published_table(name: str, judge: str) -> list[str]:
    if not (rows := published_rows(name)):
        return []
    titles = (*ASPECTS, "mean") if name == "vcgbench" else ("accuracy %", "score")
    lines = [f"  {'published':<32}" + "".join(f"{title:>12}" for title in titles)]
    for one, values in rows:
        precision = 2 if name == "vcgbench" else 1
        cells = "".join(f"{'–' if value is None else f'{value:.{precision}f}':>12}" for value in values)
        lines.append(f"  {one.system:<32}{cells}  {mark(one, judge)} [{one.source}]")
    return lines
