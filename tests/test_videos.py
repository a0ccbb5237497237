from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.media import decode
from data_pipeline.media.decode import VideoError, read_video
from data_pipeline.media.resizing import resize_nearest, resizer
from data_pipeline.media.sampling import uniform_indices


def write_video(path, levels, *, size=(32, 48), rate=10, codec="libx264", gop=12):
    """Writes one plain grey frame per level; H.264 with B-frames, so that decoding order is not the shown order."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels_of(frames):
    return frames.reshape(len(frames), -1).mean(-1)


def test_nearest_resize():
    frame = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(resize_nearest(frame, 2), frame[[0, 2]][:, [0, 3]])
    assert np.array_equal(resize_nearest(frame, 8), frame[[0, 0, 1, 1, 2, 2, 3, 3]][:, [0, 0, 1, 2, 3, 3, 4, 5]])
    assert np.array_equal(resize_nearest(frame[:, :4], 4), frame[:, :4])


def test_nearest_resize_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for height, width in [(240, 320), (360, 481), (37, 1080), (224, 225), (100, 223)]:
        frame = rng.integers(0, 256, (height, width, 3), np.uint8)
        images = torch.from_numpy(frame).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(images, size=(224, 224))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(resize_nearest(frame, 224), expected)


def test_bicubic_resize_keeps_no_aspect_ratio():
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, 20:] = 255
    resized = resizer("bicubic")(frame, 10)
    assert resized.shape == (10, 10, 3)
    assert (resized[:, :4] == 0).all() and (resized[:, 6:] == 255).all()
    expected = Image.fromarray(frame).resize((10, 10), resample=Image.BICUBIC)
    assert np.array_equal(resized, np.asarray(expected))


def test_read_video_takes_the_right_frames_in_shown_order(tmp_path):
    levels = np.linspace(20, 235, 40).astype(int)
    path = write_video(tmp_path / "a.mp4", levels)
    video = read_video(path, num_frames=8, image_size=16, resize="nearest")
    indices = uniform_indices(40, 8)
    assert video.frames.shape == (8, 16, 16, 3)
    assert video.frames.dtype == np.uint8
    np.testing.assert_allclose(levels_of(video.frames), levels[indices], atol=3)
    assert video.timestamps.dtype == np.float32
    np.testing.assert_allclose(video.timestamps, indices / 10, atol=1e-5)
    assert (video.total_frames, video.fps, video.width, video.height) == (40, 10.0, 48, 32)
    assert video.duration == pytest.approx(4.0)


def test_short_video_gives_as_many_frames_as_it_has(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.linspace(20, 235, 10).astype(int))
    video = read_video(path, num_frames=100, image_size=16, resize="bicubic")
    np.testing.assert_allclose(video.timestamps, np.array([0, 1, 2, 3, 4, 4, 5, 6, 7, 8]) / 10, atol=1e-5)
    assert np.array_equal(video.frames[4], video.frames[5])


def test_colours_are_rgb(tmp_path):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 220
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        container.mux(stream.encode())
    video = read_video(tmp_path / "a.mp4", num_frames=1, image_size=8, resize="nearest")
    np.testing.assert_allclose(video.frames[0, 4, 4], [220, 0, 0], atol=6)


def test_container_without_a_frame_count_is_counted(tmp_path):
    levels = np.linspace(20, 235, 40).astype(int)
    path = write_video(tmp_path / "a.mkv", levels)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    video = read_video(path, num_frames=8, image_size=16, resize="nearest")
    assert video.total_frames == 40
    np.testing.assert_allclose(levels_of(video.frames), levels[uniform_indices(40, 8)], atol=3)


def test_container_with_a_wrong_frame_count_is_counted(tmp_path):
    """An AVI header claims its number of frames in two places; both are changed from 40 to 400."""
    path = write_video(tmp_path / "a.avi", np.linspace(20, 235, 40).astype(int), codec="mpeg4")
    content = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = content.index(chunk) + offset
        assert int.from_bytes(content[at : at + 4], "little") == 40
        content[at : at + 4] = (400).to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 400
    assert read_video(path, num_frames=8, image_size=16, resize="nearest").total_frames == 40


CONTAINERS = {
    "a.mp4": {},
    "a.mov": {},
    "a.mkv": {},
    "b.mkv": {"pix_fmt": "yuv420p10le"},
    "a.avi": {"codec": "mpeg4"},
    "a.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "b.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"}},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "a.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mp4 in.avi": {"format": "mp4"},
    "webm in": {"format": "webm", "codec": "libvpx", "options": {"deadline": "realtime"}},
}


def write_numbered(path, total, *, codec="libx264", pix_fmt="yuv420p", options=None, rate=10, format=None, times=None):
    """Frames of 64 × 48 that show their number as twelve black or white squares; `times` in milliseconds."""
    with av.open(str(path), "w", format=format) as container:
        fast = {"preset": "ultrafast", "bf": "2"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=fast | (options or {}))
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, pix_fmt, 12
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(total):
            bits = np.array([255 * (i >> b & 1) for b in range(12)], np.uint8).reshape(3, 4, 1)
            image = np.kron(bits, np.ones((16, 16, 3), np.uint8))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_of(video):
    """The numbers that frames show; resized to 48 × 48, a square is 12 wide and 16 high."""
    bits = video.frames[:, 8::16, 6::12, 1].reshape(-1, 12) > 127
    return (bits @ (1 << np.arange(12))).tolist()


def read(path, num_frames=100, **more):
    return read_video(path, num_frames=num_frames, image_size=48, resize="nearest", **more)


@pytest.mark.parametrize("name", CONTAINERS)
def test_few_frames_are_reached_without_decoding_the_others(name, tmp_path, monkeypatch):
    """By seeking, by decoding all, and whatever the file is called: the same frames and times, to the bit."""
    path = write_numbered(tmp_path / name, 150, **CONTAINERS[name])
    decoded = []
    decode_all = decode._decode_all
    monkeypatch.setattr(decode, "_decode_all", lambda *arguments: decoded.append(1) or decode_all(*arguments))
    few = read(path, 3)
    assert numbers_of(few) == uniform_indices(150, 3).tolist() == [25, 74, 124]
    np.testing.assert_allclose(few.timestamps, uniform_indices(150, 3) / 10, atol=1e-6)
    whole = name in ("a.gif", "a.ts")  # one has a single key frame, in the other FFmpeg does not reach the right one
    assert len(decoded) == whole
    monkeypatch.setattr(decode, "_decode_runs", lambda *arguments: None)
    all = read(path, 3)
    assert len(decoded) == 1 + whole
    assert np.array_equal(few.frames, all.frames) and np.array_equal(few.timestamps, all.timestamps)
    for field in ("total_frames", "last_time", "duration", "fps", "width", "height"):
        assert getattr(few, field) == getattr(all, field), field
    assert (few.total_frames, few.fps, few.width, few.height) == (150, 10, 64, 48)


@pytest.mark.parametrize("total", [1, 99, 100, 101, 3000])
@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_every_number_of_frames(extension, total, tmp_path):
    path = write_numbered(tmp_path / f"a.{extension}", total, rate=25)
    video = read(path)
    assert numbers_of(video) == uniform_indices(total, 100).tolist()
    assert video.total_frames == total and video.last_time == pytest.approx((total - 1) / 25, abs=1e-3)


def test_frames_that_are_not_where_their_packets_say_are_found_by_decoding_all(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "a.mp4", 150)
    right, packets = read(path, 3), decode._read_packets(path)
    times, pts, keys = packets.times[::2], packets.pts[::2], packets.keys // 2  # each second packet gives no frame
    monkeypatch.setattr(decode, "_read_packets", lambda path: packets._replace(times=times, pts=pts, keys=keys))
    again = read(path, 3)
    assert np.array_equal(again.frames, right.frames) and again.total_frames == 150
    monkeypatch.setattr(decode, "_read_packets", lambda path: packets._replace(pts=None))
    assert np.array_equal(read(path, 3).frames, right.frames)


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_variable_frame_rate_goes_by_timestamps(extension, tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(20, 900, 80)) - 20
    times -= times[0]
    path = write_numbered(tmp_path / f"a.{extension}", 80, times=times.tolist(), rate=30)
    video = read(path, sampling="fps=2")
    moments = np.arange(int(times[-1] / 500) + 1) * 500
    assert numbers_of(video) == (np.searchsorted(times, moments, side="right") - 1).tolist()
    np.testing.assert_allclose(video.timestamps, times[numbers_of(video)] / 1000, atol=1.1e-3)
    assert numbers_of(read(path, 4)) == uniform_indices(80, 4).tolist()
    part = read(path, part=(times[30] / 1000, times[40] / 1000))
    assert numbers_of(part) == (30 + uniform_indices(10, 100)).tolist()
    assert numbers_of(read(path, sampling="every=9", num_frames=5)) == (9 * uniform_indices(9, 5)).tolist()


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_frames_are_turned(degrees, tmp_path):
    """Turned counter-clockwise, as the file asks; the picture's top left quarter is white."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    video = read_video(tmp_path / "a.mp4", num_frames=1, image_size=2, resize="nearest")
    expected = np.rot90([[255, 0], [0, 0]], degrees // 90)
    np.testing.assert_allclose(video.frames[0, :, :, 0], expected, atol=8)
    assert (video.width, video.height) == ((64, 32), (32, 64))[degrees // 90 % 2]


def test_mirrored_frames_are_mirrored():
    image = np.arange(6).reshape(2, 3, 1)
    assert decode._upright(image, (-1, 0, 0, 1))[..., 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert decode._upright(image, (1, 0, 0, -1))[..., 0].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert decode._upright(image, (0, 1, 1, 0))[..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_odd_sizes_and_ten_bits(tmp_path):
    levels = np.linspace(20, 235, 12).astype(int)
    for name, pix_fmt in (("odd.mkv", "yuv444p"), ("ten.mp4", "yuv444p10le")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.height, stream.width, stream.pix_fmt = 37, 51, pix_fmt
            for level in levels:
                image = np.full((37, 51, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        video = read_video(tmp_path / name, num_frames=12, image_size=16, resize="bicubic")
        np.testing.assert_allclose(levels_of(video.frames), levels[uniform_indices(12, 12)], atol=3)
        assert (video.width, video.height) == (51, 37)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.ts", "a.gif"])
def test_a_file_cut_at_30_percent_gives_the_frames_that_are_there(name, tmp_path):
    path = write_numbered(tmp_path / name, 150, **CONTAINERS[name])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 10])
    video = read(path)
    assert 10 < video.total_frames < 80
    assert numbers_of(video)[:-3] == uniform_indices(video.total_frames, 100).tolist()[:-3]


def test_files_without_frames_say_why(tmp_path):
    def error(path):
        with pytest.raises(VideoError) as raised:
            read_video(path, num_frames=4, image_size=16, resize="nearest")
        return str(raised.value)

    (tmp_path / "text.mp4").write_text("not a video")
    assert error(tmp_path / "text.mp4").startswith(f"{tmp_path / 'text.mp4'}: cannot be decoded")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "cannot be decoded" in error(tmp_path / "empty.mp4")
    assert "No such file" in error(tmp_path / "absent.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "no video stream" in error(tmp_path / "sound.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    assert "picture.jpg: is no video in a format that is read, such as MP4" in error(tmp_path / "picture.jpg")
    (tmp_path / "words.txt").write_text("words " * 100)
    assert "words.txt: " in error(tmp_path / "words.txt")
    whole = write_numbered(tmp_path / "whole.mp4", 40).read_bytes()
    cut = write_numbered(tmp_path / "whole.avi", 40, codec="mpeg4").read_bytes()
    for name, content in {
        "cut.mp4": whole[: len(whole) * 3 // 10],
        "head.mp4": whole[:40],
        "cut.avi": cut[: len(cut) * 3 // 10],
        "random.mkv": np.random.default_rng(0).bytes(9999),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be decoded" in error(tmp_path / name)
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height = stream.width = 32
        container.start_encoding()
    assert "none.avi: has no frame" in error(tmp_path / "none.avi")


ORDINARY = {  # what is not in CONTAINERS
    "a.mpg": {"codec": "mpeg2video"},
    "a.flv": {"codec": "flv"},
    "a.wmv": {"codec": "wmv2"},
    "a.ogv": {"codec": "libvpx", "format": "ogg", "options": {"deadline": "realtime"}},
    "a.3gp": {"codec": "mpeg4"},
    "a.m4v": {},
    "a.vob": {"codec": "mpeg2video"},
    "a.mts": {"format": "mpegts"},
    "a.mxf": {"codec": "mpeg2video"},
    "a.rm": {"codec": "rv20"},
    "a.h264": {},
    "a.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "a.ivf": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "a.apng": {"codec": "apng", "pix_fmt": "rgb24"},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_containers_are_read(name, tmp_path):
    video = read(write_numbered(tmp_path / name, 30, rate=25, **ORDINARY[name]), 3)
    assert numbers_of(video) == uniform_indices(30, 3).tolist() and video.total_frames == 30


POINTING = {  # texts that FFmpeg takes for the video that they name
    "list.ffconcat": "ffconcat version 1.0\nfile real.mp4\n",
    "list.mp4": "ffconcat version 1.0\nfile real.mp4\n",
    "stream.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.ts\n#EXT-X-ENDLIST\n",
    "stream.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.ts\n#EXT-X-ENDLIST\n",
    "talk.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet contentType="video"><Representation id="0" codecs="avc1"><BaseURL>real.mp4</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "words.ass": "[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:00.00,0:00:01.00,x,,0,0,0,,Hi\n",
    "words.srt": "1\n00:00:00,000 --> 00:00:01,000\nHi\n",
    "art.nfo": "hello " * 50,
    "shot%d.png": "",
}


@pytest.mark.parametrize("name", POINTING)
def test_a_text_is_not_the_video_that_it_names(name, tmp_path):
    write_numbered(tmp_path / "real.mp4", 12)
    write_numbered(tmp_path / "real.ts", 12, codec="mpeg2video")
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"shot{i}.png")
    (tmp_path / name).write_text(POINTING[name])
    with pytest.raises(VideoError, match=r"(is no video in a format that is read|cannot be decoded: Invalid data)"):
        read(tmp_path / name)


def test_names_are_no_addresses(tmp_path, monkeypatch):
    """What FFmpeg would take for a protocol, or for a pattern, is the name of a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "subfile,,start,0,end,0,,:x.mp4", "http:x.mp4", "pipe:0", "a%03d.mp4", "data:x"):
        write_numbered(tmp_path / "x.mp4", 12).rename(tmp_path / name)
        assert read(name).total_frames == 12


def test_a_title_in_any_coding_is_no_obstacle(tmp_path):
    path = write_video(tmp_path / "a.mp4", [20, 120, 220])
    expected = read_video(path, num_frames=3, image_size=8, resize="nearest").frames
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", "Ünï".encode("latin-1") + b"x"))
    assert np.array_equal(read_video(path, num_frames=3, image_size=8, resize="nearest").frames, expected)
