"""Finds video files, and the file that a question names."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import UserError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")

FIRST_BYTES = (  # (offset, bytes) at the beginning of common containers
    *((4, box) for box in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")),  # MP4, MOV
    *((0, start) for start in (b"\x1aE\xdf\xa3", b"GIF8", b"OggS", b"FLV\x01")),  # MKV and WebM, GIF, Ogg, FLV
    *((8, b"AVI "), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")),  # AVI, WMV
    *((0, b"\x00\x00\x01\xba"), (0, b"\x00\x00\x01\xb3"), (188, b"\x47"), (196, b"\x47")),  # MPEG program, video, TS
)


class VideoFiles(NamedTuple):
    """The files of --videos, as paths from `root`.

    videos: by file name without extension. others: files without a known video's extension, by their names with and
    without extension. nameless: videos whose names are not UTF-8 text, so that no question can name them.
    """

    root: Path
    videos: dict[str, list[str]]
    others: dict[str, list[str]]
    nameless: list[str]

    def names(self) -> set[str]:
        """All file names, with and without extension."""
        return self.videos.keys() | self.others.keys()

    def file(self, video: str) -> str | None:
        """The file that a question's video names, None if there is none. Raises UserError if two files fit.

        The name may have the file's extension, and folders before it; a leading `v_` may be missing on either side.
        Of several files, one whose last folders are those of the name is taken. When no file has a known extension, a
        file that begins like a video container is taken before others.
        """
        *folders, name = video.replace("\\", "/").split("/")
        files = self._called(name) or self._called(name[2:] if name.startswith("v_") else f"v_{name}")
        for count in range(len(folders), 0, -1):
            if inside := [file for file in files if Path(file).parent.parts[-count:] == tuple(folders[-count:])]:
                files = inside
                break
        if len(files) > 1 and not folders and Path(name).suffix.lower() in VIDEO_EXTENSIONS and name in files:
            files = [name]  # its path from the root
        if len(files) > 1 and Path(files[0]).suffix.lower() not in VIDEO_EXTENSIONS:
            files = [file for file in files if looks_like_video(self.root / file)] or files[:1]
        if len(files) > 1:
            paths = " and ".join(files[:2])
            raise UserError(
                f"video {video!r} may be {paths} of {self.root}: write its path into the question's 'video'"
            )
        return files[0] if files else None

    def _called(self, name: str) -> list[str]:
        """The files with a name, or with a name without extension."""
        stem, extension = os.path.splitext(name)
        if extension.lower() not in VIDEO_EXTENSIONS:
            return self.videos.get(name) or self.others.get(name, [])
        named = [file for file in self.videos.get(stem, []) if Path(file).name == name]
        return named or self.videos.get(name) or self.videos.get(stem) or self.others.get(name, [])

    def id(self, file: str) -> str:
        """The video id of a file: its name without the known extension, with folders when two files share the name."""
        path = Path(file)
        alike = self.videos.get(path.stem, [])
        if len(alike) < 2:
            return path.stem
        without = path.with_suffix("").as_posix()
        twice = sum(Path(other).with_suffix("").as_posix() == without for other in alike) > 1
        return path.as_posix() if twice or "/" not in without else without


def find_videos(videos: Path) -> VideoFiles:
    """Finds the files of a folder and its subfolders, or of a text file with one path a line, relative to its folder.

    Raises UserError if there is none.
    """
    if videos.is_dir():
        root, files = videos, _walk(videos)
    elif videos.is_file():
        root, files = videos.parent, _listed(videos)
    else:
        raise UserError(f"--videos={videos}: no such folder, nor a list of files")
    by_id: dict[str, list[str]] = defaultdict(list)
    others: dict[str, list[str]] = defaultdict(list)
    nameless = []
    for file in files:
        path = Path(file)
        if not is_text(file):
            nameless += [file] if path.suffix.lower() in VIDEO_EXTENSIONS else []
            continue
        if path.suffix.lower() in VIDEO_EXTENSIONS:
            by_id[path.stem].append(file)
        else:
            for name in {path.name, path.stem}:
                others[name].append(file)
    if not by_id and not others:
        raise UserError(f"--videos={videos}: holds no {' '.join(VIDEO_EXTENSIONS)} file")
    return VideoFiles(root, dict(by_id), dict(others), nameless)


def is_text(path: str) -> bool:
    """Whether a path is UTF-8 text; on a disk it may be any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_text(path: str) -> str:
    """A path as text, with \\xff for bytes that are none."""
    return os.fsencode(path).decode(errors="backslashreplace")


def looks_like_video(file: Path) -> bool:
    """Whether a file begins like a video container."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as content:
            head = content.read(200)
    except OSError:
        return False
    return any(head[offset : offset + len(start)] == start for offset, start in FIRST_BYTES)


def _walk(folder: Path) -> list[str]:
    """All paths that are no folders, sorted."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed: {error.strerror}")

    walked: Iterable[tuple[str, list[str], list[str]]] = os.walk(folder, onerror=refuse)
    return sorted(os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in walked for name in names)


def _listed(videos: Path) -> list[str]:
    try:
        lines = videos.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError):
        raise UserError(
            f"--videos={videos}: expected a folder, or a text file with the path of a video a line"
        ) from None
    return sorted({line.strip() for line in lines if line.strip()})
