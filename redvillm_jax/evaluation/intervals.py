"""Means with 95 % bootstrap intervals, which resample whole videos together with all of their questions.

scipy.stats.bootstrap computes one statistic from drawn values; here one matrix product gives those of all groups.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
MEAN = "mean"  # the key of the mean over groups
CHUNK = 2_000_000  # entries of the matrix of weights at once: 16 MB

Interval = dict[str, float | int | None]


def means(
    videos: Sequence[str],
    groups: Sequence[Collection[str]],
    values: Mapping[str, Sequence[float]],
    mean_of: Collection[str] = (),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Returns, by metric and by group of questions, {"mean", "low", "high", "questions", "videos"}.

    videos: the video of each question. groups: the groups in which each question counts. values: by metric, one for
    each question. mean_of: groups whose means are averaged with equal weights into the entry `MEAN`. Intervals are
    percentile intervals; "low" and "high" are None for fewer than two videos. The order of questions does not matter.
    """
    columns: dict[str, int] = {}
    for group in sorted({group for names in groups for group in names}):
        columns[group] = len(columns)
    names, cluster = np.unique(np.asarray(videos, dtype=str), return_inverse=True)
    # Sums over each video's questions, (1 + metrics, groups, videos); the first entry counts questions.
    sums = np.zeros((1 + len(values), len(columns), len(names)))
    question = np.repeat(np.arange(len(groups)), [len(members) for members in groups])
    column = np.array([columns[group] for members in groups for group in members], dtype=int)
    for i, metric in enumerate((np.ones(len(videos)), *values.values())):
        np.add.at(sums[i], (column, cluster[question]), np.asarray(metric, dtype=float)[question])
    total = sums.sum(-1)
    drawn = _resampled(sums.reshape(-1, len(names)), resamples, seed).reshape(resamples, *total.shape)
    with np.errstate(invalid="ignore"):
        whole, parts = total[1:] / total[0], drawn[:, 1:] / drawn[:, :1]
    spoken = (sums[0] > 0).sum(-1)
    result: dict[str, dict[str, Interval]] = {}
    for i, metric in enumerate(values):
        result[metric] = {
            group: _interval(whole[i, j], parts[:, i, j], int(total[0, j]), int(spoken[j]))
            for group, j in columns.items()
        }
        if mean_of:
            chosen = [columns[group] for group in mean_of]
            every = int((sums[0, chosen].sum(0) > 0).sum())
            drawn_mean = parts[:, i, chosen].mean(-1) if spoken[chosen].min() > 1 else parts[:0, i, 0]
            result[metric][MEAN] = _interval(whole[i, chosen].mean(), drawn_mean, int(total[0, chosen].sum()), every)
    return result


def _resampled(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(columns, videos) -> (resamples, columns): sums over equally many videos, drawn with replacement."""
    random, videos = np.random.default_rng(seed), sums.shape[1]
    drawn = []
    for start in range(0, resamples, rows := max(1, CHUNK // max(videos, 1))):
        rows_now = min(rows, resamples - start)
        draws = random.integers(0, videos, (rows_now, videos)) + np.arange(rows_now)[:, None] * videos
        weights = np.bincount(draws.ravel(), minlength=rows_now * videos).reshape(rows_now, videos)
        drawn.append(weights.astype(float) @ sums.T)
    return np.concatenate(drawn)


def _interval(mean: float, drawn: np.ndarray, questions: int, videos: int) -> Interval:
    low = high = None
    drawn = drawn[~np.isnan(drawn)]  # a resample may have none of a small group's videos
    if videos > 1 and len(drawn):
        low, high = (float(x) for x in np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    return {"mean": float(mean), "low": low, "high": high, "questions": questions, "videos": videos}
