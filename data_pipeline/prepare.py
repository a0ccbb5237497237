"""Command: a folder of videos and a file of questions become a frame store, each video decoded once."""

import argparse
import functools
import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline import store
from data_pipeline.common.artefacts import BASE, read_object
from data_pipeline.common.cli import Parser, checked, local_path, path, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.locks import locked
from data_pipeline.common.processes import ordered_map
from data_pipeline.media.decode import VideoError, read_video
from data_pipeline.media.resizing import resize_name
from data_pipeline.media.sampling import UNIFORM, sampling_name
from data_pipeline.media.video_files import VIDEO_EXTENSIONS, VideoFiles, as_text, find_videos, is_text
from data_pipeline.prepare_report import make_report, summary
from data_pipeline.questions.eval_sets import BENCHMARKS, read_benchmark
from data_pipeline.questions.formats import Instruction
from data_pipeline.questions.mixture import read_mixture
from data_pipeline.questions.records import show

HELP = """\
Decode every video once and store its frames for training and evaluation.

  python -m data_pipeline.prepare --videos=VIDEOS --instructions=questions.jsonl --out=FRAMES --base=BASE
  python -m data_pipeline.prepare --videos=VIDEOS --instructions=VideoInstruct100K.json --out=FRAMES \\
      --image_size=448 --resize=bicubic --num_frames=100
  python -m data_pipeline.prepare --videos=VIDEOS --instructions=en.json --instructions=zh.jsonl:0.5 --out=FRAMES
  python -m data_pipeline.prepare --videos=VIDEOS --benchmark=activitynet_qa --instructions=test_q.json --out=TEST
  python -m data_pipeline.prepare --videos=list.txt --instructions=questions.jsonl --out=FRAMES --shard=1/4

A video's id is its file name without extension; a question may also name it with its extension or its folder.
Videos are searched in all subfolders (.mp4 .avi .mov .mkv .webm .gif; any other file is tried when a question names
it). A video without a question is left out.
Questions are {"id", "video", "language", "question", "answer"}, VideoInstruct-100K's, or conversations as LLaVA and
Qwen have them, in JSON, JSON Lines, CSV or Parquet (docs/data.md). A weight behind a file, zh.jsonl:0.5, says how often
an epoch asks each of its questions. A question with "start" and "end" (seconds) is about that part of its video.
FRAMES/report.json lists the videos and questions that were left out, with the reasons. Start a stopped run again to
continue it. One run at a time writes a store; use --shard=i/n to share the work among n runs."""


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a mistake of the user."""
    flags = _parse(argv)
    if odd := next((arg for arg in argv if not is_text(arg)), None):
        raise UserError(f"{as_text(odd)}: is not UTF-8 text; rename the file or folder")
    settings = _settings(flags)
    questions, mixture = _questions(flags)
    files = find_videos(flags.videos)
    questions, sources = find_sources(questions, files)
    if not sources:
        raise UserError(
            f"{', '.join(flags.instructions)}: no question is about a video of {flags.videos} (a question's video: "
            f"{questions[0]['video']!r}, a file's: {min(files.videos or files.others)!r})"
        )

    with locked(flags.out, share=flags.shard):
        write_store(flags, settings, files, sources, questions, mixture)


def write_store(
    flags: argparse.Namespace,
    settings: dict[str, Any],
    files: VideoFiles,
    sources: list[store.Source],
    questions: list[Instruction],
    mixture: dict[str, Any],
) -> None:
    """Decodes the missing videos, and finishes the store when no shard is missing any more."""

    def encode(missing: list[store.Source]) -> Iterable[store.Result]:
        work = functools.partial(encode_video, root=str(files.root), settings=settings)
        results = ordered_map(
            work, missing, flags.num_workers, time_limit=flags.time_limit, failed=functools.partial(lost, files.root)
        )
        return tqdm(results, total=len(missing), unit="video", disable=not missing, dynamic_ncols=True)

    with tqdm(desc="compare files", unit="file", delay=3, dynamic_ncols=True) as bar:

        @functools.cache
        def digest(file: str) -> str | None:
            bar.update()
            return sha256(files.root / file)

        shards = store.write_shards(
            flags.out, settings, sources, encode, shard=flags.shard, digest=lambda source: digest(source["source"])
        )
    if shards.missing:
        number, count = flags.shard
        print(
            f"{flags.out}: run {number} of {count} has done its part; {shards.missing} of {shards.total} shards are "
            "missing. The run that finds all of them finishes the store; if none did, start any of them again"
        )
        return
    if not shards.videos:
        raise UserError(f"none of the {len(sources)} videos could be used; the first: {shards.left_out[0]['reason']}")
    stored = {line["video"] for line in shards.videos}
    used = [question for question in questions if question["video"] in stored]
    report = make_report(files, sources, shards, questions, mixture)
    store.finish_store(flags.out, settings, shards, used, report)
    print(summary(flags.out, report))


def find_sources(questions: list[Instruction], files: VideoFiles) -> tuple[list[Instruction], list[store.Source]]:
    """Returns the questions, each with the id of its record as "video", and the sources of all records, sorted by id.

    A record is a whole video, or a part of one with an id such as "v_abc#12.5-20". A question whose video has no file
    stays as it is and has no source. Raises UserError for seconds that are no part of a video.
    """
    named, sources = [], {}
    find = functools.cache(files.file)
    for question in questions:
        part = _part(question)
        suffix = "" if part is None else "#{:.15g}-{:.15g}".format(*part)
        video, file = question["video"], find(question["video"])
        if file is None:  # a store's own question, such as a translated one, names the part already
            video = video.removesuffix(suffix)
            file = find(video)
        if file is not None and Path(file).suffix.lower() in VIDEO_EXTENSIONS:
            video = files.id(file)
        record = video + suffix
        if part is not None and record in files.names():
            raise UserError(f"{record}: is the name of a file and of a part of {video}: rename the file")
        named.append(question | {"video": record})
        if record not in sources and file is not None:
            span = {} if part is None else {"start": part[0], "end": part[1]}
            sources[record] = {"video": record, "source": file, **_state(files.root / file), **span}
    return named, [sources[record] for record in sorted(sources)]


def encode_video(source: store.Source, root: str, settings: dict[str, Any]) -> store.Result:
    """Decodes one video. Returns its record and its line of videos.jsonl, or the reason why it has none."""
    path = Path(root) / source["source"]
    span = {name: source[name] for name in ("start", "end") if name in source}
    try:
        video = read_video(
            path,
            num_frames=settings["num_frames"],
            image_size=settings["image_size"],
            resize=settings["resize"],
            sampling=settings["sampling"],
            part=(span["start"], span["end"]) if span else None,
            threads=1,  # the other cores have their own videos
        )
    except VideoError as error:
        digest = sha256(path)
        return {"reason": str(error), **({"sha256": digest} if digest else {})}
    line = {
        "video": source["video"],
        "num_frames": len(video.frames),
        "source": source["source"],
        **span,
        "sha256": sha256(path),
        "total_frames": video.total_frames,
        "duration": video.duration,
        "fps": video.fps,
        "width": video.width,
        "height": video.height,
    }
    frames = store.encode_frames(video.frames, settings["format"], settings["quality"])
    result = {"line": line, "record": {"frames": frames, "timestamps": video.timestamps}}
    if video.duration and video.fps and video.last_time + 2 / video.fps < 0.95 * video.duration:
        said = f"its header says {video.duration:.1f} s, the last frame is at {video.last_time:.1f} s"
        result["note"] = f"{path}: {said}: a part of the file may be missing"
    return result


def lost(root: Path, source: store.Source, reason: str) -> store.Result:
    """The result for a video whose process crashed or reached the time limit."""
    return {"reason": f"{root / source['source']}: the process that decoded it {reason}"}


def _questions(flags: argparse.Namespace) -> tuple[list[Instruction], dict[str, Any]]:
    """The instructions of the command's files, and the report of `read_mixture` on them."""
    if flags.benchmark is None:
        return read_mixture(flags.instructions)
    return read_mixture(flags.instructions, lambda path, left_out: read_benchmark(flags.benchmark, path))


def _part(question: Instruction) -> tuple[float, float] | None:
    """The seconds that a question is about, to milliseconds; None for the whole video."""
    span = [question.get("start"), question.get("end")]
    if span == [None, None]:
        return None
    if any(type(second) not in (int, float) or not math.isfinite(second) for second in span):
        span_shown = f"start {show(span[0])}, end {show(span[1])}"
        raise UserError(f"question {question['id']!r}: has {span_shown}, expected two numbers of seconds, or neither")
    start, end = (round(float(second), 3) for second in span)
    if not 0 <= start < end:
        raise UserError(f"question {question['id']!r}: is about {start:g} to {end:g} s, expected a part of a video")
    return start, end


def sha256(file: Path) -> str | None:
    """The hash of a file's content in hexadecimal, or None when it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None


def _state(file: Path) -> dict[str, int]:
    """Bytes, and nanoseconds of the last change; 0 for a file without a status, whose opening will give the reason."""
    try:
        found = file.stat()
    except OSError:
        return {"bytes": 0, "changed": 0}
    return {"bytes": found.st_size, "changed": found.st_ctime_ns}


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The store's settings. Image size and resize rule come from --base or the flags; the default is LLaVA's."""
    image = {"image_size": flags.image_size, "resize": flags.resize}
    if flags.base is not None:
        if not (flags.base / "base.json").is_file():
            raise UserError(f"--base={flags.base}: has no base.json: make it with conversion.from_torch")
        base = read_object(flags.base / "base.json", BASE)
        if any(value is not None and value != base[name] for name, value in image.items()):
            raise UserError(
                f"--base={flags.base} has image_size={base['image_size']} and resize={base['resize']}: "
                "drop --image_size and --resize"
            )
        image = {name: base[name] for name in image}
        try:
            resize_name(image["resize"])
        except ValueError as error:
            raise UserError(f"{flags.base / 'base.json'}: resize {error}; {BASE.remedy}") from None
    return {
        "kind": "frames",
        "num_frames": flags.num_frames,
        "sampling": flags.sampling,
        "image_size": image["image_size"] or 224,
        "resize": image["resize"] or "nearest",
        "format": flags.format,
        "quality": flags.quality if flags.format == "jpeg" else None,
    }


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected more than 0 and less than a million seconds, got {text}")
    return value


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected 1/N to N/N, e.g. 1/4 … 4/4 for four machines, got {text}")
    return int(number), int(count)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m data_pipeline.prepare", HELP, needed=("videos", "instructions", "out"))
    parser.add_argument(
        "--videos", type=local_path, metavar="DIR", help="folder of video files, or a list: a path a line"
    )
    parser.add_argument(
        "--instructions", action="append", metavar="FILE[:WEIGHT]", help="question file; may be repeated"
    )
    parser.add_argument(
        "--benchmark", choices=BENCHMARKS, metavar="NAME", help=f"evaluation set to read: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="folder of the frame store")
    group = parser.add_argument_group("frames")
    group.add_argument(
        "--base", type=local_path, metavar="DIR", help="base folder: take its image size and resize rule"
    )
    group.add_argument("--image_size", type=whole(4096), metavar="N", help="width and height of a frame (224)")
    group.add_argument(
        "--resize",
        type=checked(resize_name),
        metavar="RULE",
        help="how a frame becomes a square: nearest, bicubic, bilinear or lanczos=N, as a base's base.json says it "
        "(nearest)",
    )
    group.add_argument(
        "--num_frames", type=whole(10_000), default=100, metavar="N", help="most frames of a video (%(default)s)"
    )
    group.add_argument(
        "--sampling",
        type=checked(sampling_name),
        default=UNIFORM,
        metavar="RULE",
        help="which frames: uniform, fps=F or every=N (%(default)s)",
    )
    group.add_argument(
        "--format", choices=store.FORMATS, default="jpeg", help="how frames are stored; raw is lossless (%(default)s)"
    )
    group.add_argument(
        "--quality", type=whole(100), default=95, metavar="N", help="quality of JPEG, 1 to 100 (%(default)s)"
    )
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--num_workers",
        type=whole(1024),
        default=os.cpu_count(),
        metavar="N",
        help="processes that decode videos (all cores)",
    )
    group.add_argument(
        "--time_limit",
        type=_seconds,
        default=600,
        metavar="SECONDS",
        help="after which a video is given up (%(default)s)",
    )
    group.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="i/n", help="one of n runs that share --out: 1/n … n/n"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
