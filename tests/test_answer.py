"""Asking a model: from Python, on the command line, and in files."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_FRAMES
from helpers import change_tensor, without_hashes
from PIL import Image

import redvillm_jax
from configs import demo
from data_pipeline.common.errors import UserError
from data_pipeline.media.reading import Clip, Picture
from redvillm_jax import answer
from redvillm_jax.inference import assistant
from redvillm_jax.model.settings import plain_config

ROOT = Path(__file__).parents[1]
CONFIG = [f"--config={ROOT / 'configs/demo.py'}:llava", f"--config.num_frames={NUM_FRAMES}"]
QUESTIONS = ["Which direction?", "What colour is the circle that moves to the left?", "红色的圆形在哪里？"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, videos) -> Path:
    """A folder with two clips, one of them of three frames, a picture, and a broken file."""
    folder = tmp_path_factory.mktemp("files")
    clips = sorted((videos / "videos").glob("*.mp4"))
    shutil.copy(clips[0], folder / "a.mp4")
    write_clip(folder / "short.mp4", frames=3)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "photo.png")
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    return folder


def write_clip(path: Path, frames: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        for i in range(frames):
            picture = np.full((64, 64, 3), 60 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def model(bases) -> assistant.Assistant:
    config = plain_config(demo.get_config("llava")) | {"num_frames": NUM_FRAMES}
    return redvillm_jax.load(bases["llava"], config=config)


def shown(text: str) -> str:
    """A text as it compares: beside half a character, the whole bytes before it may show as that half does."""
    return re.sub("[\x00-\x1f]", "\N{REPLACEMENT CHARACTER}", text)


def test_questions_asked_together_get_the_answers_of_each_alone(model, files):
    alone = [model.ask(files / "a.mp4", question, max_new_tokens=6) for question in QUESTIONS]
    assert model.ask(files / "a.mp4", QUESTIONS, max_new_tokens=6) == alone
    assert shown("".join(model.stream(str(files / "a.mp4"), QUESTIONS[1], max_new_tokens=6))) == shown(alone[1])
    assert len(set(alone)) > 1 and all(alone)
    other = model.ask(files / "short.mp4", QUESTIONS, max_new_tokens=6)
    part = model.ask(Clip(files / "a.mp4", (0.0, 0.5)), QUESTIONS, max_new_tokens=6)
    picture = model.ask(Picture(files / "photo.png"), QUESTIONS, max_new_tokens=6)
    assert len({tuple(answers) for answers in (alone, other, part, picture)}) == 4
    assert model.ask(files / "a.mp4", []) == []


def test_a_video_is_read_and_prefilled_once(model, files, tmp_path, monkeypatch):
    shutil.copy(files / "a.mp4", tmp_path / "b.mp4")
    calls = []
    monkeypatch.setattr(assistant, "read_media", lambda *a, do=assistant.read_media: calls.append("read") or do(*a))
    prefill = model.inference.prefill
    monkeypatch.setattr(model.inference, "prefill", lambda *a: calls.append("prefill") or prefill(*a))
    for question in QUESTIONS:
        model.ask(tmp_path / "b.mp4", question, max_new_tokens=2)
    assert calls == ["read", "prefill"]
    write_clip(tmp_path / "b.mp4", frames=3)  # another video under the same name
    assert model.ask(tmp_path / "b.mp4", QUESTIONS[0], max_new_tokens=6) == model.ask(
        files / "short.mp4", QUESTIONS[0], max_new_tokens=6
    )
    assert calls == ["read", "prefill"] * 3


def test_a_prefix_is_there_until_its_questions_have_it(model, files, monkeypatch):
    monkeypatch.setattr(assistant, "REMEMBERED", 1)
    want = [model.ask(files / "a.mp4", question, max_new_tokens=3) for question in QUESTIONS]
    monkeypatch.setattr(model.inference, "context_class", lambda length: length)  # a prefix for each question
    assert model.ask(files / "a.mp4", QUESTIONS, max_new_tokens=3) == want
    assert model.ask(files / "a.mp4", QUESTIONS[::-1], max_new_tokens=3) == want[::-1]


def test_rows_are_split_over_the_devices(model):
    prompt = model.video_prompt("What?", {"num_frames": NUM_FRAMES})
    frames = {"frames": np.zeros((NUM_FRAMES, 32, 32, 3), np.uint8), "num_frames": np.int32(NUM_FRAMES)}
    inference, index = model.inference, np.zeros(16, np.int32)
    prefixes = inference.prefill({0: (frames, prompt)}, 8).cache
    with jax.set_mesh(inference.mesh):
        cache = inference._lay_out(prefixes, index, num_slots=64)
        assert cache[0].sharding.shard_shape(cache[0].shape)[1] == 16 // 8
        cache = inference._place(cache, prefixes, index)
    assert cache[0].sharding.shard_shape(cache[0].shape)[1] == 16 // 8


def test_a_seed_decides_what_is_drawn(model, files):
    drawn = [
        model.ask(files / "a.mp4", [QUESTIONS[0]] * 2, max_new_tokens=8, temperature=3.0, seed=seed)
        for seed in (0, 0, 2**32 - 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_numbers_that_are_none_are_no_answer(bases, files, model, tmp_path, capsys):
    """A word of one question has no numbers: that question fails, the others' answers are bit-equal."""
    spoilt = without_hashes(shutil.copytree(bases["llava"], tmp_path / "spoilt"))
    word = set(model.tokenizer.encode("circle")) - set(model.tokenizer.encode(QUESTIONS[0]))

    def spoil(table: np.ndarray) -> np.ndarray:
        table[list(word)] = np.nan
        return table

    change_tensor(spoilt, "language_model.model.embed_tokens.weight", spoil)
    rows = [{"video": "a.mp4", "question": question} for question in QUESTIONS[:2]]
    (files / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [argument for argument in flags(bases, files, tmp_path / "out.jsonl") if "--model" not in argument]
    assert answer.main([f"--model={spoilt}", *arguments]) == 1
    good, bad = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["prediction"] == model.ask(files / "a.mp4", QUESTIONS[0], max_new_tokens=6) != ""
    assert bad["prediction"] is None and "spoilt computes numbers that are none" in bad["error"]
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["answered"] == 1 and report["failed"] == [{"question": 2, "error": bad["error"]}]
    assert "1 of 2 questions answered" in capsys.readouterr().out

    one = redvillm_jax.load(spoilt, config=plain_config(demo.get_config("llava")) | {"num_frames": NUM_FRAMES})
    for ask in (one.ask, lambda *a, **kw: list(one.stream(*a, **kw))):
        with pytest.raises(UserError, match="look for damaged weights with --check_files") as error:
            ask(files / "a.mp4", QUESTIONS[1], max_new_tokens=6)
        assert "\n" not in str(error.value)


def test_a_base_whose_bytes_are_flipped_is_refused(bases, files, tmp_path):
    base = shutil.copytree(bases["llava"], tmp_path / "base")
    arguments = [f"--model={base}", *CONFIG, f"--video={files / 'a.mp4'}", "--question=What?", "--max_new_tokens=1"]
    answer.main(arguments)
    file = base / "model.safetensors"
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-1000] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: is not as it was .*make the base folder again"):
        answer.main(arguments)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    with pytest.raises(UserError, match=r"model\.safetensors: is not as it was"):
        answer.main([*arguments, "--check_files"])


@pytest.mark.parametrize(
    ("video", "question", "settings", "message"),
    [
        ("gone.mp4", "What?", {}, "gone.mp4: No such file"),
        ("broken.mp4", "What?", {}, "broken.mp4: cannot be decoded"),
        ("photo.png", "What?", {}, "photo.png: is no video in a format that is read"),
        ("a.mp4", "  ", {}, "the question is empty"),
        ("a.mp4", "What? " * 2000, {}, "the base knows 2048 positions"),
        ("a.mp4", "What?", {"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ("a.mp4", "What?", {"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ("a.mp4", "What?", {"top_k": 2**31}, "top_k is 2147483648, expected 0"),
    ],
)
def test_mistakes_are_told(model, files, video, question, settings, message):
    with pytest.raises(UserError, match=message) as error:
        model.ask(files / video, question, **settings)
    assert "\n" not in str(error.value)


def test_half_precision_answers(bases, files, model):
    config = plain_config(demo.get_config("llava")) | {"num_frames": NUM_FRAMES}
    want = model.ask(files / "a.mp4", QUESTIONS, max_new_tokens=1)
    for dtype in ("float16", "bfloat16"):
        half = redvillm_jax.load(bases["llava"], config=config, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(half.inference.weights)} == {
            jnp.dtype(dtype),
            jnp.dtype("float32"),
        }
        assert half.ask(files / "a.mp4", QUESTIONS, max_new_tokens=1) == want
    with pytest.raises(UserError, match="dtype is 'int4', expected one of bfloat16, float16, float32"):
        redvillm_jax.load(bases["llava"], config=config, dtype="int4")


# ---- the command


def asked(files: Path) -> list[dict]:
    rows = [
        {"id": 7, "video": "a.mp4", "question": QUESTIONS[0]},
        {"video": "broken.mp4", "question": "What?"},
        {"picture": "photo.png", "question": "What?"},
        {"video": "short.mp4", "question": QUESTIONS[1]},
        {"video": "a.mp4", "question": QUESTIONS[2], "start": 0, "end": 0.5},
        {"video": "a.mp4", "question": "What? " * 2000},
        {"video": "a.mp4", "question": QUESTIONS[1], "note": "其他"},
        {"picture": "gone.png", "question": "What?"},
    ]
    (files / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def flags(bases, files, out) -> list[str]:
    arguments = [f"--model={bases['llava']}", *CONFIG, f"--input={files / 'questions.jsonl'}", f"--output={out}"]
    return [*arguments, "--max_new_tokens=6", "--batch_size=2", "--num_workers=1"]


def test_a_file_of_questions(bases, files, model, tmp_path, capsys, monkeypatch):
    rows, out = asked(files), tmp_path / "answers.jsonl"
    assert answer.main(flags(bases, files, out)) == 1
    assert "5 of 8 questions answered" in capsys.readouterr().out
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: answer[key] for key in row} for row, answer in zip(rows, answers, strict=True)] == rows
    said = [answer["prediction"] for answer in answers]
    a, part, photo = files / "a.mp4", Clip(files / "a.mp4", (0.0, 0.5)), Picture(files / "photo.png")
    for place, media in ((0, a), (2, photo), (3, files / "short.mp4"), (4, part), (6, a)):
        assert said[place] == model.ask(media, rows[place]["question"], max_new_tokens=6)
    assert [i for i, text in enumerate(said) if text is None] == [1, 5, 7]
    assert "broken.mp4: cannot be decoded" in answers[1]["error"]
    assert "positions" in answers[5]["error"] and "gone.png: no such file" in answers[7]["error"]
    assert answers[3]["num_frames"] == 3 and "[19 visual tokens]" in answers[3]["prompt"]
    assert answers[0]["generation"]["max_new_tokens"] == 6 and len(answers[0]["model"]["fingerprint"]) == 64
    report = json.loads((tmp_path / "answers.jsonl.report.json").read_text())
    assert report["answered"] == 5 and [failure["question"] for failure in report["failed"]] == [2, 6, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.report.json"]

    # what failed is tried again, and nothing else
    Image.new("RGB", (9, 9)).save(files / "gone.png")
    written = []
    write = answer.AnswerLog.write
    monkeypatch.setattr(answer.AnswerLog, "write", lambda self, new: written.extend(new) or write(self, new))
    assert answer.main(flags(bases, files, out)) == 1
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(written) == [1, 5, 7] and again[:7] == answers[:7] and again[7]["prediction"]
    (files / "gone.png").unlink()

    # an edited file: what stands in the place of another question is no answer to it
    out.write_text("".join(f"{json.dumps(row)}\n" for row in again[1:]))
    written.clear()
    answer.main(flags(bases, files, out))
    assert sorted(written) == list(range(8))


def test_pictures_without_a_projector_are_told_beside_the_videos(bases, files, tmp_path):
    rows = [
        {"video": "a.mp4", "question": "What?", "error": "of before"},
        {"picture": "photo.png", "question": "What?"},
    ]
    (files / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers [1].jsonl"  # a pattern, for those who look for files
    assert answer.main([*flags(bases, files, out), "--config.streams=temporal"]) == 1
    video, picture = (json.loads(line) for line in out.read_text().splitlines())
    assert video["prediction"] and "error" not in video
    assert picture["prediction"] is None and "no projector for pictures" in picture["error"]
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_others_are_not_replaced(bases, files, tmp_path):
    (files / "questions.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "What?"}) + "\n")
    notes, report = tmp_path / "notes.jsonl", tmp_path / "notes.jsonl.report.json"
    for file, text in ((notes, "my notes"), (report, "{}"), (report, "[")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file.name}: .*was not written by this command") as error:
            answer.main(flags(bases, files, notes))
        assert "\n" not in str(error.value) and file.read_text() == text
        file.unlink()
    theirs = [tmp_path / f"notes.jsonl.{end}" for end in ("partial", "part", "part-2")]
    for file in theirs:
        file.write_text("x")
    assert answer.main(flags(bases, files, notes)) == 0
    assert sorted(tmp_path.iterdir()) == sorted([notes, report, *theirs])
    (part := tmp_path / "notes.jsonl.part3").write_text("of the command split")
    with pytest.raises(UserError, match=r"part3: is no part of notes\.jsonl: move it away"):
        answer.main([*flags(bases, files, notes), "--seed=1"])
    assert part.read_text() == "of the command split" and notes.exists()


def test_a_whole_file_is_left_alone(bases, files, tmp_path, capsys):
    (files / "questions.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "What?"}) + "\n")
    assert answer.main(flags(bases, files, tmp_path / "answers.jsonl")) == 0
    before = (tmp_path / "answers.jsonl").stat().st_mtime_ns
    assert answer.main(flags(bases, files, tmp_path / "answers.jsonl")) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (tmp_path / "answers.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="this folder cannot be made"):
        answer.main(flags(bases, files, "/proc/nowhere/answers.jsonl"))


def test_the_terminal(bases, files, model, capsys):
    arguments = [f"--model={bases['llava']}", *CONFIG, "--max_new_tokens=6"]
    answer.main([*arguments, f"--video={files / 'a.mp4'}", *(f"--question={question}" for question in QUESTIONS[:2])])
    said = model.ask(files / "a.mp4", QUESTIONS[:2], max_new_tokens=6)
    want = [f"> {QUESTIONS[0]}", said[0], f"> {QUESTIONS[1]}", said[1], ""]
    assert [shown(line) for line in capsys.readouterr().out.split("\n")] == [shown(line) for line in want]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question=What?"], "give one of --video, --picture and --input"),
        (["--video=a.mp4"], "--video and --picture go with --question"),
        (["--video=a.mp4", "--input=x.jsonl", "--output=y.jsonl"], "give one of --video, --picture and --input"),
        (["--video=a.mp4", "--question=What?", "--top_p=2"], "--top_p is 2.0, expected more than 0"),
        (["--video=a.mp4", "--question=What?", "--top_k=many"], "argument --top_k: expected a whole number, got many"),
        (["--video=a.mp4", "--question=What?", "--temperature=nan"], "--temperature is nan"),
        (["--video=a.mp4", "--question=What?", "--tensor=3"], "does not fit 8 devices"),
        (["--input=gone.jsonl", "--output=y.jsonl"], "gone.jsonl"),
        (["--input=x.jsonl", "--output=x.jsonl"], "--output=x.jsonl: is the --input"),
        (["--input=x.jsonl", "--output=."], "--output=.: is a folder"),
        (
            ["--video=a.mp4", "--question=What?", "--tensor=²"],
            "argument --tensor: expected a positive integer",
        ),
    ],
)
def test_wrong_flags_end_in_one_line(bases, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        answer.main([f"--model={bases['llava']}", *CONFIG, *arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4"}, "row 1: field 'question' is missing"),
        ({"question": "What?"}, "row 1: expected either a field 'video' or a field 'picture'"),
        ({"question": "What?", "video": "a.mp4", "picture": "b.png"}, "expected either"),
        ({"question": "What?", "video": "a.mp4", "start": 3, "end": 1}, "is about 3 to 1 seconds"),
        ({"question": "\ud83d?", "video": "a.mp4"}, "row 1: has half a character"),
    ],
)
def test_wrong_rows_end_in_one_line(bases, tmp_path, row, message):
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        answer.main(flags(bases, tmp_path, tmp_path / "out.jsonl"))
