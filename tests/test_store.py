import json
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipeline import shard_checks, store
from data_pipeline.common.errors import UserError

SETTINGS = {
    "kind": "frames",
    "num_frames": 4,
    "sampling": "uniform",
    "image_size": 8,
    "resize": "nearest",
    "format": "raw",
    "quality": None,
}
SOURCES = [{"video": f"视频{i}", "source": f"{i}.mp4", "bytes": i} for i in range(7)]
QUESTIONS = [{"id": "0", "video": "视频0", "language": "en", "question": "Q?", "answer": "A."}]


@pytest.fixture(autouse=True)
def three_videos_a_shard(monkeypatch):
    monkeypatch.setattr(store, "VIDEOS_PER_SHARD", 3)


def frames_of(source):
    """Video i has i % 4 + 1 frames of noise; video 4 gives none."""
    rng = np.random.default_rng(source["bytes"])
    return rng.integers(0, 256, (source["bytes"] % 4 + 1, 8, 8, 3), np.uint8)


def result(source, settings=SETTINGS):
    if source["bytes"] == 4:
        return {"reason": "4.mp4: broken"}
    frames = frames_of(source)
    encoded = store.encode_frames(frames, settings["format"], settings["quality"])
    record = {"frames": encoded, "timestamps": np.arange(len(frames), dtype=np.float32) / 2}
    return {"line": {"video": source["video"], "num_frames": len(frames)}, "record": record}


def make(path, settings=SETTINGS, sources=SOURCES, encode=lambda sources: map(result, sources)):
    shards = store.write_shards(path, settings, sources, encode)
    store.finish_store(path, settings, shards, QUESTIONS, {"left_out": shards.left_out})
    return store.open_store(path)


USED = [source for source in SOURCES if source["bytes"] != 4]


def test_a_store_gives_back_its_frames(tmp_path):
    frames = make(tmp_path / "s")
    assert len(frames) == 6
    assert [line["video"] for line in frames.videos] == [source["video"] for source in USED]
    assert frames.instructions == QUESTIONS
    assert {name: frames.meta[name] for name in SETTINGS} == SETTINGS
    for i, source in enumerate(USED):
        record = frames[i]
        assert record["video"] == source["video"]
        assert np.array_equal(record["frames"], frames_of(source))
        assert record["frames"].dtype == np.uint8
        assert record["timestamps"].tolist() == [t / 2 for t in range(len(record["frames"]))]


def test_tfds_reads_a_store_without_tensorflow(tmp_path):
    for format, quality in (("raw", None), ("jpeg", 95)):
        settings = {**SETTINGS, "format": format, "quality": quality}
        make(tmp_path / format, settings, encode=lambda sources, s=settings: (result(x, s) for x in sources))
        source = tfds.builder_from_directory(tmp_path / format).as_data_source("train")
        assert len(source) == 6
        for i, used in enumerate(USED):
            frames = np.stack(list(source[i]["frames"]))
            assert frames.shape == frames_of(used).shape
            assert format == "jpeg" or np.array_equal(frames, frames_of(used))
    assert "tensorflow" not in sys.modules


def test_jpeg_frames_are_close(tmp_path):
    ramp = np.linspace(0, 255, 64).reshape(8, 8, 1).astype(np.uint8)
    frames = np.concatenate([ramp, ramp[::-1], np.full_like(ramp, 90)], -1)[None]
    encoded = store.encode_frames(frames, "jpeg", 95)
    settings = {**SETTINGS, "format": "jpeg", "quality": 95}
    answer = {
        "line": {"video": SOURCES[0]["video"], "num_frames": 1},
        "record": {"frames": encoded, "timestamps": np.zeros(1, np.float32)},
    }
    frames_back = make(tmp_path / "s", settings, SOURCES[:1], lambda sources: [answer])[0]["frames"]
    assert np.abs(frames_back.astype(int) - frames).max() <= 8


def test_a_stopped_run_continues_with_the_missing_shards(tmp_path):
    asked = []

    def encode(sources, stop_at=None):
        for source in sources:
            if source["bytes"] == stop_at:
                raise KeyboardInterrupt
            asked.append(source["bytes"])
            yield result(source)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "s", encode=lambda sources: encode(sources, stop_at=5))
    assert asked == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="not finished"):
        store.open_store(tmp_path / "s")
    names = {file.name for file in (tmp_path / "s").iterdir()}
    assert "frames-train.array_record-00000-of-00003" in names
    assert "frames-train.array_record-00001-of-00003" not in names

    asked.clear()
    frames = make(tmp_path / "s", encode=encode)
    assert asked == [3, 4, 5, 6]
    whole = make(tmp_path / "whole")
    assert frames.meta == whole.meta and frames.videos == whole.videos
    assert all(np.array_equal(frames[i]["frames"], whole[i]["frames"]) for i in range(len(whole)))
    assert not list((tmp_path / "s").glob("**/*.tmp"))


def test_a_finished_store_is_not_touched_again(tmp_path):
    make(tmp_path / "s")
    before = {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}

    def encode(sources):
        assert sources == []
        return []

    make(tmp_path / "s", encode=encode)
    assert before == {file: file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file()}


def test_left_out_videos_are_told_at_every_run(tmp_path):
    for _ in range(2):
        make(tmp_path / "s")
        report = json.loads((tmp_path / "s" / "report.json").read_text())
        assert report["left_out"] == [{**SOURCES[4], "reason": "4.mp4: broken"}]


def test_a_shard_may_be_empty(tmp_path):
    sources = [{**source, "bytes": 4} if i < 3 else source for i, source in enumerate(SOURCES)]
    frames = make(tmp_path / "s", sources=sources)
    assert len(frames) == 3
    assert frames[0]["video"] == "视频3" and frames[2]["video"] == "视频6"


def test_other_settings_or_videos_are_refused_by_name(tmp_path):
    make(tmp_path / "s")
    with pytest.raises(UserError, match=r"image_size=8 \(now 16\), resize=nearest \(now bicubic\)"):
        make(tmp_path / "s", {**SETTINGS, "image_size": 16, "resize": "bicubic"})
    with pytest.raises(UserError, match=r"other videos \(1 added, removed or moved, the first: 视频6\)"):
        make(tmp_path / "s", sources=SOURCES[:6])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UserError, match="is not a store of videos"):
        make(tmp_path / "other")
    with pytest.raises(UserError, match="is not a store of videos"):
        store.open_store(tmp_path / "other")


def test_the_fingerprint_tells_stores_apart(tmp_path):
    assert make(tmp_path / "a").meta == make(tmp_path / "b").meta
    assert make(tmp_path / "c", sources=SOURCES[:6]).meta["fingerprint"] != make(tmp_path / "a").meta["fingerprint"]


def test_a_store_is_pickled_as_its_path(tmp_path):
    frames = make(tmp_path / "s")
    frames[0], frames.instructions  # opened
    pickled = pickle.dumps(frames)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled)[2]["frames"], frames[2]["frames"])


# ---- damage: what reads a store says it in one line, what makes it mends it


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def place_of(shard, source):
    """Where a video's frames, which are noise and cannot be compressed, lie in a shard."""
    return shard.read_bytes().index(frames_of(source).tobytes()[:16])


def exchange(a, b):
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def edit(file, change):
    value = json.loads(file.read_text())
    file.write_text(json.dumps(change(value) or value))


SHARDS = [f"frames-train.array_record-0000{i}-of-00003" for i in range(3)]
PARTS = [f"parts/0000{i}-of-00003.json" for i in range(3)]
DAMAGES = {  # what is done: (which shards are made again, what a reader says or None where it cannot suffer)
    "cut": ([1], f"{SHARDS[1]}: has 65536 bytes, expected 131072"),
    "empty": ([1], f"{SHARDS[1]}: has 0 bytes, expected 131072"),
    "gone": ([1], f"{SHARDS[1]} is missing"),
    "a byte of a record": ([1], f"{SHARDS[1]}: record 0, '视频3', cannot be read (Corrupted"),
    "a byte of a later record": ([1], f"{SHARDS[1]}: record 1, '视频5', cannot be read (Corrupted"),
    "two exchanged": ([0, 1], f"{SHARDS[0]}: record 0, '视频0', is that of '视频3'"),
    "another store's": (
        [0],
        f"{SHARDS[0]}: record 0, '视频0', has frames of shape (2, 8, 8, 3), expected (1, 8, 8, 3)",
    ),
    "lines cut": ([2], None),
    "lines exchanged": ([0, 1], None),
    "lines null": ([0], None),
    "lines with another number": ([0], None),
    "videos.jsonl half": ([], "videos.jsonl: line 6: has no line break at its end"),
    "videos.jsonl of another": ([], "do not belong together"),
    "instructions.jsonl a byte": ([], "do not belong together"),
    "instructions.jsonl not UTF-8": ([], "instructions.jsonl: line 1: is not UTF-8 text"),
    "store.json cut": ([], "store.json: is not whole JSON"),
    "store.json other settings": ([], "do not belong together"),
    "store.json a list": ([], "store.json: is a list, expected an object"),
    "features.json": ([], None),
    "dataset_info.json": ([], None),
    "report.json": ([], None),
}
FOLDERS = (SHARDS[1], PARTS[1], "videos.jsonl", "features.json", "store.json")


def damage(path, kind):
    shards, parts = ([path / name for name in names] for names in (SHARDS, PARTS))
    if kind == "another store's":

        def encode(sources):
            for one in map(result, sources):
                if "record" in one:
                    one["record"]["frames"] = np.repeat(one["record"]["frames"], 2, 0)
                yield one

        make(path.parent / "longer", {**SETTINGS, "num_frames": 8}, encode=encode)
        shards[0].write_bytes((path.parent / "longer" / SHARDS[0]).read_bytes())
        return
    {
        "cut": lambda: shards[1].write_bytes(shards[1].read_bytes()[:65536]),
        "empty": lambda: shards[1].write_bytes(b""),
        "gone": lambda: shards[1].unlink(),
        "a byte of a record": lambda: flip(shards[1], place_of(shards[1], SOURCES[3])),
        "a byte of a later record": lambda: flip(shards[1], place_of(shards[1], SOURCES[5])),
        "two exchanged": lambda: exchange(shards[0], shards[1]),
        "lines cut": lambda: parts[2].write_bytes(parts[2].read_bytes()[:-20]),
        "lines exchanged": lambda: exchange(parts[0], parts[1]),
        "lines with another number": lambda: edit(parts[0], lambda part: part | {"num_bytes": part["num_bytes"] + 1}),
        "lines null": lambda: parts[0].write_text("null"),
        "videos.jsonl half": lambda: (path / "videos.jsonl").write_bytes((path / "videos.jsonl").read_bytes()[:-9]),
        "videos.jsonl of another": lambda: (path / "videos.jsonl").write_bytes(
            (path / "videos.jsonl").read_bytes().replace(b"3}", b"2}")
        ),
        "instructions.jsonl a byte": lambda: flip(path / "instructions.jsonl", -5),
        "instructions.jsonl not UTF-8": lambda: (path / "instructions.jsonl").write_bytes(b'{"id": "\xff"}\n'),
        "store.json cut": lambda: (path / "store.json").write_bytes((path / "store.json").read_bytes()[:50]),
        "store.json other settings": lambda: edit(path / "store.json", lambda meta: meta | {"num_frames": 5}),
        "store.json a list": lambda: edit(path / "store.json", lambda meta: [meta]),
    }.get(kind, lambda: (path / kind).write_text("{"))()


def read_all(path):
    frames = store.open_store(path)
    return frames.instructions, [frames[i] for i in range(len(frames))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "VIDEOS_PER_SHARD", 3)
        make(path := tmp_path_factory.mktemp("whole") / "s")
    return path


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_said_and_mended(kind, whole, tmp_path, capsys):
    path, (again, message) = tmp_path / "s", DAMAGES[kind]
    shutil.copytree(whole, path)
    damage(path, kind)
    if message is None:
        asked, records = read_all(path)
        assert asked == QUESTIONS and [r["video"] for r in records] == [source["video"] for source in USED]
    else:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            read_all(path)
        assert "\n" not in str(error.value) and "run the command that made the store again" in str(error.value)

    asked = []
    make(path, encode=lambda sources: map(result, asked.extend(sources) or sources))
    assert asked == [source for i in again for source in SOURCES[3 * i : 3 * i + 3]]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(again) - (kind == "gone") and all("is made again" in note for note in notes)
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    assert {name: (path / name).read_bytes() for name in files} == {name: (whole / name).read_bytes() for name in files}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_the_place_of_a_file_is_said(name, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "s")
    (path / name).unlink()
    (path / name / "x").mkdir(parents=True)
    for work in (read_all, make):
        if (work, name) not in ((read_all, PARTS[1]), (read_all, "features.json")):
            with pytest.raises(UserError) as error:
                work(path)
            assert "\n" not in str(error.value)
    assert (path / name / "x").is_dir() and "is a folder, expected a file or nothing" in str(error.value)


def test_a_disk_that_forgets_is_noticed_when_a_record_is_read(whole, tmp_path):
    """A byte changes and the time of the file does not: deleting the shard, as the message says, mends it."""
    shutil.copytree(whole, tmp_path / "s")
    shard = tmp_path / "s" / SHARDS[1]
    before = shard.stat()
    flip(shard, place_of(shard, SOURCES[3]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"record 0, '视频3', cannot be read .*; delete this shard, then run the command"
    ):
        read_all(tmp_path / "s")
    shard.unlink()
    make(tmp_path / "s")
    assert shard.read_bytes() == (whole / SHARDS[1]).read_bytes()


def test_a_shard_is_read_to_its_end_once_after_it_was_changed(whole, tmp_path, monkeypatch):
    path, hashed = shutil.copytree(whole, tmp_path / "s"), []
    monkeypatch.setattr(shard_checks, "sha256", lambda file: hashed.append(file.name) or store.sha256(file))
    for part in PARTS:
        os.utime(path / part)
    os.utime(path / SHARDS[2])
    for _ in range(2):
        make(path)
        assert hashed == [SHARDS[2]]


def test_a_damaged_plan_is_said_and_the_store_can_be_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    (tmp_path / "s" / "parts" / "plan.json").write_text('{"settings": {')
    read_all(tmp_path / "s")
    with pytest.raises(UserError, match=r"plan.json: is not whole JSON; delete the store's folder and make it again"):
        make(tmp_path / "s")


def test_a_store_without_sizes_and_hashes_is_read_and_left_alone(whole, tmp_path):
    """As they were written before there were any."""
    path = shutil.copytree(whole, tmp_path / "s")
    edit(path / "store.json", lambda meta: meta.pop("shards") and None)
    for part in PARTS:
        edit(path / part, lambda part: {name: part[name] for name in ("videos", "left_out", "notes", "num_bytes")})
    assert len(read_all(path)[1]) == 6
    make(path, encode=lambda sources: [] if not sources else pytest.fail("encodes again"))
    assert len(read_all(path)[1]) == 6
    exchange(path / SHARDS[0], path / SHARDS[1])  # of one length, and nobody knows their hashes
    asked = []
    make(path, encode=lambda sources: map(result, asked.extend(sources) or sources))
    assert asked == SOURCES[:6]


def test_a_part_tells_how_long_its_shard_is(whole):
    """All that is looked at in a bucket."""
    sources, sizes = SOURCES[:3], {SHARDS[0]: (whole / SHARDS[0]).stat().st_size}
    part = shard_checks.read_part(whole / SHARDS[0], whole / PARTS[0], sources, sizes)
    assert [line["video"] for line in part["videos"]] == [source["video"] for source in sources]
    with pytest.raises(UserError, match="has 9 bytes, expected 131072"):
        shard_checks.read_part(whole / SHARDS[0], whole / PARTS[0], sources, {SHARDS[0]: 9})
    with pytest.raises(UserError, match="is about other videos"):
        shard_checks.read_part(whole / SHARDS[0], whole / PARTS[0], SOURCES[1:4], sizes)


def test_records_have_their_features_by_name(whole):
    reader = store.ArrayRecordReader(str(whole / SHARDS[0]))
    places = [reader.read([0])[0].index(name) for name in (b"frames", b"timestamps", b"video")]
    assert places == sorted(places)
