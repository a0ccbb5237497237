"""Text on pictures: finds an installed font for its characters, escapes the characters without one, breaks lines."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL.ImageFont import FreeTypeFont, truetype

CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"  # written without spaces


def choose_font(texts: Iterable[str], size: int) -> tuple[FreeTypeFont, set[str]]:
    """Returns the font that lacks the fewest of the texts' characters, and the characters that it lacks.

    The font is matplotlib's own DejaVu Sans unless an installed font has more of them. size: in pixels.
    """
    wanted = {char for text in texts for char in text if char not in " \n"}
    best, fewest = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), len(wanted) + 1
    lacking: set[str] = set()
    for path in (best, *sorted(map(Path, findSystemFonts()), key=_plainness)):
        missing = {char for char in wanted if ord(char) not in _characters(path)}
        if len(missing) < fewest:
            best, fewest, lacking = path, len(missing), missing
        if not missing:
            break
    return _face(best, size), lacking


def _plainness(path: Path) -> tuple[bool, str]:
    """Sorts bold, slanted and monospaced fonts behind the others."""
    return bool(re.search("bold|black|light|thin|italic|oblique|mono", path.stem, re.I)), str(path)


def _characters(path: Path) -> set[int]:
    """The code points that a font can draw; none for an unreadable font, or one that draws a box for everything."""
    try:
        font = FT2Font(str(path))
    except (RuntimeError, OSError):
        return set()
    return set() if "LastResort" in font.postscript_name or not font.scalable else set(font.get_charmap())


def _face(path: Path, size: int) -> FreeTypeFont:
    """The face of a font file. Of several faces it is the one with the forms of simplified Chinese."""
    faces = [truetype(path, size)]
    while path.suffix == ".ttc":
        try:
            faces.append(truetype(path, size, index=len(faces)))
        except OSError:  # there are no more
            break
    return next((face for face in faces if face.getname()[0].endswith(" SC")), faces[0])


def tidy(text: str) -> str:
    """The text's lines with each white space as one blank, in composed form, in which é is one character."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return unicodedata.normalize("NFC", "\n".join(lines))


def escape(text: str, lacking: set[str]) -> str:
    r"""The text with \uXXXX in place of each character that the font lacks."""
    return "".join(char.encode("unicode_escape").decode() if char in lacking else char for char in text)


def wrap(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels: at blanks, between Chinese characters, else anywhere."""
    lines = []
    for line in text.split("\n"):
        kept = ""
        for piece in re.findall(rf"[{CJK}]|[^\s{CJK}]+|\s+", line):
            if font.getlength((kept + piece).rstrip()) <= width:
                kept += piece
                continue
            lines.append(kept.rstrip())
            kept = piece.lstrip()
            while font.getlength(kept) > width:
                fits = next(n for n in range(len(kept) - 1, 0, -1) if n == 1 or font.getlength(kept[:n]) <= width)
                lines.append(kept[:fits])
                kept = kept[fits:]
        lines.append(kept.rstrip())
    return [line for line in lines if line]
