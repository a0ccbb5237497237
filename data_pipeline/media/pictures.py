"""A still picture as an image LLM sees it: read from any common file, turned upright, made one or more squares."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path, explained
from data_pipeline.media.resizing import resizer
from data_pipeline.media.tiles import Cut, cut_picture, most_squares

MEAN_COLOUR = (122, 116, 104)  # CLIP's mean times 255, rounded down
FORMATS = (  # PIL's names of the formats that are read; EPS, for one, would start a program named by the file
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
LONGEST = 200  # times as long as wide: a longer picture keeps little in a square and costs much memory


def crop(picture: Image.Image, size: int) -> Image.Image:
    """CLIP's fit: the shorter side becomes `size`, and the middle of the longer side is kept."""
    width, height = picture.size
    long = int(size * max(width, height) / min(width, height))
    wide, high = (long, size) if width > height else (size, long)
    left, top = (wide - size) // 2, (high - size) // 2
    return bicubic(picture, wide, high).crop((left, top, left + size, top + size))


def pad(picture: Image.Image, size: int) -> Image.Image:
    """LLaVA-1.5's fit: the picture in the middle of a square of CLIP's mean colour."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return bicubic(square, size, size)


def bicubic(picture: Image.Image, width: int, height: int) -> Image.Image:
    """PIL's bicubic resize, which CLIP and LLaVA use."""
    return picture.resize((width, height), Image.Resampling.BICUBIC)


FIT: dict[str, Callable[[Image.Image, int], Image.Image]] = {"crop": crop, "pad": pad}


def fit_picture(picture: Image.Image, size: int, fit: str) -> np.ndarray:
    """Makes a picture (size, size, 3) uint8. fit: a key of `FIT`, or a rule of `resizing.resizer`."""
    return np.asarray(FIT[fit](picture, size)) if fit in FIT else resizer(fit)(np.asarray(picture), size)


def read_picture(path: str | Path, image_size: int, fit: str) -> np.ndarray:
    """Reads a picture file as one square (S, S, 3) uint8. fit: see `fit_picture`. Raises UserError."""
    return fit_picture(open_picture(path), image_size, fit)


def read_tiles(path: str | Path, image_size: int, cut: Cut) -> dict[str, np.ndarray]:
    """Reads a picture file as squares {"pictures": (most, S, S, 3) uint8, zeros after the real ones}.

    All pictures get the number of squares of the largest, for one shape. Further keys, all int32: num_tiles (), of the
    real squares; grid (2,), see `tiles.Tiles`; size (2,), height and width of the file's pixels. Raises UserError.
    """
    picture = open_picture(path)
    squares, grid = cut_picture(picture, image_size, cut)
    padded = np.zeros((most_squares(image_size, cut), *squares.shape[1:]), np.uint8)
    padded[: len(squares)] = squares
    numbers = {"num_tiles": len(squares), "grid": grid, "size": picture.size[::-1]}
    return {"pictures": padded} | {name: np.array(value, np.int32) for name, value in numbers.items()}


def picture_size(path: str | Path) -> tuple[int, int] | None:
    """Returns the height and width of a picture as it is shown, from its file's first bytes; None: not readable."""
    try:
        with as_path(path).open("rb") as file, Image.open(file, formats=known_formats()) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return picture.size if turned else picture.size[::-1]
    except Exception:  # `open_picture` says why
        return None


def known_formats() -> list[str]:
    """The formats of `FORMATS` that this installation of PIL knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_picture(path: str | Path) -> Image.Image:
    """Opens a picture file, local or in a bucket, as 8-bit RGB.

    The picture is turned as its EXIF data say. An animation gives its first frame. Transparent parts become white.
    Raises UserError for a file that is missing, broken or of no known format.
    """
    try:
        with explained(path), as_path(path).open("rb") as file, Image.open(file, formats=known_formats()) as picture:
            picture.load()
            picture = as_rgb(upright(picture))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: not a picture in a known format; save it as JPEG, PNG or WebP (HEIC cannot be read)"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a picture") from None
    except Exception as error:  # PIL raises many kinds for files that are cut off or broken
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as a picture ({type(error).__name__}: {reason}); save it again"
        ) from None
    if max(picture.size) > LONGEST * min(picture.size):
        size = f"{picture.width} × {picture.height} pixels"
        raise UserError(f"{path}: {size}, expected at most {LONGEST} times as long as wide; cut it")
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """The picture, turned as its EXIF data say. Unreadable EXIF data are ignored."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; 16-bit grey keeps its upper 8 bits. Raises ValueError for pixels without a known range."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} have no known range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
