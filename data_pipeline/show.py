"""Command: draws the frames of one or several videos of a store with their questions, or distributions over it."""

import argparse
import difflib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data_pipeline.common.artefacts import REPORT, read_object
from data_pipeline.common.cli import Parser, path, whole
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.files import in_bucket, written_whole
from data_pipeline.common.locks import locked
from data_pipeline.common.tables import text_table
from data_pipeline.media.lettering import CJK, choose_font, escape, tidy, wrap
from data_pipeline.store import VideoStore, open_store

HELP = """\
Draw the content of a store.

  python -m data_pipeline.show FRAMES --video=ID       every stored frame with its time, every question and answer
  python -m data_pipeline.show FRAMES --random=12      a strip of eight frames and three questions a video
  python -m data_pipeline.show FRAMES --stats          distributions of durations, frames, questions and lengths

Frames are shown as the model gets them, as squares. Chinese needs an installed font with its characters; without such a
font they are drawn as \\uXXXX. --stats also reads a store of streams."""

MADE_BY = "redvillm_jax: data_pipeline.show"  # in the pictures that it may replace
COLUMNS, TILE, GAP, SIZE = 8, 176, 8, 16  # of a sheet: frames a row, pixels of a frame, between frames, of letters
WIDTH = COLUMNS * (TILE + GAP) + GAP
BLACK, GREY, BLUE = (0, 0, 0), (110, 110, 110), (0, 70, 170)
WORD = re.compile(rf"(?=\w)[{CJK}]|[^\W{CJK}]+(?:['’-][^\W{CJK}]+)*")


class Strip(NamedTuple):
    """One video on a sheet. frames: (n, S, S, 3) uint8. labels: n texts. texts: (text, colour) each."""

    title: str
    frames: np.ndarray
    labels: list[str]
    texts: list[tuple[str, tuple[int, int, int]]]


def main(argv: list[str]) -> None:
    """Runs the command. Raises UserError for a mistake of the user."""
    flags = _parse(argv)
    _check_out(flags.out)
    store = open_store(flags.store)
    if flags.stats:
        print(table(quantities := distributions(store)))
        picture = draw_distributions(quantities)
    else:
        _check_frames(store)
        if flags.video is not None:
            strips = [strip(store, find(store, flags.video))]
        else:
            chosen = sorted(random.sample(range(len(store)), min(flags.random, len(store))))
            strips = [strip(store, i, COLUMNS, 3) for i in tqdm(chosen, unit="video", delay=2)]
        picture, lacking = draw_strips(strips)
        if lacking:
            some = "".join(lacking[:10]) + "…" * (len(lacking) > 10)
            print(
                f"note: {some} drawn as \\uXXXX, no installed font has all of the texts' characters: apt install "
                "fonts-noto-cjk, or put a .ttf or .otf file into ~/.local/share/fonts (the texts are in "
                f"{store.path / 'instructions.jsonl'})"
            )
    mark = PngInfo()
    mark.add_text("Software", MADE_BY)
    with locked(flags.out, beside=True), written_whole(flags.out) as temporary:
        picture.save(temporary, "PNG", pnginfo=mark)
    print(flags.out)


def find(store: VideoStore, video: str) -> int:
    """The record index of a video's id. Raises UserError with the ids that are spelled most like it."""
    ids = [line["video"] for line in store.videos]
    if video in ids:
        return ids.index(video)
    near = difflib.get_close_matches(video, ids, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"its {len(ids)} videos are {', '.join(ids[:3])}, …"
    raise UserError(f"{store.path}: has no video {video!r}; {hint}")


def strip(store: VideoStore, index: int, most_frames: int | None = None, most_questions: int | None = None) -> Strip:
    """The strip of record `index`, whole or with some evenly spread frames and the first questions."""
    line, record = store.videos[index], store[index]
    n = len(record["frames"])
    chosen = np.linspace(0, n - 1, min(n, most_frames or n)).round().astype(int)
    about_it = [instruction for instruction in store.instructions if instruction["video"] == line["video"]]
    texts = []
    for number, instruction in enumerate(about_it[:most_questions], start=1):
        about = ", ".join(str(instruction[key]) for key in ("language", "kind") if key in instruction)
        texts += [(f"{number}. [{about}] {instruction['question']}", BLACK), (instruction["answer"], BLUE)]
    if not about_it:
        texts = [("no question is about this video", GREY)]
    elif hidden := len(about_it) - len(about_it[:most_questions]):
        texts.append((f"… and {hidden} more: --video={line['video']}", GREY))
    labels = [_time(seconds) for seconds in record["timestamps"][chosen].tolist()]
    return Strip(_title(line), record["frames"][chosen], labels, texts)


def _title(line: dict[str, Any]) -> str:
    """The id, and the file's size, duration and frames as videos.jsonl has them."""
    facts = [f"{line['width']}×{line['height']}", f"{line['num_frames']} of {line['total_frames']} frames"]
    if line["duration"] is not None:
        facts.insert(1, _time(line["duration"]))
    return f"{line['video']}: {', '.join(facts)}"


def _time(seconds: float) -> str:
    if seconds != seconds:  # neither timestamps nor a frame rate in the file
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.{1 + (seconds < 10)}f} s"


def draw_strips(strips: Sequence[Strip]) -> tuple[Image.Image, list[str]]:
    """Returns the strips below each other, and the characters that no font has."""
    strips = [
        Strip(tidy(s.title), s.frames, s.labels, [(tidy(text), colour) for text, colour in s.texts]) for s in strips
    ]
    everything = [text for s in strips for text in (s.title, *s.labels, *(text for text, _ in s.texts))]
    font, lacking = choose_font(everything, SIZE)
    blocks = []
    for s in strips:
        blocks += [_letters([(s.title, BLACK)], font.font_variant(size=SIZE + 6), lacking)]
        blocks += [_tiles(s.frames, s.labels, font), _letters(s.texts, font, lacking)]
    sheet = Image.new("RGB", (WIDTH, sum(block.height for block in blocks) + 2 * GAP), "white")
    top = GAP
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet, sorted(lacking)


def _letters(texts: Sequence[tuple[str, tuple[int, int, int]]], font, lacking: set[str]) -> Image.Image:
    """A block of lines, each text wrapped in its colour."""
    width, height = WIDTH - 2 * GAP, round(1.4 * font.size)
    lines = [(line, colour) for text, colour in texts for line in wrap(escape(text, lacking), font, width)]
    block = Image.new("RGB", (WIDTH, len(lines) * height + GAP), "white")
    draw = ImageDraw.Draw(block)
    for i, (line, colour) in enumerate(lines):
        draw.text((GAP, i * height), line, colour, font)
    return block


def _tiles(frames: np.ndarray, labels: Sequence[str], font) -> Image.Image:
    """Rows of frames, each with its label below."""
    step = TILE + round(1.4 * font.size) + GAP
    block = Image.new("RGB", (WIDTH, -(-len(frames) // COLUMNS) * step), "white")
    draw = ImageDraw.Draw(block)
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        left, top = GAP + i % COLUMNS * (TILE + GAP), i // COLUMNS * step
        rule = Image.Resampling.NEAREST if len(frame) < TILE else Image.Resampling.LANCZOS
        block.paste(Image.fromarray(frame).resize((TILE, TILE), rule), (left, top))
        draw.text((left, top + TILE + 2), label, GREY, font)
    return block


def distributions(store: VideoStore) -> dict[str, list[float]]:
    """Values by quantity: one value for each video, or for each question of a language.

    A word is a run of letters and digits, or one Chinese, Japanese or Korean character.
    """
    asked = Counter(instruction["video"] for instruction in store.instructions)
    values: dict[str, list[float]] = {
        "duration, seconds": [line["duration"] for line in store.videos if line["duration"] is not None],
        "frames in the file": [line["total_frames"] for line in store.videos],
        "frames in the store": [line["num_frames"] for line in store.videos],
        "questions per video": [asked[line["video"]] for line in store.videos],
    }
    texts = defaultdict(list)
    for instruction in sorted(store.instructions, key=lambda instruction: instruction["language"]):
        for field in ("question", "answer"):
            texts[f"{instruction['language']} {field}"].append(instruction[field])
    for name, found in texts.items():
        values[f"{name}, characters"] = [len(text) for text in found]
        values[f"{name}, words"] = [len(WORD.findall(text)) for text in found]
    return values


def table(quantities: dict[str, list[float]]) -> str:
    """One line for each quantity: number of values, minimum, three percentiles, maximum, mean."""
    rows = []
    for name, values in quantities.items():
        found = [*np.percentile(values, (0, 10, 50, 90, 100)), np.mean(values)] if values else []
        rows.append([name, len(values), *(f"{value:.1f}" for value in found)])
    header = ["", "n", "min", "10 %", "median", "90 %", "max", "mean"]
    lines = text_table(header, rows, [f"<{max(map(len, quantities))}", *[">10"] * 7])
    if not quantities["questions per video"] or not any(quantities["questions per video"]):
        lines.append("note: the store has no questions")
    return "\n".join(lines)


def draw_distributions(quantities: dict[str, list[float]]) -> Image.Image:
    """A histogram of each quantity, with its median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(quantities) // 4)
    figure = Figure(figsize=(16, 3 * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for i, (name, values) in enumerate(quantities.items()):
        axes = figure.add_subplot(rows, 4, i + 1)
        label = name.encode("ascii", "backslashreplace").decode()  # languages may have any name
        axes.set_title(label, fontsize=11, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        if values:
            whole = all(value == int(value) for value in values) and max(values) - min(values) < 40
            axes.hist(values, np.arange(min(values), max(values) + 2) - 0.5 if whole else 40, color="#6baed6")
            axes.axvline(np.median(values), color="#d62728", linewidth=1)
        axes.set_ylabel("questions" if "," in name and "duration" not in name else "videos", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(integer=True)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _check_frames(store: VideoStore) -> None:
    """Raises UserError for a store of streams, naming the frame store from which it was made."""
    if store.meta["kind"] != "frames":
        made_from = read_object(store.path / "report.json", REPORT).get("made_from", "unknown")
        raise UserError(f"{store.path}: holds streams, no frames: give the frame store of these streams, {made_from}")


def _check_out(out: Path) -> None:
    """Raises UserError for a file that could not be written, before anything is read."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: expected a name that ends in .png")
    if not in_bucket(out) and not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    if out.exists() and not _is_own(out):
        raise UserError(f"--out={out}: was not drawn by this command; choose another name, or move it away")


def _is_own(out: Path) -> bool:
    """Whether a file is a picture of this command."""
    try:
        with out.open("rb") as file, Image.open(file) as picture:
            return picture.info.get("Software") == MADE_BY
    except (OSError, SyntaxError, ValueError):
        return False


def _parse(argv: list[str]) -> argparse.Namespace:
    arguments = "STORE (--video=ID | --random=N | --stats)"
    parser = Parser("python -m data_pipeline.show", HELP, arguments=arguments)
    parser.add_argument("store", type=path, metavar="STORE", help="folder of a frame store, here or in a bucket")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--video", metavar="ID", help="one video: all of its frames and questions")
    what.add_argument("--random", type=whole(100), metavar="N", help="N videos by chance, other ones each time")
    what.add_argument("--stats", action="store_true", help="print and plot distributions over the store")
    parser.add_argument("--out", type=path, metavar="FILE", default=Path("show.png"), help="the picture (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
