"""What prepare does with the files that people have: lists, parts, odd names, cut files, hanging decoders, machines."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import fake_gcs
import numpy as np
import pytest
from test_prepare import arguments, error, question, write_video
from test_videos import numbers_of, write_numbered

from data_pipeline import prepare, store
from data_pipeline.common.errors import UserError
from data_pipeline.media.decode import read_video
from data_pipeline.media.sampling import uniform_indices

ROOT = Path(__file__).parents[1]


def write_questions(folder, videos, **more):
    rows = [question(str(i), video) | more for i, video in enumerate(videos)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_of(out):
    return json.loads((out / "report.json").read_text())


def contents(out):
    """All files of a store, every byte, and that its records can be read."""
    frames = store.open_store(out)
    assert [frames[i]["video"] for i in range(len(frames))] == [line["video"] for line in frames.videos]
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_parts_of_videos_are_records_of_their_own(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    path = write_numbered(tmp_path / "videos" / "a.mp4", 150)
    asked = {"video": "a.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "x"}
    spans = [
        {"start": 2, "end": 4.5},
        {},
        {"start": 2.0, "end": 4.5},
        {"start": 10, "end": 11},
        {"start": 15, "end": 16},
    ]
    (tmp_path / "action.json").write_text(json.dumps([asked | span for span in spans]))
    flags = [f"--videos={tmp_path / 'videos'}", f"--out={tmp_path / 's'}", "--num_frames=5", "--image_size=48"]
    prepare.main([*flags, "--format=raw", "--benchmark=mvbench", f"--instructions={tmp_path / 'action.json'}"])
    frames = store.open_store(tmp_path / "s")
    assert [line["video"] for line in frames.videos] == ["a", "a#10-11", "a#2-4.5"]
    assert [row["video"] for row in frames.instructions] == ["a#2-4.5", "a", "a#2-4.5", "a#10-11"]
    assert (frames.instructions[0]["start"], frames.instructions[0]["end"]) == (2, 4.5)
    for i, part in enumerate((None, (10, 11), (2, 4.5))):
        video = read_video(path, num_frames=5, image_size=48, resize="nearest", part=part)
        assert np.array_equal(frames[i]["frames"], video.frames)
        assert np.array_equal(frames[i]["timestamps"], video.timestamps)
    assert numbers_of(video) == [22, 27, 32, 36, 41]
    assert (frames.videos[2]["start"], frames.videos[2]["end"], frames.videos[2]["total_frames"]) == (2, 4.5, 150)
    report = report_of(tmp_path / "s")
    assert (report["videos_found"], report["videos_used"], report["records"]) == (1, 1, 3)
    assert [video["video"] for video in report["videos_left_out"]] == ["a#15-16"]
    assert "a.mp4: ends after 15.00 s, before the part from 15 to 16 s" in report["videos_left_out"][0]["reason"]
    assert report["questions_without_video"] == [{"id": "action/4", "video": "a#15-16"}]
    printed = capsys.readouterr().out
    assert report["questions_repeated"] == [{"id": "action/2", "same_as": "action/0"}]
    assert "1 of 1 videos in 3 records (parts of a video have their own), 4 of 5 questions" in printed


def test_parts_that_are_none_are_refused(tmp_path):
    write_video(tmp_path / "videos" / "c.mp4", 0)
    for span, words in (
        ({"start": "1", "end": 2}, "question '0': has start \"1\", end 2, expected two numbers of seconds, or neither"),
        ({"end": 2}, "has start null, end 2"),
        ({"start": 2, "end": 2}, "is about 2 to 2 s"),
    ):
        write_questions(tmp_path, ["c"], **span)
        assert words in error(arguments(tmp_path, tmp_path / "s"))
    write_questions(tmp_path, ["c"], start=0, end=1)
    write_video(tmp_path / "videos" / "c#0-1.mp4", 0)
    assert "c#0-1: is the name of a file and of a part of c" in error(arguments(tmp_path, tmp_path / "s"))


def test_videos_may_be_a_list_and_have_any_extension(tmp_path, capsys):
    write_video(tmp_path / "far" / "c.mp4", 0)
    shutil.copy(tmp_path / "far" / "c.mp4", tmp_path / "far" / "d.clip")
    shutil.copy(tmp_path / "far" / "c.mp4", tmp_path / "far" / "e.gif")
    (tmp_path / "far" / "d.txt").write_text("what is said in d")
    (tmp_path / "far" / "f.dat").write_bytes(os.urandom(1000))
    (tmp_path / "near").mkdir()
    lines = [
        "../far/c.mp4",
        "",
        str(tmp_path / "far" / "d.clip"),
        "../far/d.txt",
        "../far/e.gif",
        "gone.mp4",
        "../far/f.dat",
    ]
    (tmp_path / "near" / "list.txt").write_text("\n".join(lines))
    write_questions(tmp_path, ["c", "d", "e", "gone", "f"])
    flags = arguments(tmp_path, tmp_path / "listed", f"--videos={tmp_path / 'near' / 'list.txt'}")
    prepare.main(flags)
    listed = store.open_store(tmp_path / "listed")
    assert [line["source"] for line in listed.videos] == ["../far/c.mp4", lines[2], "../far/e.gif"]
    left_out = {video["video"]: video["reason"] for video in report_of(tmp_path / "listed")["videos_left_out"]}
    assert left_out.keys() == {"f", "gone"}
    assert "f.dat: " in left_out["f"] and "gone.mp4: cannot be decoded: No such" in left_out["gone"]
    prepare.main(arguments(tmp_path, tmp_path / "found", f"--videos={tmp_path / 'far'}"))
    found = store.open_store(tmp_path / "found")
    assert [line["source"] for line in found.videos] == ["c.mp4", "d.clip", "e.gif"]
    assert report_of(tmp_path / "found")["videos_found"] == 4
    assert all(np.array_equal(found[i]["frames"], listed[i]["frames"]) for i in range(3))
    shutil.copy(tmp_path / "far" / "c.mp4", tmp_path / "far" / "d.film")
    assert "video 'd' may be d.clip and d.film of" in error(
        arguments(tmp_path, tmp_path / "x", f"--videos={tmp_path / 'far'}")
    )
    assert "no such folder, nor a list" in error([*flags, "--videos=nowhere"])
    assert "expected a folder, or a text file" in error([*flags, f"--videos={tmp_path / 'far' / 'c.mp4'}"])


def test_two_files_with_one_id_matter_only_if_they_are_asked_for(tmp_path):
    for name in ("x/c.mp4", "y/c.mkv", "d.mp4"):
        write_video(tmp_path / "videos" / name, 0, 2)
    write_questions(tmp_path, ["d"])
    prepare.main(arguments(tmp_path, tmp_path / "s"))
    assert report_of(tmp_path / "s")["videos_without_question"] == ["x/c", "y/c"]
    assert report_of(tmp_path / "s")["videos_found"] == 3
    write_questions(tmp_path, ["d.mp4", "y/c", "x/c.mp4", "d"])
    prepare.main(arguments(tmp_path, tmp_path / "paths"))
    paths = store.open_store(tmp_path / "paths")
    assert [line["video"] for line in paths.videos] == ["d", "x/c", "y/c"]
    assert [row["video"] for row in paths.instructions] == ["d", "y/c", "x/c", "d"]
    again = arguments(tmp_path, tmp_path / "again", f"--instructions={tmp_path / 'paths' / 'instructions.jsonl'}")
    prepare.main([flag for flag in again if "questions.jsonl" not in flag])
    assert store.open_store(tmp_path / "again").instructions == paths.instructions


def test_odd_rows_are_left_out_with_their_reasons(tmp_path, capsys):
    write_video(tmp_path / "videos" / "c.mp4", 0, 2)
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A man."}]
    rows = [
        {"id": "1", "video": "videos/c.mp4", "conversations": turns},
        {"id": "2", "image": "p.jpg", "conversations": turns},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare.main(arguments(tmp_path, tmp_path / "s"))
    reason = (
        f"{tmp_path / 'questions.jsonl'}: row 2: has no video: expected a field 'video', or <img>path</img> in the text"
    )
    assert report_of(tmp_path / "s")["rows_left_out"] == [reason]
    printed = capsys.readouterr().out
    assert f"left out: 1 records that are no question about a video:\n  {reason}\n" in printed


def test_names_that_are_no_text_are_left_out_before_anything_is_decoded(tmp_path, capsys):
    write_video(tmp_path / "videos" / "c.mp4", 0, 2)
    odd = [b"videos/caf\xe9.mp4", b"videos/\xff/c.mp4", b"videos/\xe9.txt"]
    (tmp_path / os.fsdecode(b"videos/\xff")).mkdir()
    for name in odd:
        shutil.copy(tmp_path / "videos" / "c.mp4", os.fsencode(tmp_path) + b"/" + name)
    write_questions(tmp_path, ["c", "caf\\xe9"])
    prepare.main(arguments(tmp_path, tmp_path / "s", "--num_workers=1"))
    assert [line["source"] for line in store.open_store(tmp_path / "s").videos] == ["c.mp4"]
    report = report_of(tmp_path / "s")
    assert report["videos_found"] == 3
    reasons = [
        f"{tmp_path}/videos/{name}: its name is not UTF-8 text; rename it" for name in (r"caf\xe9.mp4", r"\xff/c.mp4")
    ]
    assert [video["reason"] for video in report["videos_left_out"]] == reasons
    assert reasons[0] in capsys.readouterr().out
    message = error(arguments(tmp_path, tmp_path / "t", f"--videos={tmp_path / os.fsdecode(odd[1])}"))
    assert message.endswith(r"\xff/c.mp4: is not UTF-8 text; rename the file or folder")


def test_a_list_of_files_is_not_the_video_that_it_names(tmp_path):
    write_video(tmp_path / "videos" / "c.mp4", 0, 2)
    (tmp_path / "secret").mkdir()
    write_video(tmp_path / "secret" / "s.mp4", 1, 2)
    (tmp_path / "videos" / "d.mp4").write_text("ffconcat version 1.0\nfile ../secret/s.mp4\noption safe 0\n")
    (tmp_path / "videos" / "e.ffconcat").write_text("ffconcat version 1.0\nfile c.mp4\n")
    write_questions(tmp_path, ["c", "d", "e"])
    prepare.main(arguments(tmp_path, tmp_path / "s", "--num_workers=1"))
    assert [line["video"] for line in store.open_store(tmp_path / "s").videos] == ["c"]
    left_out = report_of(tmp_path / "s")["videos_left_out"]
    assert [video["video"] for video in left_out] == ["d", "e"]
    assert all("is no video in a format that is read" in video["reason"] for video in left_out)


def replace(file, content, like):
    """Other content under a file's name, which keeps the modification time."""
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(like.st_atime_ns, like.st_mtime_ns))


def test_a_video_that_was_replaced_is_noticed(tmp_path, monkeypatch):
    """By one of the same size and modification time; a copy of the same content is the same video."""
    monkeypatch.setattr(store, "VIDEOS_PER_SHARD", 2)
    for i in range(4):
        write_video(tmp_path / "videos" / f"v{i}.mkv", i, 3)
    file, bad = tmp_path / "videos" / "v2.mkv", tmp_path / "videos" / "v3.mkv"
    bad.write_text("not a video")
    write_questions(tmp_path, [f"v{i}" for i in range(4)])
    flags = arguments(tmp_path, tmp_path / "s", "--num_workers=1")
    prepare.main(flags)
    whole, frames = contents(tmp_path / "s"), store.open_store(tmp_path / "s")[2]["frames"]
    hashed, sha256 = [], prepare.sha256
    monkeypatch.setattr(prepare, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    prepare.main(flags)
    assert hashed == [] and contents(tmp_path / "s") == whole

    for path in (file, bad):
        replace(path, path.read_bytes(), path.stat())  # as a copy
    prepare.main(flags)
    assert hashed == ["v2.mkv", "v3.mkv"]
    prepare.main(flags)
    assert len(hashed) == 2  # compared once
    contents(tmp_path / "s")

    old, content = file.stat(), bytearray(file.read_bytes())
    content[-20:-10] = bytes(10)  # somewhere in the last frame
    for path, new in ((file, bytes(content)), (bad, b"not a VIDEO")):
        before, stat = path.read_bytes(), path.stat()
        replace(path, new, stat)
        message = error(flags)
        assert f"the file of '{path.stem}' is not the one whose frames are stored: delete the shard to store" in message
        assert "frames-train.array_record-00001-of-00002" in message
        replace(path, before, stat)
    replace(file, file.read_bytes() * 2, old)  # another size
    assert "the file of 'v2' is not the one whose frames are stored" in error(flags)
    write_video(tmp_path / "videos" / "v2.mkv", 9, 3)
    (tmp_path / "s" / "frames-train.array_record-00001-of-00002").unlink()
    prepare.main(flags)
    assert not np.array_equal(store.open_store(tmp_path / "s")[2]["frames"], frames)


def test_a_store_that_does_not_know_when_videos_changed_is_left_alone(tmp_path):
    """As they were written before; another size is noticed."""
    write_video(tmp_path / "videos" / "c.mp4", 0, 2)
    write_questions(tmp_path, ["c"])
    flags = arguments(tmp_path, tmp_path / "s", "--num_workers=1")
    prepare.main(flags)
    part = tmp_path / "s" / "parts" / "00000-of-00001.json"
    new = ("sources", "checksum")
    part.write_text(json.dumps({name: x for name, x in json.loads(part.read_text()).items() if name not in new}))
    (tmp_path / "videos" / "c.mp4").touch()
    prepare.main(flags)
    with (tmp_path / "videos" / "c.mp4").open("ab") as file:
        file.write(b"more")
    assert "the file of 'c' is not the one whose frames are stored" in error(flags)


def test_a_decoder_that_hangs_costs_its_own_video(tmp_path, capsys):
    """A pipe that nobody writes to, among 8 videos: opening it waits for ever."""
    names = [f"v{i}" for i in range(9)]
    for name in names:
        write_video(tmp_path / "videos" / f"{name}.mp4", 0, 2)
    (tmp_path / "videos" / "v4.mp4").unlink()
    os.mkfifo(tmp_path / "videos" / "v4.mp4")
    write_questions(tmp_path, names)
    prepare.main(arguments(tmp_path, tmp_path / "s", "--num_workers=2", "--time_limit=2"))
    assert [line["video"] for line in store.open_store(tmp_path / "s").videos] == [
        name for name in names if name != "v4"
    ]
    reason = f"{tmp_path / 'videos' / 'v4.mp4'}: the process that decoded it took more than 2 s"
    assert [video["reason"] for video in report_of(tmp_path / "s")["videos_left_out"]] == [reason]
    assert reason in capsys.readouterr().out


def test_files_that_end_early_are_told(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    for name in ("whole", "cut"):
        write_numbered(tmp_path / "videos" / f"{name}.mkv", 150)
    path = tmp_path / "videos" / "cut.mkv"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    write_questions(tmp_path, ["whole", "cut"])
    for _ in range(2):
        prepare.main(arguments(tmp_path, tmp_path / "s"))
        note = report_of(tmp_path / "s")["videos_cut_short"][0]["note"]
        assert "cut.mkv: its header says 15.0 s, the last frame is at 1.8 s: a part of the file may be missing" in note
        assert len(report_of(tmp_path / "s")["videos_cut_short"]) == 1
        assert note in capsys.readouterr().out


def test_other_rules_than_uniform(tmp_path):
    (tmp_path / "videos").mkdir()
    write_numbered(tmp_path / "videos" / "a.mp4", 40)
    write_numbered(tmp_path / "videos" / "b.mp4", 150)
    write_questions(tmp_path, ["a", "b"])
    more = ("--image_size=48", "--num_frames=8")
    prepare.main(arguments(tmp_path, tmp_path / "s", "--sampling=fps=1.0", *more))
    frames = store.open_store(tmp_path / "s")
    assert frames.meta["sampling"] == "fps=1" and frames.meta["num_frames"] == 8
    assert frames[0]["timestamps"].tolist() == [0, 1, 2, 3]
    assert frames[1]["timestamps"].tolist() == uniform_indices(15, 8).tolist()
    assert frames.padded([0])["num_frames"].tolist() == [4]
    message = error(arguments(tmp_path, tmp_path / "s", "--sampling=every=4", *more))
    assert "was made with sampling=fps=1 (now every=4)" in message
    assert "'fps' is no rule, expected uniform, fps=F or every=N" in error(arguments(tmp_path, "x", "--sampling=fps"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Ten small videos in shards of two, and the store of one run."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(10):
        write_video(folder / "videos" / f"v{i}.mp4", i, 3)
    (folder / "videos" / "v3.mp4").write_text("not a video")
    write_questions(folder, [f"v{i}" for i in range(10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "VIDEOS_PER_SHARD", 2)
        prepare.main(arguments(folder, folder / "whole"))
    return folder


def test_machines_share_a_store(many, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "VIDEOS_PER_SHARD", 2)
    out = tmp_path / "s"
    for number, missing in ((2, 3), (3, 2)):
        prepare.main(arguments(many, out, f"--shard={number}/3"))
        assert f"run {number} of 3 has done its part; {missing} of 5 shards are missing" in capsys.readouterr().out
        with pytest.raises(UserError, match="is not finished"):
            store.open_store(out)
    prepare.main(arguments(many, out, "--shard=1/3"))
    assert "9 of 10 videos" in capsys.readouterr().out
    assert contents(out) == contents(many / "whole")
    (out / "frames-train.array_record-00004-of-00005").unlink()  # to try its videos again
    prepare.main(arguments(many, out, "--shard=2/3"))
    assert contents(out) == contents(many / "whole")
    for wrong in ("0/3", "4/3", "1", "a/b"):
        assert "expected 1/N to N/N" in error(arguments(many, out, f"--shard={wrong}"))


def test_machines_share_a_store_in_a_bucket(many, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "VIDEOS_PER_SHARD", 2)
    with fake_gcs.serve("bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for number in (1, 2):
            prepare.main(arguments(many, "gs://bucket/s", f"--shard={number}/2"))
        assert "2 of 5 shards are missing" in capsys.readouterr().out
        out = server.download("bucket", "s", tmp_path / "s")
    assert contents(out) == contents(many / "whole")


def start(folder, out, *more):
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments(folder, out, "--num_workers=2", *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_sigkill_ten_times_leaves_the_store_of_an_undisturbed_run(tmp_path):
    for i in range(4):
        write_video(tmp_path / "videos" / f"v{i:04d}.mp4", i, num_frames=400)
    names = [f"v{i:04d}" for i in range(1200)]
    for i, name in enumerate(names[4:], start=4):
        os.link(tmp_path / "videos" / f"v{i % 4:04d}.mp4", tmp_path / "videos" / f"{name}.mp4")
    write_questions(tmp_path, names)
    begin = time.monotonic()
    whole = start(tmp_path, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - begin
    rng, killed = random.Random(0), 0
    while killed < 10:
        run = start(tmp_path, tmp_path / "s")
        time.sleep(2 + rng.uniform(0, 0.3 * seconds))
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stderr.read()  # until no worker holds it any more
        killed += 1
    last = start(tmp_path, tmp_path / "s")
    assert last.wait() == 0, last.stderr.read()
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    begin = time.monotonic()
    assert start(tmp_path, tmp_path / "s").wait() == 0
    print(f"undisturbed {seconds:.1f} s, {killed} kills, nothing to do {time.monotonic() - begin:.1f} s")
    assert killed == 10


@pytest.mark.slow
def test_an_hour_takes_seconds_and_little_memory(tmp_path):
    """90,000 frames of which 100 are kept; the peak of the worker is compared with that for ten seconds."""
    folder, length = tmp_path / "videos", {"short": 250, "hour": 90_000}
    folder.mkdir()
    for name, total in length.items():
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "250"})
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
            for i in range(total):
                image = np.full((120, 160, 3), (i * 7919) % 256, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    code = (
        "import resource, sys, time; from data_pipeline.media.decode import read_video; begin = time.monotonic();"
        "video = read_video(sys.argv[1], num_frames=100, image_size=64, resize='nearest', threads=1);"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024;"
        "print(video.total_frames, time.monotonic() - begin, peak, *video.frames[:, 30, 30, 0])"
    )
    seconds, peak = {}, {}
    for name, total in length.items():
        command = [sys.executable, "-c", code, str(folder / f"{name}.mp4")]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        assert int(output[0]) == total
        seconds[name], peak[name] = float(output[1]), int(output[2])
        levels = np.array([int(level) for level in output[3:]])
        np.testing.assert_allclose(levels, uniform_indices(total, 100) * 7919 % 256, atol=4)
    print(f"seconds {seconds}, peak MiB {peak}")
    assert seconds["hour"] < 60 and peak["hour"] < peak["short"] + 50
