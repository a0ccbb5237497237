"""How many of the questions about moving shapes are answered right without looking, or without looking at the order.

An accuracy says something only beside these; each is the chance of a right answer, question by question.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from redvillm_jax.demo.moving_shapes import TEMPORAL, video_rng, video_scene

Questions = Sequence[Mapping[str, str]]


def commonest_answer(train: Questions, test: Questions) -> np.ndarray:
    """Who always says the commonest answer to the training questions of the same kind and language: (questions,).

    A model that reads the questions alone cannot learn more, as their words do not depend on the answers.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in train:
        counts.setdefault((row["kind"], row["language"]), Counter())[row["answer"]] += 1
    said = {key: max(sorted(answers), key=answers.__getitem__) for key, answers in counts.items()}
    return np.array([float(said[row["kind"], row["language"]] == row["answer"]) for row in test])


def without_order(test: Questions, seed: int = 0) -> np.ndarray:
    """Who knows all that a video shows, but not when: (questions,).

    Such a reader knows what appears and guesses which of it is first or last, knows the line on which something moves
    and guesses in which of its two directions, and is right about everything else. seed: the videos'.
    """
    chances = []
    for row in test:
        chance = 1.0
        if row["kind"] in TEMPORAL:
            split, index = row["video"].split("-")
            scene = video_scene(video_rng(seed, split, int(index)))
            chance = 1 / 2 if row["kind"] == "direction" else 1 / len(scene)
        chances.append(chance)
    return np.array(chances)
