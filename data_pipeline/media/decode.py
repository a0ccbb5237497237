"""Finds, decodes and turns the frames of a video file."""

import array
import contextlib
import functools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from data_pipeline.common.errors import UserError
from data_pipeline.media.resizing import Resize, resizer
from data_pipeline.media.sampling import UNIFORM, Part, choose_frames

# FFmpeg's names of the formats that are read: files that hold their own video. Other formats open further files or
# addresses (concat, hls, dash, sdp), are pictures, or draw a text.
FORMATS = (
    *("mov", "matroska", "avi", "mpeg", "mpegts", "flv", "live_flv", "asf", "asf_o", "gif", "apng", "ogg", "rm", "nut"),
    *("nsv", "nuv", "wtv", "mxf", "gxf", "dv", "swf", "pva", "ty", "dhav", "flic", "smk", "bink", "roq", "ivf", "obu"),
    *("av1", "h261", "h263", "h264", "hevc", "vvc", "m4v", "mpegvideo", "vc1", "vc1test", "mjpeg", "mjpeg_2000"),
    *("cavsvideo", "dirac", "avs2", "avs3", "dnxhd", "yuv4mpegpipe"),
)
ALLOWED = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}


class VideoError(UserError):
    """A file that gives no frames; the message is its path and the reason."""


@dataclass(frozen=True)
class VideoFrames:
    """The kept frames of one video file, and facts about the file.

    frames: (n, S, S, 3) uint8 RGB. timestamps: (n,) float32, seconds from the first frame, NaN when the file has
    neither timestamps nor a frame rate. total_frames: the number of frames in the file, by count. last_time: the time
    of the last one. duration (seconds) and fps: as the container states them, or None. width, height: of the first
    frame, turned as it is shown, before resizing.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    total_frames: int
    last_time: float
    duration: float | None
    fps: float | None
    width: int
    height: int


def read_video(
    path: str | Path,
    *,
    num_frames: int,
    image_size: int,
    resize: str,
    sampling: str = UNIFORM,
    part: Part | None = None,
    threads: int = 0,
) -> VideoFrames:
    """Decodes a file and keeps the frames that `choose_frames` chooses, resized to a square.

    Frames are numbered in presentation order. The container may state a wrong number of frames, so the packets are
    counted first, without decoding. When fewer than half of the frames need decoding, each wanted frame is reached
    from the key frame before it, as long as every frame on the way has the timestamp of its packet. Otherwise all
    frames are decoded, and decoded again if their number differs from that of the packets. Memory holds the kept frames
    and all timestamps. resize: a rule of `resizing.resizer`. threads: of the decoder, 0 = its own choice. Raises
    VideoError.
    """

    def choose(times: np.ndarray) -> list[int]:
        try:
            return choose_frames(times, sampling, num_frames, part).tolist()
        except ValueError as error:
            raise VideoError(f"{path}: {error}") from None

    keep = functools.partial(_picture, VideoReformatter(), resizer(resize), image_size)
    packets = _read_packets(path)
    try:
        indices = choose(packets.times) if len(packets.times) else []
    except VideoError:  # the decoder may know more
        indices = []
    decoded = _decode_runs(path, threads, packets, indices, keep) if indices else None
    for _ in range(3):
        if decoded is None:
            decoded = _decode_all(path, threads, set(indices), keep)
        if not len(decoded.times):
            raise VideoError(f"{path}: has no frame")
        chosen = choose(decoded.times)
        if chosen == indices:
            break
        indices, decoded = chosen, None
    else:
        raise VideoError(f"{path}: gives another number of frames at each reading")
    return VideoFrames(
        frames=np.stack([decoded.pictures[i] for i in indices]),
        timestamps=decoded.times[indices].astype(np.float32),
        total_frames=len(decoded.times),
        last_time=float(decoded.times[-1]),
        duration=packets.duration,
        fps=packets.fps,
        width=decoded.width,
        height=decoded.height,
    )


class Packets(NamedTuple):
    """The frames of a file as its packets describe them, before decoding.

    times: (n,) seconds from the first frame, ascending. pts: (n,) int64, the same in the stream's time base, or None
    when a packet has no timestamp or two packets share one. keys: (k,) indices of key frames.
    """

    times: np.ndarray
    pts: np.ndarray | None
    keys: np.ndarray
    duration: float | None
    fps: float | None


class Decoded(NamedTuple):
    """Wanted pictures by frame index, the times (n,) float64 of all frames, and the shown size of the first frame."""

    pictures: dict[int, np.ndarray]
    times: np.ndarray
    width: int
    height: int


def _read_packets(path: str | Path) -> Packets:
    """Reads the packets of a file. Packets that the file marks as hidden do not count."""
    pts, keys, complete = array.array("q"), array.array("q"), True
    with _open(path, threads=1) as (container, stream):
        duration, fps = _duration(container, stream), stream.average_rate
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            complete = complete and packet.pts is not None
            pts.append(packet.pts if complete else len(pts))
            if packet.is_keyframe:
                keys.append(pts[-1])
        time_base = stream.time_base
    shown = np.sort(np.array(pts, np.int64))
    complete = complete and len(np.unique(shown)) == len(shown)
    unit = float(time_base) if complete else 1 / float(fps) if fps else math.nan
    times = (shown - shown[0] if complete and len(shown) else np.arange(len(shown))) * unit
    places = np.searchsorted(shown, np.sort(np.array(keys, np.int64)))
    return Packets(times, shown if complete else None, places, duration, float(fps) if fps else None)


def _decode_runs(
    path: str | Path, threads: int, packets: Packets, indices: list[int], keep: Callable[[av.VideoFrame], np.ndarray]
) -> Decoded | None:
    """Decodes from key frames to the wanted frames. Returns None when decoding the whole file is needed or as cheap."""
    if packets.pts is None or not len(packets.keys):
        return None
    wanted = np.unique([0, *indices])
    before = np.searchsorted(packets.keys, wanted, side="right") - 1
    if before[0] < 0:
        return None
    runs = [(packets.keys[key], wanted[before == key]) for key in np.unique(before)]
    if 2 * sum(places[-1] - key + 1 for key, places in runs) > len(packets.pts):
        return None
    pictures, size, chosen = {}, None, set(indices)
    times = np.zeros(len(packets.pts))
    with _open(path, threads) as (container, stream):
        first_time = float(packets.pts[0] * stream.time_base)
        times[:] = [float(pts * stream.time_base) - first_time for pts in packets.pts.tolist()]
        for key, places in runs:
            try:
                container.seek(int(packets.pts[key]), stream=stream)
            except av.error.FFmpegError:
                return None
            place = key
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts < packets.pts[key]:
                    continue  # shown before the key frame that it follows in the file
                if frame.pts != packets.pts[place]:
                    return None
                if place == 0:
                    size = _shown_size(frame)
                if place in chosen:
                    pictures[place] = keep(frame)
                if place == places[-1]:
                    break
                place += 1
            else:
                return None
    return Decoded(pictures, times, *size)


def _decode_all(
    path: str | Path, threads: int, wanted: set[int], keep: Callable[[av.VideoFrame], np.ndarray]
) -> Decoded:
    """Decodes every frame and keeps the wanted ones."""
    pictures, times, size, start = {}, array.array("d"), (0, 0), None
    with _open(path, threads) as (container, stream):
        fps = stream.average_rate
        for frame in container.decode(stream):
            place = len(times)
            if place == 0:
                size, start = _shown_size(frame), frame.time
            if place in wanted:
                pictures[place] = keep(frame)
            times.append(_seconds(frame, start, place, fps))
    return Decoded(pictures, np.array(times), *size)


def _picture(to_rgb: VideoReformatter, resize: Resize, image_size: int, frame: av.VideoFrame) -> np.ndarray:
    """A frame as it is shown, (S, S, 3) uint8. One reformatter serves a whole file, as making one costs a frame."""
    rgb = to_rgb.reformat(frame, format="rgb24").to_ndarray()
    return resize(_upright(rgb, _display_matrix(frame)), image_size)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """The turn that the file asks for, as (a, b, c, d): x' = a x + c y, y' = b x + d y."""
    for side_data in frame.side_data:
        if side_data.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data))
            return a, b, c, d
    return 1, 0, 0, 1


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turns (H, W, 3) by quarter turns and mirrors it as the matrix says. Other angles become the nearest quarter."""
    a, b, c, d = matrix
    right, down = (a, d) if abs(a) >= abs(b) else (c, b)
    if abs(a) < abs(b):
        image = image.swapaxes(0, 1)
    return image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height after turning."""
    a, b, _, _ = _display_matrix(frame)
    return (frame.width, frame.height) if abs(a) >= abs(b) else (frame.height, frame.width)


@contextlib.contextmanager
def _open(path: str | Path, threads: int) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its best video stream. Every error of FFmpeg becomes a VideoError.

    FFmpeg opens no other file or address, even when the file's name or content asks for it.
    """
    try:
        # Titles and other tags may be in any coding.
        container = av.open(f"file:{path}", container_options=ALLOWED, metadata_errors="replace")
    except av.error.ArgumentError:
        raise VideoError(
            f"{path}: is no video in a format that is read, such as MP4 or MKV (lists of other files, streams, "
            "pictures and texts are not)"
        ) from None
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded: {error.strerror}") from error
    try:
        with container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:  # a sound file's cover
                raise VideoError(f"{path}: has no video stream")
            if stream.codec_context is None:
                raise VideoError(f"{path}: its video codec is not supported")
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded: {error.strerror}") from error


def _seconds(frame: av.VideoFrame, start: float | None, index: int, fps: Fraction | None) -> float:
    """Seconds from the first frame, computed from the frame rate when the file has no timestamps."""
    if frame.time is not None and start is not None:
        return frame.time - start
    return float(index / fps) if fps else math.nan


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None
