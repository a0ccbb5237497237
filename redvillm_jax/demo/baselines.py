"""Baselines of the demo's accuracies: how often a reader is right without the video, or without its order.

Each function returns the chance of a right answer, question by question.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from redvillm_jax.demo.moving_shapes import TEMPORAL, video_rng, video_scene

Instructions = Sequence[Mapping[str, str]]


def commonest_answer(train: Instructions, test: Instructions) -> np.ndarray:
    """A reader who always gives the commonest training answer of the question's kind and language: (questions,).

    A model that reads the questions alone cannot learn more, because their words do not depend on the answers.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for asked in train:
        counts.setdefault((asked["kind"], asked["language"]), Counter())[asked["answer"]] += 1
    said = {key: max(sorted(answers), key=answers.__getitem__) for key, answers in counts.items()}
    return np.array([float(said[asked["kind"], asked["language"]] == asked["answer"]) for asked in test])


def without_order(test: Instructions, seed: int = 0) -> np.ndarray:
    """A reader who knows everything that a video shows, but not when it happens: (questions,).

    The reader knows which shapes and colours appear and guesses which of them comes first or last, knows the line on
    which a shape moves and guesses in which of its two directions, and answers every other question right. seed: the
    seed of the videos.
    """
    chances = []
    for asked in test:
        chance = 1.0
        if asked["kind"] in TEMPORAL:
            split, index = asked["video"].split("-")
            scene = video_scene(video_rng(seed, split, int(index)))
            chance = 1 / 2 if asked["kind"] == "direction" else 1 / len(scene)
        chances.append(chance)
    return np.array(chances)
