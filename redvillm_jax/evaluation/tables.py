"""Prints summaries and comparisons of judged answers as tables."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.common.tables import text_table
from redvillm_jax.evaluation.intervals import MEAN, Interval
from redvillm_jax.evaluation.published import mark, published_systems
from redvillm_jax.evaluation.scoring import ASPECTS

BY_RULE = ("exact_match", "f1")
PERCENT = ("accuracy", "accuracy_of_tries", *BY_RULE)
STATUSES = {
    "no_choice": "without a choice, counted wrong",
    "unanswered": "unanswered, left out",
    "incomplete": "in incomplete groups, left out",
    "not_judged": "not judged, left out",
    "unparsed": "without a readable verdict, left out",
    "failed": "failed, left out",
}


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary of `redvillm_jax.judge` as text: the metrics of every set, and published numbers beside a judge's."""
    lines = []
    for name, found in summary["benchmarks"].items():
        lines.append(f"{name}: {found['questions']} questions about {found['videos']} videos")
        counts = found["statuses"]
        lines += [f"  {counts[status]} {text}" for status, text in STATUSES.items() if status in counts]
        judged, by_rule = blocks(found["metrics"])
        if judged:
            lines += metrics_table(judged)
        if "score" in judged:
            judge = summary["made_with"]["judge"]
            lines += [f"  judged by {_judge(judge, summary['replies'], name)}", *_published_table(name, judge["model"])]
        if by_rule:
            lines += ["  without a judge:", *metrics_table(by_rule)]
        if not found["metrics"]:
            lines.append("  nothing to average")
    return "\n".join(lines)


def comparison_table(first: str, second: str, compared: Mapping[str, Any]) -> str:
    """The result of `comparison.compare` as text."""
    lines = []
    for name, found in compared.items():
        only = f"{found['only_first']} only in {first}, {found['only_second']} only in {second}"
        lines.append(f"{name}: {found['common']} in common, {only}; {second} minus {first}:")
        for block in blocks(found["metrics"]):
            lines += metrics_table(block, signed=True) if block else []
        if not found["metrics"]:
            lines.append("  nothing to compare")
    return "\n".join(lines)


def blocks(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits metrics into (choices and judge, exact match and F1), because the two cover different questions."""
    by_rule = {metric: means for metric, means in metrics.items() if metric in BY_RULE}
    return {metric: means for metric, means in metrics.items() if metric not in BY_RULE}, by_rule


def metrics_table(metrics: Mapping[str, Mapping[str, Interval]], *, signed: bool = False) -> list[str]:
    """A line for each group: means with intervals (rates in per cent), number of questions, number of videos."""
    groups = list(dict.fromkeys(group for means in metrics.values() for group in means))
    first = [*("all", MEAN), *(f"aspect:{aspect}" for aspect in ASPECTS)]
    groups.sort(key=lambda group: (group not in first, first.index(group) if group in first else 0, group))
    rows = []
    for group in groups:
        cells = [_cell(metric, means.get(group), signed) for metric, means in metrics.items()]
        one = next(means[group] for means in metrics.values() if group in means)
        rows.append([group, *cells, one["questions"], one["videos"]])
    columns = [f"  <{max(20, *map(len, groups))}", *["  <24"] * len(metrics), ">8", ">8"]
    return text_table(["", *map(_title, metrics), "n", "videos"], rows, columns)


def _title(metric: str) -> str:
    return f"{metric} %" if metric in PERCENT else metric


def _cell(metric: str, one: Interval | None, signed: bool) -> str:
    if one is None:
        return "–"
    factor, form = (100, ".1f") if metric in PERCENT else (1, ".2f")
    form = f"+{form}" if signed else form
    if one["low"] is None:
        return f"{one['mean'] * factor:{form}} [too few videos]"
    return f"{one['mean'] * factor:{form}} [{one['low'] * factor:{form}}, {one['high'] * factor:{form}}]"


def _judge(judge: Mapping[str, Any], replies: Mapping[str, Any], benchmark: str) -> str:
    """The judge by its given name and by the endpoint's, and its settings."""
    own = [aspect for aspect in judge["prompts"] if (aspect in ASPECTS) == (benchmark == "vcgbench")]
    prompts = ", ".join(f"{aspect} {judge['prompts'][aspect]}" for aspect in own)
    temperature = "the endpoint's" if judge["temperature"] is None else f"{judge['temperature']:g}"
    scores = "truncated" if judge["truncate"] else "as given"
    how = f"temperature {temperature}, scores {scores}, prompts {judge['prompts_version']} ({prompts})"
    return f"{judge['model']} (the endpoint says {', '.join(replies['models'])}), {how}"


def _published_table(name: str, judge: str) -> list[str]:
    if not (systems := published_systems(name)):
        return []
    titles = (*ASPECTS, "mean") if name == "vcgbench" else ("accuracy %", "score")
    precision = 2 if name == "vcgbench" else 1
    columns = ["  <32", *[">12"] * len(titles), "  <0"]
    cells = [["–" if value is None else f"{value:.{precision}f}" for value in values] for _, values in systems]
    ends = [f"{mark(one, judge)} [{one.source}]" for one, _ in systems]
    lines = [[one.system, *shown, end] for (one, _), shown, end in zip(systems, cells, ends, strict=True)]
    return text_table(["published", *titles], lines, columns)
