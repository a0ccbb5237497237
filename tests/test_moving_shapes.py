"""The generated videos: exact answers, disjoint and deterministic sets, real mp4 files, and the pretraining stories."""

import json
import re

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.media.decode import read_video
from redvillm_jax.demo import moving_shapes, shape_stories
from redvillm_jax.demo.moving_shapes import COLOURS, LANGUAGES, TICKS, WORDS, video_rng, video_scene


def make(out, *flags):
    moving_shapes.main([f"--out={out}", "--train=12", "--dev=3", "--test=4", "--num_workers=1", *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    make(out)
    return out


def instructions(folder, split="train"):
    return [json.loads(line) for line in (folder / split / "instructions.jsonl").read_text("utf-8").splitlines()]


def seen_colours(frames):
    """(T, 6) bool and (T, 6, 2): which colours a decoded video shows, and the centre of each, in pixels (x, y)."""
    distance = np.abs(frames[:, :, :, None] / 255 - COLOURS).max(-1)
    held = distance < 0.2
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    area = held.sum((1, 2))
    centre = np.stack([(held * axis[None, :, :, None]).sum((1, 2)) for axis in (x, y)], -1)
    return area > 20, centre / np.maximum(area, 1)[..., None]


def test_answers_agree_with_the_decoded_pixels(folder):
    """Directions, orders, counts and positions read back from the mp4 by colour alone."""
    checked = set()
    for line in instructions(folder):
        words, kind = WORDS[line["language"]], line["kind"]
        path = folder / "train" / "videos" / f"{line['video']}.mp4"
        frames = read_video(path, num_frames=TICKS, image_size=64, resize="nearest").frames
        shown, centre = seen_colours(frames)
        colours = np.flatnonzero(shown.any(0))
        first = {c: int(shown[:, c].argmax()) for c in colours}
        start, end = (np.array([centre[t, c] for c, t in at.items()]) for at in (first, last_seen(shown, colours)))
        if kind == "count":
            assert line["answer"] == words["count"][len(colours) - 1]
        elif kind in ("first_colour", "last_colour"):
            pick = min if kind == "first_colour" else max
            assert line["answer"] == words["colour"][pick(first, key=first.get)]
        elif kind == "direction":
            moved = end - start
            mover, axis = np.unravel_index(np.abs(moved).argmax(), moved.shape)
            assert np.abs(moved[mover, axis]) > 24
            assert line["answer"] == words["direction"][2 * axis + int(moved[mover, axis] > 0)]
            assert words["colour"][colours[mover]] in line["question"]
        elif kind in ("horizontal", "vertical"):
            named = [i for i, c in enumerate(colours) if words["colour"][c] in line["question"]]
            if not named:
                continue
            at = start[named[0]][int(kind == "vertical")] / 2
            if min(abs(at - 11), abs(at - 21)) < 0.75:
                continue  # too near a border for a centre that was measured
            assert line["answer"] == words[kind][int(at >= 11) + int(at >= 21)]
        else:
            continue
        checked.add(kind)
    assert checked == {"count", "first_colour", "last_colour", "direction", "horizontal", "vertical"}


def last_seen(shown, colours):
    return {c: TICKS - 1 - int(shown[::-1, c].argmax()) for c in colours}


def test_answers_agree_with_the_scene():
    """Colour and shape questions name exactly one thing, of which the answer is true."""
    words = {word: (part, i) for part in ("colour", "shape") for i, word in enumerate(WORDS["en"][part])}
    for index in range(200):
        rng = video_rng(3, "train", index)
        scene = video_scene(rng)
        assert len({t.colour for t in scene}) == len({t.shape for t in scene}) == len(scene)
        for line in moving_shapes.ask(scene, rng, 6, ("en",)):
            if line["kind"] in ("colour", "shape"):
                named = [words[w] for w in re.findall(r"\w+", line["question"]) if w in words and w != line["kind"]]
                (thing,) = [t for t in scene if all(getattr(t, part) == i for part, i in named)]
                assert WORDS["en"][line["kind"]][getattr(thing, line["kind"])] == line["answer"]
            if line["kind"].startswith(("first", "last")):
                begins = [int(t.visible.argmax()) for t in scene]
                when, part = line["kind"].split("_")
                thing = scene[int(np.argmin(begins) if when == "first" else np.argmax(begins))]
                assert WORDS["en"][part][getattr(thing, part)] == line["answer"]


def test_instructions(folder):
    lines = instructions(folder)
    assert len({line["id"] for line in lines}) == len(lines)
    assert {line["language"] for line in lines} == set(LANGUAGES)
    videos = {path.stem for path in (folder / "train" / "videos").iterdir()}
    assert {line["video"] for line in lines} == videos and len(videos) == 12
    questions = {(line["video"], line["question"]) for line in lines}
    assert len(questions) == len(lines)


def test_files_decode_to_all_frames(folder):
    video = read_video(folder / "dev" / "videos" / "dev-00002.mp4", num_frames=99, image_size=64, resize="nearest")
    assert video.total_frames == TICKS and video.fps == moving_shapes.FRAMES_PER_SECOND
    assert (video.width, video.height) == (64, 64)
    rng = video_rng(0, "dev", 2)
    scene = video_scene(rng)
    moving_shapes.ask(scene, rng, 6, LANGUAGES)
    drawn = moving_shapes.render(scene, rng)
    chosen = drawn[[0, -1]].astype(int) - video.frames[[0, -1]]
    assert np.abs(chosen).mean() < 4  # grey levels


def test_deterministic_and_idempotent(folder, tmp_path):
    make(tmp_path, "--num_workers=2")
    for split in moving_shapes.SPLITS:
        assert instructions(folder, split) == instructions(tmp_path, split)
        for path in (folder / split / "videos").iterdir():
            assert path.read_bytes() == (tmp_path / split / "videos" / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    make(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    with pytest.raises(UserError, match="another --out"):
        make(tmp_path, "--seed=1")


def test_interrupted_set_is_completed(folder, tmp_path):
    make(tmp_path)
    (tmp_path / "train" / "instructions.jsonl").unlink()
    (tmp_path / "train" / "videos" / "train-00003.mp4").unlink()
    make(tmp_path)
    assert instructions(tmp_path) == instructions(folder)
    name = "videos/train-00003.mp4"
    assert (tmp_path / "train" / name).read_bytes() == (folder / "train" / name).read_bytes()


def test_sets_are_disjoint():
    def key(scene):
        return tuple((t.colour, t.shape, t.radius, float(t.x[0]), float(t.y[0])) for t in scene)

    keys = {split: {key(video_scene(video_rng(0, split, i))) for i in range(300)} for split in moving_shapes.SPLITS}
    assert sum(map(len, keys.values())) == 900 == len(set.union(*keys.values()))


def test_one_language(tmp_path):
    make(tmp_path, "--language=zh")
    assert {line["language"] for line in instructions(tmp_path)} == {"zh"}
    assert not re.search("[a-z]", "".join(line["question"] + line["answer"] for line in instructions(tmp_path)))


@pytest.mark.parametrize("kind", shape_stories.KINDS)
def test_documents(kind):
    rng = np.random.default_rng(0)
    pictures = {"picture": 1, "pair": 2, "story": 0, "story_and_picture": 1}[kind]
    asked = set()
    for _ in range(100):
        doc = shape_stories.document(kind, rng, 5, 32)
        assert len(doc.pictures) == pictures and bool(doc.story) == ("story" in kind)
        assert all(len(thing.visible) == 1 for scene in doc.pictures for thing in scene)
        assert 1 <= len(doc.questions) <= 5
        asked |= {question["kind"] for question in doc.questions}
    spatial, temporal = set(moving_shapes.SPATIAL), set(moving_shapes.TEMPORAL)
    assert asked == {"picture": spatial, "story": temporal}.get(kind, spatial | temporal)


def test_stories_tell_their_answers():
    rng = np.random.default_rng(0)
    for _ in range(200):
        doc = shape_stories.document("story", rng, 5, 32)
        if doc.story.isascii():
            words = [word for word in doc.story.split() if word != "nothing"]
            assert len(doc.story.split()) <= 32
            for question in doc.questions:
                if question["kind"].endswith(("colour", "shape")) and question["language"] == "en":
                    when, part = question["kind"].split("_")
                    told = [word for word in words if word in WORDS["en"][part]]
                    assert question["answer"] == told[0 if when == "first" else -1]


def test_cell_labels():
    thing = moving_shapes.standing((2, 1, 5.0), np.array([6.0, 26.0]), np.ones(1, bool))
    labels = shape_stories.cell_labels((thing,), 4).reshape(4, 4, 4)
    assert labels[3, 0].tolist() == [2, 1, 0, 2] == labels[2, 1].tolist()
    assert labels[0, 3].tolist() == [6, 4, 3, 3]
