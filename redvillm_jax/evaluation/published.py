"""Published numbers of the sets that a judge grades, each with its source and its judge.

Judge versions move accuracy by 8 to 10 points on the same predictions
(https://github.com/mbzuai-oryx/Video-ChatGPT/issues/28), so a table that has numbers of two judges must say so.
Accuracy is in per cent.
"""

from typing import NamedTuple

PAPER = "arXiv 2404.11865"
FREEVA = "FreeVA's README"
MARCH, JUNE, JANUARY = "gpt-3.5-turbo-0301", "gpt-3.5-turbo-0613", "gpt-3.5-turbo-0125"
QA = ("msvd_qa", "msrvtt_qa", "tgif_frameqa", "activitynet_qa")


class Published(NamedTuple):
    """A system's numbers. judge: None when it is not stated. inferred: whether others concluded it from the date.

    qa: (accuracy, score) for each set of `QA`, None for a missing set. vcgbench: by aspect in the order of
    `scoring.ASPECTS`, and their mean if it is published.
    """

    system: str
    source: str
    judge: str | None = None
    inferred: bool = False
    qa: tuple[tuple[float, float | None] | None, ...] = (None,) * 4
    vcgbench: tuple[float, ...] | None = None


PUBLISHED = (
    Published(
        "RED-VILLM LLaVA-7B",
        f"{PAPER}, tables 1 and 2; consistency is 2.41 in its table 4",
        qa=((68.9, 2.8), (52.4, 2.9), (55.9, 3.1), (39.2, 3.0)),
        vcgbench=(2.57, 2.64, 3.13, 2.21, 2.39),
    ),
    Published(
        "RED-VILLM Qwen-VL-7B",
        f"{PAPER}, table 2, in which language is not said",
        qa=((71.2, 3.7), (53.9, 3.1), (62.3, 3.3), (44.2, 3.2)),
    ),
    Published("RED-VILLM Qwen-VL-7B (en)", f"{PAPER}, table 1", vcgbench=(2.69, 2.72, 3.32, 2.32, 2.47)),
    Published("RED-VILLM Qwen-VL-7B (cn)", f"{PAPER}, table 1", vcgbench=(2.71, 2.75, 3.34, 2.34, 2.45)),
    Published(
        "Video-ChatGPT",
        f"{PAPER}, tables 1 and 2",
        MARCH,
        inferred=True,
        qa=((64.9, 3.3), (49.3, 2.8), (51.4, 3.0), (35.2, 2.7)),
        vcgbench=(2.40, 2.52, 2.62, 1.98, 2.37, 2.38),
    ),
    Published(
        "VideoChat",
        f"{PAPER}, tables 1 and 2",
        qa=((56.3, 2.8), (45.0, 2.5), (34.4, 2.3), (26.5, 2.2)),
        vcgbench=(2.23, 2.50, 2.53, 1.94, 2.24),
    ),
    Published(
        "LLaMA-Adapter",
        f"{PAPER}, tables 1 and 2",
        qa=((54.9, 3.1), (43.8, 2.7), None, (34.2, 2.7)),
        vcgbench=(2.03, 2.32, 2.30, 1.98, 2.15),
    ),
    Published(
        "VideoLLaMA",
        f"{PAPER}, tables 1 and 2",
        qa=((51.6, 2.5), (29.6, 1.8), None, (12.4, 1.1)),
        vcgbench=(1.96, 2.18, 2.16, 1.82, 1.79),
    ),
    Published("FrozenBiLM", f"{PAPER}, table 2", qa=((32.2, None), (16.8, None), (41.0, None), (24.7, None))),
    Published(
        "LongVLM-7B",
        "its paper",
        qa=((70.0, 3.8), (59.8, 3.3), None, (47.6, 3.3)),
        vcgbench=(2.76, 2.86, 3.34, 2.39, 3.11, 2.89),
    ),
    Published(
        "BT-Adapter-7B",
        FREEVA,
        JUNE,
        inferred=True,
        qa=((67.5, 3.7), (57.0, 3.2), None, (45.7, 3.2)),
        vcgbench=(2.68, 2.69, 3.27, 2.34, 2.46),
    ),
    Published("FreeVA-7B, no training", FREEVA, MARCH, qa=((81.5, None), (72.9, None), None, (58.3, None))),
    Published("FreeVA-7B, no training", FREEVA, JUNE, qa=((71.2, None), (58.5, None), None, (53.7, None))),
    Published("FreeVA-7B, no training", FREEVA, JANUARY, qa=((73.8, None), (60.0, None), None, (51.2, None))),
    Published("FreeVA-13B, no training", FREEVA, JANUARY, vcgbench=(2.88, 2.52, 3.25, 2.34, 3.05)),
    Published(
        "IG-VLM-7B, no training",
        "SlowFast-LLaVA's tables",
        qa=((78.8, 4.1), (63.7, 3.5), (73.0, 4.0), (54.3, 3.4)),
        vcgbench=(3.11, 2.78, 3.51, 2.44, 3.29, 3.03),
    ),
    Published(
        "SlowFast-LLaVA-7B, no training",
        "its tables",
        qa=((79.1, 4.1), (65.8, 3.6), (78.7, 4.2), (55.5, 3.4)),
        vcgbench=(3.09, 2.70, 3.57, 2.52, 3.35, 3.04),
    ),
    Published(
        "TS-LLaVA-7B, no training", "D-CoDe's README", qa=((79.0, None), (65.1, None), (77.7, None), (56.7, None))
    ),
    Published("D-CoDe-7B, no training", "its README", qa=((80.0, None), (64.2, None), (79.1, None), (56.4, None))),
    Published(
        "PLLaVA-7B",
        "SlowFast-LLaVA's tables, which give a mean that is not that of its aspects; the judge as in its code",
        JANUARY,
        qa=((76.6, 4.1), (62.0, 3.5), (77.5, 4.1), (56.3, 3.5)),
        vcgbench=(3.21, 2.86, 3.62, 2.33, 2.93, 3.12),
    ),
    Published(
        "LLaVA-NeXT-Video-DPO-7B",
        "SlowFast-LLaVA's tables",
        qa=(None, None, None, (60.2, 3.5)),
        vcgbench=(3.64, 3.45, 4.17, 2.95, 4.08, 3.66),
    ),
    Published("ST-LLM-7B", "others' tables", vcgbench=(3.23, 3.05, 3.74, 2.93, 2.81, 3.15)),
    Published("VideoGPT+ 3.8B", "others' tables", vcgbench=(3.27, 3.18, 3.74, 2.83, 3.39, 3.28)),
)


def published_systems(benchmark: str) -> list[tuple[Published, tuple[float | None, ...]]]:
    """The systems with numbers on a set: (accuracy, score), or VCGBench's five aspects and their mean."""
    if benchmark == "vcgbench":
        found = [(one, one.vcgbench[:5], one.vcgbench[5:]) for one in PUBLISHED if one.vcgbench]
        return [(one, (*aspects, *(mean or (sum(aspects) / 5,)))) for one, aspects, mean in found]
    if benchmark not in QA:
        return []
    return [(one, one.qa[QA.index(benchmark)]) for one in PUBLISHED if one.qa[QA.index(benchmark)]]


def mark(published: Published, judge: str) -> str:
    """A remark on a published line: whether it compares with numbers of `judge`, and the reason when it does not."""
    if published.judge is None:
        return "not comparable: judge not stated"
    if published.judge != judge:
        return f"not comparable: judge {published.judge}{' (inferred)' if published.inferred else ''}"
    return f"same judge{' (inferred)' if published.inferred else ''}, other words in its prompt"
