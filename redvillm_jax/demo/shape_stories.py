"""The pre-training documents of the demo's tiny image LLMs: pictures, pairs of pictures, and told sequences of shapes.

A document has visual slots, which hold pictures, words that tell a sequence step by step ("nothing red red blue"),
or both, and questions about them from the templates of `moving_shapes`. No document ever holds a video.
"""

import dataclasses

import numpy as np

from redvillm_jax.demo.moving_shapes import (
    LANGUAGES,
    PIXELS,
    SPATIAL,
    TEMPORAL,
    TICKS,
    WORDS,
    Fact,
    Scene,
    appearing_scene,
    cover,
    facts,
    looks,
    moving_scene,
    phrase,
    picture_scene,
    place,
    standing,
    third,
)

NOTHING = {"en": "nothing", "zh": "没有"}
KINDS = ("picture", "pair", "story", "story_and_picture")


@dataclasses.dataclass(frozen=True)
class Document:
    """A story (maybe empty), pictures (scenes of one tick, maybe none) and questions, as `phrase` words them."""

    story: str
    pictures: tuple[Scene, ...]
    questions: list[dict[str, str]]


def choose(possible: list[Fact], rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Up to `count` different questions from a list of facts, in both languages."""
    pairs = [(fact, language) for fact in possible for language in LANGUAGES]
    return [phrase(*pairs[i], rng) for i in rng.permutation(len(pairs))[:count]]


def at_tick(scene: Scene, tick: int) -> Scene:
    """One tick of a scene as a picture, without the things that are invisible then."""
    now = slice(tick, tick + 1)
    shown = (thing for thing in scene if thing.visible[tick])
    return tuple(
        dataclasses.replace(thing, x=thing.x[now], y=thing.y[now], visible=thing.visible[now]) for thing in shown
    )


def pair_scene(rng: np.random.Generator) -> Scene:
    """Two ticks: something moves from one side to the other (65 %), or one thing gives way to another."""
    if rng.random() < 0.65:
        return moving_scene(rng, ticks=2)
    seen = np.eye(2, dtype=bool)
    return tuple(standing(*triple) for triple in zip(looks(rng, 2), place(rng, 2), seen, strict=True))


def tell(scene: Scene, rng: np.random.Generator, language: str, max_words: int) -> tuple[str, list[Fact]]:
    """Tells a video's scene in words. Returns the words and the facts that they answer.

    A thing that appears is told by colour, by shape or by both, and a gap by "nothing". A mover is told by the place
    that it passes, maybe after its colour or shape, and maybe next to a thing that stands still. A story has at least
    seven steps, so that no appearance falls between two of them.
    """
    temporal = [fact for fact in facts(scene) if fact[0] in TEMPORAL]
    mover = next((thing for kind, thing, *_ in temporal if kind == "direction"), None)
    if mover is None:
        style = (("colour",), ("shape",), ("colour", "shape"))[int(rng.integers(0, 3))]
        told, words_per_step = scene, len(style)
    else:
        style = ((), ("colour",), ("shape",))[int(rng.integers(0, 3))]
        told, words_per_step = (mover,), len(style) + 1
        if style and max_words >= 7 * 2 * words_per_step and rng.random() < 0.5:
            told, words_per_step = (scene[0], scene[1]), 2 * words_per_step
            told = told if rng.random() < 0.5 else told[::-1]
    steps = int(rng.integers(7, max_words // words_per_step + 1))
    axis = "vertical" if mover is not None and mover.x[0] == mover.x[-1] else "horizontal"
    words: list[str] = []
    for tick in ((np.arange(steps) + 0.5) * TICKS / steps).astype(int):
        shown = [thing for thing in told if thing.visible[tick]]
        for thing in shown:
            words += [WORDS[language][part][getattr(thing, part)] for part in style]
            if mover is not None:
                words.append(WORDS[language][axis][third((thing.y if axis == "vertical" else thing.x)[tick])])
        words += [NOTHING[language]] * (not shown)
    answered = [fact for fact in temporal if fact[0] == "direction" or fact[2] in style]
    return (" " if language == "en" else "").join(words), answered


def document(kind: str, rng: np.random.Generator, num_questions: int, max_words: int) -> Document:
    """A random document of one of `KINDS`; a story next to a picture has at most 16 words."""
    if kind == "picture":
        scene = picture_scene(rng, int(rng.integers(1, 4)))
        return Document("", (scene,), choose(facts(scene), rng, num_questions))
    if kind == "pair":
        scene = pair_scene(rng)
        possible = [fact for fact in facts(scene) if fact[0] in TEMPORAL or rng.random() < 0.2]
        return Document("", (at_tick(scene, 0), at_tick(scene, 1)), choose(possible, rng, num_questions))
    scene = moving_scene(rng) if rng.random() < 0.4 else appearing_scene(rng)
    language = LANGUAGES[int(rng.integers(0, 2))]
    if kind == "story":
        story, answered = tell(scene, rng, language, max_words)
        return Document(story, (), choose(answered, rng, num_questions))
    story, answered = tell(scene, rng, language, 16)
    picture = picture_scene(rng, int(rng.integers(1, 4)))
    questions = choose(answered, rng, num_questions // 2)
    spatial = [fact for fact in facts(picture) if fact[0] in SPATIAL]
    return Document(story, (picture,), questions + choose(spatial, rng, num_questions - len(questions)))


def cell_labels(scene: Scene, cells: int) -> np.ndarray:
    """The labels of a picture's cells, `cells` x `cells` of them in reading order.

    Returns (cells * cells, 4) int32: colour, shape, horizontal and vertical third of the thing that covers most of the
    cell, or the numbers of classes (6, 4, 3, 3) when no thing covers 9 % of it.
    """
    grid = (np.arange(PIXELS, dtype=np.float32) + 0.5) * (32 / PIXELS)
    side = PIXELS // cells
    covered = np.full((len(scene) + 1, cells * cells), 0.09)
    labels = np.array([(6, 4, 3, 3)] + [(t.colour, t.shape, third(t.x[0]), third(t.y[0])) for t in scene], np.int32)
    for i, thing in enumerate(scene, start=1):
        alpha = cover(thing.shape, thing.radius, grid[None, :] - thing.x[0], grid[:, None] - thing.y[0])
        covered[i] = alpha.reshape(cells, side, cells, side).mean((1, 3)).ravel()
    return labels[covered.argmax(0)]
