import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline import prepare, store
from data_pipeline.common.errors import UserError, run
from data_pipeline.media.decode import read_video

ROOT = Path(__file__).parents[1]


def write_video(path, seed, num_frames=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            image = np.kron(rng.integers(0, 256, (2, 2, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def question(id, video):
    return {"id": id, "video": video, "language": "en", "question": "What?", "answer": "That."}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Videos c, a (in a folder, upper-case extension), broken and silent; questions on c, a, broken and absent."""
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "videos" / "c.mp4", 0)
    write_video(folder / "videos" / "more" / "a.MOV", 1, num_frames=3)
    write_video(folder / "videos" / "silent.mkv", 2)
    (folder / "videos" / "broken.avi").write_text("not a video")
    (folder / "videos" / "notes.txt").write_text("not looked at")
    asked = ["c", "a", "broken", "absent", "c"]
    rows = [question(str(i), video) for i, video in enumerate(asked)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(data, out, *more):
    common = (f"--videos={data / 'videos'}", f"--instructions={data / 'questions.jsonl'}", f"--out={out}")
    return [*common, "--num_frames=4", "--image_size=8", "--format=raw", *more]


def error(argv):
    with pytest.raises(UserError) as raised:
        prepare.main(argv)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_stores_what_can_be_used_and_tells_the_rest(data, tmp_path, capsys, workers):
    prepare.main(arguments(data, tmp_path / "s", f"--num_workers={workers}"))
    frames = store.open_store(tmp_path / "s")
    assert [line["video"] for line in frames.videos] == ["a", "c"]
    assert [line["source"] for line in frames.videos] == ["more/a.MOV", "c.mp4"]
    assert [line["num_frames"] for line in frames.videos] == [3, 4]
    assert [line["total_frames"] for line in frames.videos] == [3, 12]
    assert frames.instructions == [question("0", "c"), question("1", "a"), question("4", "c")]
    assert frames.meta["image_size"] == 8 and frames.meta["quality"] is None
    expected = read_video(data / "videos" / "c.mp4", num_frames=4, image_size=8, resize="nearest")
    assert np.array_equal(frames[1]["frames"], expected.frames)
    assert np.array_equal(frames[1]["timestamps"], expected.timestamps)

    report = json.loads((tmp_path / "s" / "report.json").read_text())
    left_out = report.pop("videos_left_out")
    assert report == {
        "videos_found": 4,
        "videos_used": 2,
        "videos_cut_short": [],
        "records": 2,
        "videos_without_question": ["silent"],
        "instructions": [
            {
                "file": str(data / "questions.jsonl"),
                "weight": 1.0,
                "questions": 5,
                "taken": 5,
                "prefix": "",
            }
        ],
        "rows_left_out": [],
        "questions_found": 5,
        "questions_used": 3,
        "questions_without_video": [{"id": "2", "video": "broken"}, {"id": "3", "video": "absent"}],
        "questions_repeated": [{"id": "4", "same_as": "0"}],
    }
    assert [video["video"] for video in left_out] == ["broken"]
    assert "broken.avi: cannot be decoded" in left_out[0]["reason"]
    printed = capsys.readouterr().out
    assert "2 of 4 videos, 3 of 5 questions" in printed
    assert "1 videos without a question (silent)" in printed
    assert left_out[0]["reason"] in printed
    assert "2 questions about 2 videos that are not in the store (absent, broken)" in printed
    assert "kept: 1 questions that repeat another about their video (4)" in printed


def test_prepare_mixes_question_files(data, tmp_path, capsys):
    """A file twice over, one in another form with the same ids and names with v_."""
    more = [{"q": f"What {i}?", "a": "That.", "video_id": video} for i, video in enumerate(("v_a", "v_c", "v_x"))]
    (tmp_path / "more.json").write_text(json.dumps(more))
    flags = (f"--instructions={tmp_path / 'more.json'}:2", "--num_workers=1")
    prepare.main(arguments(data, tmp_path / "s", *flags))
    asked = [(row["id"], row["video"]) for row in store.open_store(tmp_path / "s").instructions]
    assert asked == [
        *(("questions/0", "c"), ("questions/1", "a"), ("questions/4", "c")),
        *(("more/0", "a"), ("more/0#2", "a"), ("more/1", "c"), ("more/1#2", "c")),
    ]
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert [(file["weight"], file["taken"], file["prefix"]) for file in report["instructions"]] == [
        (1.0, 5, "questions/"),
        (2.0, 6, "more/"),
    ]
    assert report["questions_without_video"][-1] == {"id": "more/2#2", "video": "v_x"}
    printed = capsys.readouterr().out
    assert "more.json: 6 questions from 3, weight 2, ids begin with more/ (another file has some of them)" in printed


def test_prepare_reads_an_evaluation_set(data, tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    asked = [{"video_name": video, "question": "is it red", "question_id": f"v_{video}_1"} for video in ("a", "x")]
    (folder / "test_q.json").write_text(json.dumps(asked))
    answers = [{"answer": "no", "type": 3, "question_id": row["question_id"]} for row in asked[::-1]]
    (folder / "test_a.json").write_text(json.dumps(answers))
    flags = [f"--videos={data / 'videos'}", f"--out={tmp_path / 's'}", "--num_frames=2", "--image_size=8"]
    flags += ["--num_workers=1"]
    prepare.main([*flags, "--benchmark=activitynet_qa", f"--instructions={folder}"])
    assert [row["kind"] for row in store.open_store(tmp_path / "s").instructions] == ["yes/no"]
    assert "1 questions about 1 videos that are not in the store (x)" in capsys.readouterr().out
    assert "invalid choice: 'mmbench'" in error([*flags, "--benchmark=mmbench", "--instructions=x"])


def test_prepare_takes_image_size_and_resize_from_a_base(data, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "base.json").write_text(
        json.dumps({"family": "qwen_vl", "fingerprint": "f", "image_size": 14, "resize": "bicubic"})
    )
    flags = [*arguments(data, tmp_path / "s")[:3], "--num_frames=2", f"--base={base}", "--num_workers=1"]
    prepare.main(flags)
    frames = store.open_store(tmp_path / "s")
    assert frames[0]["frames"].shape == (2, 14, 14, 3)
    assert frames.meta | {"fingerprint": ""} == {
        "kind": "frames",
        "num_frames": 2,
        "sampling": "uniform",
        "image_size": 14,
        "resize": "bicubic",
        "format": "jpeg",
        "quality": 95,
        "fingerprint": "",
    }
    assert "drop --image_size and --resize" in error([*flags, "--image_size=8"])
    (base / "base.json").write_text(
        json.dumps({"family": "qwen_vl", "fingerprint": "f", "image_size": 14, "resize": "area"})
    )
    assert "base.json: resize 'area' is no rule, expected nearest, bicubic" in error(flags)
    assert "has no base.json" in error([*flags, f"--base={tmp_path}"])


def test_prepare_again_decodes_nothing(data, tmp_path, monkeypatch):
    prepare.main(arguments(data, tmp_path / "s", "--num_workers=1"))
    meta = store.open_store(tmp_path / "s").meta
    monkeypatch.setattr(prepare, "read_video", None)
    prepare.main(arguments(data, tmp_path / "s", "--num_workers=1"))
    assert store.open_store(tmp_path / "s").meta == meta
    message = error(arguments(data, tmp_path / "s", "--num_frames=3", "--num_workers=1"))
    assert "was made with num_frames=4 (now 3)" in message


def test_mistakes_end_in_one_line(data, tmp_path):
    flags = arguments(data, tmp_path / "s")
    assert "--out" in error(flags[:2])
    assert "unknown flag --imagesize; did you mean --image_size?" in error([*flags, "--imagesize=8"])
    assert "'lanczos'" in error([*flags, "--resize=lanczos"])
    assert "expected a number from 1 to 10000, got 0" in error([*flags, "--num_frames=0"])
    assert "expected a number from 1 to 4096, got 100000" in error([*flags, "--image_size=100000"])
    assert "nowhere: no such folder" in error([*flags, f"--videos={tmp_path / 'nowhere'}"])
    (tmp_path / "empty").mkdir()
    assert "holds no .mp4" in error([*flags, f"--videos={tmp_path / 'empty'}"])
    assert "no.jsonl: cannot be read" in error([*flags, "--instructions=no.jsonl"])
    write_video(tmp_path / "twice" / "x" / "c.mp4", 0, 1)
    write_video(tmp_path / "twice" / "y" / "c.mkv", 0, 1)
    assert "may be x/c.mp4 and y/c.mkv of" in error([*flags, f"--videos={tmp_path / 'twice'}"])
    write_video(tmp_path / "other" / "z.mp4", 0, 1)
    message = error([*flags, f"--videos={tmp_path / 'other'}"])
    assert "no question is about a video" in message and "'c'" in message and "'z'" in message
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "c.mp4").write_text("not a video")
    assert "none of the 1 videos could be used" in error([*flags, f"--videos={broken}"])


def test_the_command_exits_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(prepare.main, [f"--videos={tmp_path}"])
    assert raised.value.code == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as raised:
        prepare.main(["--help"])
    assert raised.value.code == 0
    assert "python -m data_pipeline.prepare --videos=VIDEOS" in capsys.readouterr().out


def test_a_killed_run_leaves_no_process_and_is_continued(tmp_path):
    """SIGKILL with the first shard written, while a long last video holds back the second."""
    videos = tmp_path / "videos"
    names = [f"v{i:03d}" for i in range(90)]
    write_video(videos / "v000.mp4", 0)
    for name in names[1:-1]:
        os.link(videos / "v000.mp4", videos / f"{name}.mp4")
    write_video(videos / f"{names[-1]}.mp4", 1, num_frames=6000)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question(n, n)) + "\n" for n in names))
    out = tmp_path / "s"
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments(tmp_path, out, "--num_workers=2")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not list(out.glob("frames-train.array_record-*-of-00002")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(list(out.glob("frames-train.array_record-*-of-00002"))) == 1
    process.stderr.read()  # returns once no worker holds the pipe any more
    with pytest.raises(UserError, match="not finished"):
        store.open_store(out)

    prepare.main(arguments(tmp_path, out, "--num_workers=1"))
    frames = store.open_store(out)
    assert [frames[i]["video"] for i in range(len(frames))] == names
    assert not list(out.glob("**/*.tmp"))
