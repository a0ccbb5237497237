"""Contact sheets and distributions of stores, drawn by the command."""

import os
import subprocess
import sys
from pathlib import Path

import fake_gcs
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from data_pipeline import prepare, show, store
from data_pipeline.common.errors import UserError
from data_pipeline.media import lettering

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def frames(videos, tmp_path_factory) -> Path:
    """The generated videos, twelve frames of 16 × 16 pixels each."""
    out = tmp_path_factory.mktemp("show") / "store"
    arguments = [f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}", f"--out={out}"]
    prepare.main([*arguments, "--image_size=16", "--num_frames=12", "--format=raw", "--num_workers=1"])
    return out


@pytest.fixture(autouse=True)
def no_fonts(monkeypatch):
    """Only matplotlib's own font is installed, whatever this machine has."""
    monkeypatch.setattr(lettering, "findSystemFonts", list)


def made_store(path, settings, lines, questions, report=None):
    """A store with records of black frames, made by hand."""
    settings = {"kind": "frames", "image_size": 4, "num_frames": 3, "format": "raw", "quality": None} | settings
    sources = [{"video": line["video"], "source": "x", "bytes": 1} for line in lines]

    def encode(sources):
        for source, line in zip(sources, lines, strict=True):
            n = line["num_frames"]
            arrays = {"frames": np.zeros((n, 4, 4, 3), np.uint8), "timestamps": np.full(n, np.nan, np.float32)}
            if settings["kind"] == "streams":
                arrays = {"spatial": np.zeros((2, 3), np.float32)}
            yield {"line": {"video": source["video"], **line}, "record": arrays}

    shards = store.write_shards(path, settings, sources, encode)
    store.finish_store(path, settings, shards, questions, report or {})
    return path


def line(video, num_frames=3, duration=1.0, total_frames=30):
    shape = {"width": 1920, "height": 240}
    return {"video": video, "num_frames": num_frames, "duration": duration, "total_frames": total_frames, **shape}


def question(video, language, question, answer, **more):
    return {"id": question, "video": video, "language": language, "question": question, "answer": answer, **more}


def tile(picture, index, top):
    """Frame `index` of a sheet whose first row of frames begins at `top`, at 16 × 16 pixels again."""
    step = show.TILE + round(1.4 * show.SIZE) + show.GAP
    left, top = show.GAP + index % 8 * (show.TILE + show.GAP), top + index // 8 * step
    return picture[top : top + show.TILE, left : left + show.TILE][5 :: show.TILE // 16, 5 :: show.TILE // 16]


TOP = show.GAP + round(1.4 * (show.SIZE + 6)) + show.GAP  # below the title


def test_a_sheet_has_every_frame_in_order(frames, tmp_path, capsys):
    opened = store.open_store(frames)
    out = tmp_path / "sheet.png"
    show.main([str(frames), f"--video={opened.videos[5]['video']}", f"--out={out}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    picture = np.asarray(Image.open(out))
    assert picture.shape[1] == show.WIDTH
    stored = opened[5]["frames"]
    assert len(stored) == 12 and len({frame.tobytes() for frame in stored}) > 6
    for i, frame in enumerate(stored):
        np.testing.assert_array_equal(tile(picture, i, TOP), frame)


def test_a_strip_says_all_that_is_known(frames):
    opened = store.open_store(frames)
    rows = [row for row in opened.instructions if row["video"] == opened.videos[2]["video"]]
    whole = show.strip(opened, 2)
    assert whole.title == f"{opened.videos[2]['video']}: 64×64, 4.00 s, 12 of 32 frames"
    assert whole.labels == [f"{seconds:.2f} s" for seconds in opened[2]["timestamps"]]
    texts = [text for text, _ in whole.texts]
    assert texts[1::2] == [row["answer"] for row in rows] and len(texts) == 2 * len(rows)
    assert texts[0] == f"1. [{rows[0]['language']}, {rows[0]['kind']}] {rows[0]['question']}"
    short = show.strip(opened, 2, 4, 2)
    np.testing.assert_array_equal(short.frames, opened[2]["frames"][[0, 4, 7, 11]])
    assert short.labels == [whole.labels[i] for i in (0, 4, 7, 11)]
    assert short.texts[:4] == whole.texts[:4]
    assert short.texts[4][0] == f"… and {len(rows) - 2} more: --video={opened.videos[2]['video']}"


def test_random_videos_are_strips_of_one_sheet(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(show.random, "sample", lambda all_of_them, n: [7, 3][:n])
    show.main([str(frames), "--random=2", f"--out={tmp_path / 'r.png'}"])
    picture, opened = np.asarray(Image.open(tmp_path / "r.png")), store.open_store(frames)
    first = [show.strip(opened, index, 8, 3) for index in (3, 7)]
    for i in range(8):
        np.testing.assert_array_equal(tile(picture, i, TOP), first[0].frames[i])
    sheet, _ = show.draw_strips(first)
    np.testing.assert_array_equal(picture, np.asarray(sheet))
    alone = show.draw_strips(first[:1])[0].height
    np.testing.assert_array_equal(tile(picture, 0, alone - 2 * show.GAP + TOP), first[1].frames[0])


def test_times_and_shapes_that_are_unknown(tmp_path):
    opened = store.open_store(made_store(tmp_path / "s", {}, [line("a", 2, None)], []))
    found = show.strip(opened, 0)
    assert found.title == "a: 1920×240, 2 of 30 frames" and found.labels == ["–", "–"]
    assert found.texts == [("no question is about this video", show.GREY)]
    assert [show._time(s) for s in (0.0, 9.87, 12.34, 59.6, 125)] == [
        "0.00 s",
        "9.87 s",
        "12.3 s",
        "1:00 min",
        "2:05 min",
    ]


def font_with(characters: str, path: Path) -> Path:
    """Writes a font in which each of the characters is a full square, and a blank."""
    square = TTGlyphPen(None)
    for move, point in (("moveTo", (0, 0)), ("lineTo", (0, 900)), ("lineTo", (900, 900)), ("lineTo", (900, 0))):
        getattr(square, move)(point)
    square.closePath()
    full, empty = square.glyph(), TTGlyphPen(None).glyph()
    names = [".notdef", "space", *(f"u{ord(char):X}" for char in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({32: "space"} | {ord(char): f"u{ord(char):X}" for char in characters})
    builder.setupGlyf({name: empty if name == "space" else full for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular", "psName": path.stem})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_the_font_with_the_fewest_gaps_is_taken(tmp_path, monkeypatch):
    some = font_with("abc红", tmp_path / "Some.ttf")
    bold, more = (font_with("abc红色", tmp_path / name) for name in ("A-Bold.ttf", "More.ttf"))
    boxes, broken = font_with("abc红色é", tmp_path / "LastResort.ttf"), tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    installed = [str(path) for path in (bold, boxes, broken, some, more)]
    monkeypatch.setattr(lettering, "findSystemFonts", lambda: installed)
    font, lacking = lettering.choose_font(["abc", "红 色\n"], 16)
    assert Path(font.path) == more and lacking == set()
    font, lacking = lettering.choose_font(["abc红色形"], 16)
    assert Path(font.path) == more and lacking == {"形"}
    assert lettering.escape("a形b🎬\a", {"形", "🎬", "\a"}) == r"a\u5f62b\U0001f3ac\x07"
    font, lacking = lettering.choose_font(["abc é …×–"], 16)
    assert Path(font.path).name == "DejaVuSans.ttf" and lacking == set()


def test_chinese_is_drawn_with_a_font_and_escaped_without(tmp_path, monkeypatch, capsys):
    """With a font of squares a Chinese text is squares of its colour; without one it is Latin letters."""
    made = made_store(tmp_path / "s", {}, [line("a")], [question("a", "zh", "红色", "红红")])
    show.main([str(made), "--video=a", f"--out={tmp_path / 'escaped.png'}"])
    note, name = capsys.readouterr().out.splitlines()
    assert note.startswith(r"note: 红色 drawn as \uXXXX") and "fonts-noto-cjk" in note and str(made) in note
    assert name == str(tmp_path / "escaped.png")

    ascii_too = "".join(map(chr, range(33, 127)))
    font = font_with(f"红色×–{ascii_too}", tmp_path / "squares.ttf")
    monkeypatch.setattr(lettering, "findSystemFonts", lambda: [str(font)])
    show.main([str(made), "--video=a", f"--out={tmp_path / 'drawn.png'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'drawn.png'}\n"
    drawn, escaped = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("drawn", "escaped"))
    blue = {name: (picture == show.BLUE).all(-1) for name, picture in (("drawn", drawn), ("escaped", escaped))}
    assert blue["drawn"].sum() > 2 * 13**2  # two squares of some 14 × 14 pixels
    columns = {name: np.flatnonzero(found.any(0)).max() for name, found in blue.items()}
    assert columns["drawn"] < show.GAP + 2 * 16 and columns["escaped"] > show.GAP + 80


def test_lines_break_where_their_language_does():
    font, _ = lettering.choose_font(["x"], 16)
    text = "A ball moves 红色的球从左边移动到右边 " + "x" * 60
    lines = lettering.wrap(lettering.tidy(text), font, 120)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(0 < font.getlength(line) <= 120 for line in lines)
    assert lines[0].startswith("A ball") and not any(line.endswith("mov") for line in lines)
    assert lettering.wrap(lettering.tidy("Which?\n A.\tone  two\r\n\n B. é e\u0301"), font, 500) == [
        "Which?",
        "A. one two",
        "B. é é",
    ]


def test_distributions_are_counted(tmp_path, capsys):
    lines = [line("a", 3, 2.0, 10), line("b", 1, None, 20), line("c", 2, 6.0, 60)]
    questions = [
        question("a", "en", "Isn't it a well-known cat?", "Yes."),
        question("a", "zh", "这是什么？", "一只 red 猫"),
        question("b", "en", "What?", "two cats"),
    ]
    opened = store.open_store(made_store(tmp_path / "s", {}, lines, questions))
    assert show.distributions(opened) == {
        "duration, seconds": [2.0, 6.0],
        "frames in the file": [10, 20, 60],
        "frames in the store": [3, 1, 2],
        "questions per video": [2, 1, 0],
        "en question, characters": [26, 5],
        "en question, words": [5, 1],
        "en answer, characters": [4, 8],
        "en answer, words": [1, 2],
        "zh question, characters": [5],
        "zh question, words": [4],
        "zh answer, characters": [8],
        "zh answer, words": [4],
    }
    show.main([str(tmp_path / "s"), "--stats", f"--out={tmp_path / 'stats.png'}"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:2] == ["duration,", "seconds"]
    assert printed[1].split()[2:] == ["2", "2.0", "2.4", "4.0", "5.6", "6.0", "4.0"]
    assert len(printed) == 14 and printed[-1] == str(tmp_path / "stats.png")
    picture = np.asarray(Image.open(tmp_path / "stats.png").convert("RGB"))
    for row in np.split(picture, 3):
        for axes in np.split(row, 4, axis=1):  # a histogram and its median in each
            assert (axes == (107, 174, 214)).all(-1).sum() > 500 and (axes == (214, 39, 40)).all(-1).sum() > 50


def test_a_store_without_questions_and_one_of_streams_have_distributions(tmp_path, capsys):
    made = made_store(tmp_path / "s", {}, [line("a")], [])
    show.main([str(made), "--stats", f"--out={tmp_path / 'x.png'}"])
    assert "note: the store has no questions" in capsys.readouterr().out
    streams = {"kind": "streams", "dtype": "float32", "streams": {"spatial": [2, 3]}}
    made = made_store(tmp_path / "t", streams, [line("a")], [question("a", "en", "Q?", "A")], {"made_from": "/data/f"})
    show.main([str(made), "--stats", f"--out={tmp_path / 'x.png'}"])
    assert "en question, words" in capsys.readouterr().out
    for what in ("--video=a", "--random=2"):
        with pytest.raises(UserError, match=r"holds streams, no frames: give the frame store .* streams, /data/f$"):
            show.main([str(made), what, f"--out={tmp_path / 'x.png'}"])


def test_mistakes_end_in_one_line(frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in {
        (str(frames), "--video=train-0003"): r"has no video 'train-0003'; nearest: train-00003, train-000\d\d, ",
        (str(frames), "--video=猫"): "has no video '猫'; its 12 videos are train-00000, train-00001, train-00002, …",
        ("nowhere", "--stats"): "nowhere: is not a store of videos",
        (str(frames), "--random=0"): "--random: expected a number from 1 to 100, got 0",
        (str(frames), "--random=many"): "--random: expected a number from 1 to 100, got many",
        (str(frames),): "one of the arguments --video --random --stats is required",
        (str(frames), "--stats", "--random=2"): "not allowed with",
        (str(frames), "--stats", "--out=x.jpg"): "--out=x.jpg: expected a name that ends in .png",
        (str(frames), "--stats", "--out=no/x.png"): "--out=no/x.png: there is no folder no",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            show.main(list(arguments))
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.png"))


def test_pictures_of_others_are_not_replaced(frames, tmp_path):
    mine = tmp_path / "holiday.png"
    for write in (lambda: Image.new("RGB", (3, 3)).save(mine), lambda: mine.write_text("no picture")):
        write()
        before = mine.read_bytes()
        with pytest.raises(UserError, match=r"holiday\.png: was not drawn by this command"):
            show.main([str(frames), "--random=1", f"--out={mine}"])
        assert mine.read_bytes() == before
    for _ in range(2):
        show.main([str(frames), "--random=1", f"--out={tmp_path / 'sheet.png'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.png", "sheet.png"]


def test_a_store_in_a_bucket_is_drawn_alike(frames, tmp_path):
    opened = store.open_store(frames)
    with fake_gcs.serve("bucket") as server:
        server.upload(frames, "bucket", "frames")
        arguments = ["gs://bucket/frames", f"--video={opened.videos[1]['video']}", "--out=gs://bucket/sheet.png"]
        done = subprocess.run(
            [sys.executable, "-m", "data_pipeline.show", *arguments],
            cwd=ROOT,
            env=os.environ | server.environment | {"XDG_DATA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.endswith("gs://bucket/sheet.png\n"), done.stderr
        (tmp_path / "sheet.png").write_bytes(server.buckets["bucket"]["sheet.png"].data)
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    for i, frame in enumerate(opened[1]["frames"]):
        np.testing.assert_array_equal(tile(picture, i, TOP), frame)
