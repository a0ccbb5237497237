"""Generated videos of coloured shapes, with exact questions and answers in English and Chinese.

    python -m redvillm_jax.demo.moving_shapes --out=DIR [--train=3000 --dev=300 --test=600] [--language=both]

writes DIR/{train,dev,test}/videos/*.mp4 and DIR/{train,dev,test}/instructions.jsonl. The three sets are
disjoint streams of one random generator: a video is a function of (seed, set, index).

A scene lives on a 32 x 32 square (x to the right, y down) for `TICKS` ticks. Either one shape moves from one
side to the other among shapes that stand still, or two to three shapes appear one after the other. Shapes of
one scene differ in colour *and* in form, so that either names them.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from data_pipeline.common.artefacts import SHAPES, read_object
from data_pipeline.common.cli import Parser, local_path, number, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.files import write_text
from data_pipeline.common.locks import locked

TICKS = 32  # frames of a video
FRAMES_PER_SECOND = 8
PIXELS = 64  # width and height of a video; one unit of the scene is two pixels
# Without look-ahead there is no macroblock tree, x264's only step that reads memory which nobody has written: with it
# about one file in a hundred differs from run to run, with one thread, too.
X264 = {"preset": "veryfast", "crf": "12", "x264-params": "rc-lookahead=0"}
SPLITS = ("train", "dev", "test")
QUESTIONS_PER_VIDEO = 6
LANGUAGES = ("en", "zh")

COLOURS = np.array(  # red green blue yellow purple white
    [(0.92, 0.1, 0.1), (0.1, 0.75, 0.15), (0.15, 0.25, 1), (0.95, 0.9, 0.1), (0.65, 0.15, 0.8), (1, 1, 1)],
    np.float32,
)
WORDS = {
    "en": {
        "colour": ("red", "green", "blue", "yellow", "purple", "white"),
        "shape": ("circle", "square", "triangle", "cross"),
        "direction": ("left", "right", "up", "down"),
        "horizontal": ("left", "middle", "right"),
        "vertical": ("top", "centre", "bottom"),
        "count": ("one", "two", "three"),
    },
    "zh": {
        "colour": ("红色", "绿色", "蓝色", "黄色", "紫色", "白色"),
        "shape": ("圆形", "方形", "三角", "十字"),
        "direction": ("向左", "向右", "向上", "向下"),
        "horizontal": ("左边", "中间", "右边"),
        "vertical": ("上边", "中央", "下边"),
        "count": ("一个", "两个", "三个"),
    },
}
TEMPLATES = {
    "en": {
        "colour": "What colour is the {thing}?",
        "shape": "What shape is the {thing}?",
        "horizontal": "What is the horizontal position of the {thing}?",
        "vertical": "What is the vertical position of the {thing}?",
        "count": "How many shapes are there?",
        "direction": "Which direction does the {thing} move?",
        "first_colour": "Which colour appears first?",
        "last_colour": "Which colour appears last?",
        "first_shape": "Which shape appears first?",
        "last_shape": "Which shape appears last?",
    },
    "zh": {
        "colour": "{thing}是什么颜色？",
        "shape": "{thing}是什么形状？",
        "horizontal": "{thing}的水平位置在哪里？",
        "vertical": "{thing}的垂直位置在哪里？",
        "count": "一共有几个图形？",
        "direction": "{thing}往哪个方向移动？",
        "first_colour": "哪种颜色最先出现？",
        "last_colour": "哪种颜色最后出现？",
        "first_shape": "哪种形状最先出现？",
        "last_shape": "哪种形状最后出现？",
    },
}
TEMPORAL = ("direction", "first_colour", "last_colour", "first_shape", "last_shape")
SPATIAL = ("colour", "shape", "horizontal", "vertical", "count")
CENTRES = (6.0, 16.0, 26.0)  # of the three thirds of the square, in x and in y
JITTER = 2.5


@dataclasses.dataclass(frozen=True)
class Thing:
    """One coloured shape: x, y (ticks,) float32 scene units, visible (ticks,) bool."""

    colour: int
    shape: int
    radius: float
    x: np.ndarray
    y: np.ndarray
    visible: np.ndarray


Scene = tuple[Thing, ...]


# Scenes


def third(position: float) -> int:
    """0, 1, 2 for the left (top), middle and right (bottom) third of the square."""
    return int(position >= 11) + int(position >= 21)


def place(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) random places, more than 10 units from each other in x or in y."""
    while True:
        cells = rng.integers(0, 3, (count, 2))
        places = np.array(CENTRES)[cells] + rng.uniform(-JITTER, JITTER, (count, 2))
        gaps = np.abs(places[:, None] - places[None]).max(-1) + 99 * np.eye(count)
        if gaps.min() > 10:
            return places


def looks(rng: np.random.Generator, count: int) -> list[tuple[int, int, float]]:
    """(colour, shape, radius) of `count` things that all differ in colour and in shape."""
    colours, shapes = rng.permutation(len(COLOURS))[:count], rng.permutation(4)[:count]
    return list(zip(map(int, colours), map(int, shapes), rng.uniform(4, 5.2, count).tolist(), strict=True))


def standing(look: tuple[int, int, float], where: np.ndarray, visible: np.ndarray) -> Thing:
    """A thing that stays where it is."""
    x, y = (np.full(len(visible), value, np.float32) for value in where)
    return Thing(*look, x, y, visible)


def picture_scene(rng: np.random.Generator, count: int) -> Scene:
    """A single picture (one tick) of `count` things."""
    seen = np.ones(1, bool)
    return tuple(standing(*pair, seen) for pair in zip(looks(rng, count), place(rng, count), strict=True))


def moving_scene(rng: np.random.Generator, ticks: int = TICKS) -> Scene:
    """One thing crosses the square in 5 to 27 of the ticks, past one or two that stand still."""
    axis, forward = rng.integers(0, 2, 2)
    across = CENTRES[rng.integers(0, 3)] + rng.uniform(-JITTER, JITTER)
    ends = np.array((CENTRES[0], CENTRES[2])) + rng.uniform(-2, 2, 2)
    start, end = ends if forward else ends[::-1]
    duration = min(int(rng.integers(5, 28)), ticks - 1)
    begin = int(rng.integers(0, ticks - duration))
    along = start + (end - start) * np.clip((np.arange(ticks) - begin) / duration, 0, 1)
    path = np.stack([along, np.full(ticks, across)] if axis == 0 else [np.full(ticks, across), along])
    count = int(rng.integers(1, 3))
    while True:  # nothing stands within 9 units of the track
        places = place(rng, count)
        if np.abs(places[:, 1 - axis] - across).min() > 9:
            break
    seen = np.ones(ticks, bool)
    mover, *others = looks(rng, count + 1)
    stands = (standing(*pair, seen) for pair in zip(others, places, strict=True))
    return (Thing(*mover, *path.astype(np.float32), seen), *stands)


def appearing_scene(rng: np.random.Generator, ticks: int = TICKS) -> Scene:
    """Two or three things appear one after the other, each for 5 to 12 ticks, with random gaps."""
    count = 2 if rng.random() < 0.6 else 3
    durations = rng.integers(7, 13, 2) if count == 2 else rng.integers(5, 9, 3)
    gaps = np.floor(rng.dirichlet(np.ones(count + 1)) * (ticks - durations.sum())).astype(int)
    begins = np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(durations)[:-1]])
    clock = np.arange(ticks)
    seen = (clock >= begins[:, None]) & (clock < (begins + durations)[:, None])
    return tuple(standing(*triple) for triple in zip(looks(rng, count), place(rng, count), seen, strict=True))


def video_scene(rng: np.random.Generator) -> Scene:
    """The scene of one video: something moves (45 %) or things appear one after the other (55 %)."""
    return moving_scene(rng) if rng.random() < 0.45 else appearing_scene(rng)


# Pictures


def cover(shape: int, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The share of each pixel that a shape covers, 0 to 1, from the pixel's offset to its centre in scene units."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == 0:  # circle
        inside = radius - np.sqrt(dx * dx + dy * dy)
    elif shape == 1:  # square
        inside = 0.88 * radius - np.maximum(ax, ay)
    elif shape == 2:  # triangle
        inside = np.minimum(0.8 * radius - dy, 0.88 * (0.53 * (dy + radius) - ax))
    else:  # cross
        inside = np.minimum(radius - np.maximum(ax, ay), 0.36 * radius - np.minimum(ax, ay))
    return np.clip(inside * (PIXELS / 32) + 0.5, 0, 1)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene on a dark grain that stays the same for all of its ticks.

    Returns:
      frames: (ticks, PIXELS, PIXELS, 3) uint8.
    """
    ticks = len(scene[0].visible)
    grain = rng.uniform(0, 0.25) + 0.06 * rng.standard_normal((1, PIXELS, PIXELS, 1), np.float32)
    frames = np.tile(grain, (ticks, 1, 1, 3))
    grid = (np.arange(PIXELS, dtype=np.float32) + 0.5) * (32 / PIXELS)
    for thing in scene:
        dx = grid[None, None, :] - thing.x[thing.visible, None, None]
        dy = grid[None, :, None] - thing.y[thing.visible, None, None]
        alpha = cover(thing.shape, thing.radius, dx, dy)[..., None]
        frames[thing.visible] = frames[thing.visible] * (1 - alpha) + COLOURS[thing.colour] * alpha
    return (np.clip(frames, 0, 1) * 255).astype(np.uint8)


def write_mp4(frames: np.ndarray, path: Path) -> None:
    """Encodes frames (T, H, W, 3) uint8 with H.264, atomically.

    One thread, so that the bits do not depend on the number of cores.
    """
    unfinished = path.with_suffix(".tmp")
    with av.open(str(unfinished), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = dict(X264)
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(unfinished, path)


# Questions

Fact = tuple[str, Thing | None, str, int]  # kind, the thing asked about, list of answer words, index in that list


def facts(scene: Scene) -> list[Fact]:
    """Everything that can be asked about a scene, of one tick or of many."""
    found: list[Fact] = [("count", None, "count", len(scene) - 1)]
    for thing in scene:
        found += [("colour", thing, "colour", thing.colour), ("shape", thing, "shape", thing.shape)]
        x, y = thing.x[thing.visible], thing.y[thing.visible]
        moved = np.array([x[-1] - x[0], y[-1] - y[0]])
        if not moved[0]:
            found.append(("horizontal", thing, "horizontal", third(x[0])))
        if not moved[1]:
            found.append(("vertical", thing, "vertical", third(y[0])))
        if moved.any():
            axis = int(np.abs(moved).argmax())
            found.append(("direction", thing, "direction", 2 * axis + int(moved[axis] > 0)))
    if sum(thing.visible.astype(int) for thing in scene).max() == 1 and len(scene) > 1:
        in_order = sorted(scene, key=lambda thing: int(thing.visible.argmax()))
        for when, thing in (("first", in_order[0]), ("last", in_order[-1])):
            found.append((f"{when}_colour", None, "colour", thing.colour))
            found.append((f"{when}_shape", None, "shape", thing.shape))
    return found


def name(thing: Thing, by: str, language: str) -> str:
    """A thing's name by its "colour", its "shape" or "both", e.g. red object, circle, red circle."""
    words = WORDS[language]
    colour, shape = words["colour"][thing.colour], words["shape"][thing.shape]
    if language == "en":
        return {"colour": f"{colour} object", "shape": shape, "both": f"{colour} {shape}"}[by]
    return {"colour": f"{colour}物体", "shape": shape, "both": f"{colour}的{shape}"}[by]


def phrase(fact: Fact, language: str, rng: np.random.Generator) -> dict[str, str]:
    """One fact as {"language", "question", "answer", "kind"}; positions name things by colour or shape."""
    kind, thing, words, index = fact
    by = {"colour": "shape", "shape": "colour", "direction": "both"}.get(kind)
    by = by or ("colour", "shape")[int(rng.integers(0, 2))]
    question = TEMPLATES[language][kind].format(thing=thing and name(thing, by, language))
    answer = WORDS[language][words][index]
    return {"language": language, "question": question, "answer": answer, "kind": kind}


def ask(scene: Scene, rng: np.random.Generator, count: int, languages: Sequence[str]) -> list[dict[str, str]]:
    """`count` different questions about a video's scene; half of them are temporal if there are enough."""
    possible = [(fact, language) for fact in facts(scene) for language in languages]
    possible = [possible[i] for i in rng.permutation(len(possible))]
    temporal = [pair for pair in possible if pair[0][0] in TEMPORAL][: count // 2]
    spatial = [pair for pair in possible if pair[0][0] in SPATIAL][: count - len(temporal)]
    chosen = temporal + spatial
    return [phrase(*chosen[i], rng) for i in rng.permutation(len(chosen))]


# The command


def video_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one video; sets never share a stream."""
    return np.random.default_rng((seed, SPLITS.index(split), index))


def make_video(index: int, *, folder: Path, split: str, seed: int, languages: Sequence[str]) -> list[dict]:
    """Writes one video, unless it is there, and returns its instructions."""
    video = f"{split}-{index:05d}"
    rng = video_rng(seed, split, index)
    scene = video_scene(rng)
    asked = ask(scene, rng, QUESTIONS_PER_VIDEO, languages)
    path = folder / "videos" / f"{video}.mp4"
    if not path.exists():
        write_mp4(render(scene, rng), path)
    return [{"id": f"{video}-{i}", "video": video, **question} for i, question in enumerate(asked)]


def make_split(out: Path, split: str, count: int, seed: int, languages: Sequence[str], map_: Callable) -> None:
    """Writes one set with `map_` over its indices. instructions.jsonl is written last and marks the set as whole."""
    folder = out / split
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    make = partial(make_video, folder=folder, split=split, seed=seed, languages=languages)
    videos = tqdm(map_(make, range(count)), split, total=count, unit="video")
    lines = [json.dumps(line, ensure_ascii=False) for video in videos for line in video]
    write_text(folder / "instructions.jsonl", "".join(f"{line}\n" for line in lines))


def main(argv: list[str]) -> None:
    parser = Parser("python -m redvillm_jax.demo.moving_shapes", __doc__, needed=("out",))
    parser.add_argument("--out", type=local_path, metavar="DIR", help="folder to write")
    for split, count in zip(SPLITS, (3000, 300, 600), strict=True):
        parser.add_argument(
            f"--{split}", type=number(int), default=count, metavar="N", help=f"videos in {split} (%(default)s)"
        )
    parser.add_argument(
        "--language", choices=("both", *LANGUAGES), default="both", help="language of the questions (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=number(int), default=0, metavar="N", help="seed of all that is random (%(default)s)"
    )
    parser.add_argument(
        "--num_workers",
        type=whole(1024),
        default=os.cpu_count(),
        metavar="N",
        help="processes that write videos (%(default)s)",
    )
    args = parser.parse_args(argv)
    with locked(args.out):
        make_sets(args)


def make_sets(args: argparse.Namespace) -> None:
    """Writes the missing sets."""
    languages = LANGUAGES if args.language == "both" else (args.language,)
    settings = {key: getattr(args, key) for key in (*SPLITS, "language", "seed")} | {"x264": X264}
    record = args.out / "settings.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        record.write_text(json.dumps(settings) + "\n")
    elif (before := read_object(record, SHAPES)) != settings:
        raise UserError(
            f"{args.out} holds videos of {json.dumps(before)}, asked for {json.dumps(settings)}: "
            "choose another --out or delete that folder"
        )
    missing = [split for split in SPLITS if not (args.out / split / "instructions.jsonl").exists()]
    for split in sorted(set(SPLITS) - set(missing)):
        print(f"{args.out / split}: already there")
    with contextlib.ExitStack() as stack:
        map_ = map
        if args.num_workers > 1 and missing:
            processes = multiprocessing.get_context("spawn").Pool(args.num_workers)
            map_ = partial(stack.enter_context(processes).imap, chunksize=16)
        for split in missing:
            make_split(args.out, split, settings[split], args.seed, languages, map_)


if __name__ == "__main__":
    run(main)
