"""Compares this project's model with the published PyTorch model, stage by stage, and prints one table.

python -m conversion.compare --source=FOLDER [--base=BASE]
python -m conversion.compare --base=BASE

One picture, one clip and one text go through transformers' own class and through this project, both in fp32 on the CPU,
with the prompt of the model around picture and clip; where the family cuts pictures into tiles, a second picture does,
too. FOLDER is a published folder; it is converted to BASE first, or to a temporary folder. With --base alone the base's
own files are the published ones. Qwen-VL has its own code, which runs with --trust_remote_code only, and under
transformers 4.32: --python names a Python that has it.

A row is over its limit when |a - b| / max(|b|, RMS) exceeds --limit anywhere, where RMS is the root mean square of the
published stage; token ids must be equal, their rows count the unequal ones. Exit code 1 when a row is over its limit:
send the table to whoever made the model or this project.
"""

import contextlib
import math
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from conversion.from_torch import from_torch
from conversion.names import read_json
from data_pipeline.common.cli import Parser, local_path
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.tables import table_row
from data_pipeline.media.tiles import Cut, cut_picture
from redvillm_jax.model.base_folder import Base, open_base
from redvillm_jax.model.weights import abstract_part

TEXT = "A red square moves over coloured grain, from left to right. 一个红色的方块从左向右移动。In 2.5 s."
QUESTION = "What moves, and where does it go?"
HEADER = ("stage", "shape", "largest |a-b|", "mean |a-b|", "relative", "limit", "ok")
COLUMNS = ("<26", " <16", " >13", " >11", " >9", " >7", "  <0")


# ---- inputs


def make_clip(num_frames: int, size: int) -> np.ndarray:
    """Frames (T, size, size, 3) uint8: a block that moves over coloured grain."""
    rng = np.random.default_rng(0)
    frames = np.tile(rng.integers(0, 128, (size, size, 3), np.uint8), (num_frames, 1, 1, 1))
    block = size // 4
    for t, left in enumerate(np.linspace(0, size - block, num_frames).astype(int)):
        frames[t, size // 2 : size // 2 + block, left : left + block] = (230, 30, 40)
    return frames


def make_inputs(base: Base, num_frames: int, tokenizer: bool) -> dict[str, np.ndarray]:
    """The inputs of both models.

    frames: (T, H, W, 3) uint8, the first one also the picture; mean, std: of its pixels; text_ids, before_ids,
    behind_ids: (1, length) int64, a text, and the model's own prompt around visual tokens; those of `make_tiles` for a
    family that cuts pictures. tokenizer: whether the base has one; otherwise the ids are arbitrary.
    """
    if tokenizer:
        tokens = base.module.Tokenizer(base.path)
        before, behind = base.module.prompt(tokens, base.config, QUESTION, None)
        rows = tokens.encode(TEXT), [i for i, _ in before], [i for i, _ in behind]
    else:
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, min(base.config.vocab_size // 2, 200), n).tolist() for n in (24, 5, 8)]
        start = read_json(base.path / "config.json").get("visual", {}).get("image_start_id")
        if start is not None:  # Qwen-VL finds the picture by the marks around it
            rows = rows[0], [*rows[1], start], [start + 1, *rows[2]]
    ids = {f"{n}_ids": np.asarray([row], np.int64) for n, row in zip(("text", "before", "behind"), rows, strict=True)}
    if tokenizer and not isinstance(cut := base.module.picture_fit(base.config), str):
        ids |= make_tiles(base, tokens, cut, rows[1], rows[2])
    norm = {"mean": np.asarray(base.module.MEAN), "std": np.asarray(base.module.STD)}
    return {"frames": make_clip(num_frames, base.config.image_size)} | norm | ids


def make_tiles(base: Base, tokenizer: Any, cut: Cut, before: list[int], behind: list[int]) -> dict[str, np.ndarray]:
    """A wide picture as the family cuts it, and its prompt.

    tiles: (n, S, S, 3) uint8; tiles_size: height and width of the picture; tiles_ids: (1, length) int64, -1 for visual
    tokens; tiles_slots: (1, length), -1 for text, else a slot of `Places`; tiles_sources, tiles_weights: of `Places`.
    """
    side = base.config.image_size
    picture = Image.fromarray(make_clip(1, side)[0]).resize((side * 17 // 10, side))
    squares, grid = cut_picture(picture, side, cut)
    size = picture.size[::-1]
    count = math.prod(abstract_part(base.module, "projector", base.config).token_layout(base.config.grid))
    places = base.module.picture_places(tokenizer, base.config, count, grid, size)
    ids = [*before, *(-1 if slot >= 0 else token for token, slot in places.placed), *behind]
    slots = [*[-1] * len(before), *(slot for _, slot in places.placed), *[-1] * len(behind)]
    arrays = {"tiles": squares, "tiles_size": size, "tiles_ids": [ids], "tiles_slots": [slots]}
    if places.sources is not None:
        arrays |= {"tiles_sources": places.sources[None], "tiles_weights": places.weights[None]}
    return {name: np.asarray(array) for name, array in arrays.items()}


# ---- the published model


def run_reference(
    source: Path, vision: Path | None, inputs: dict[str, np.ndarray], folder: Path, python: str | None, trust: bool
) -> dict[str, np.ndarray]:
    """Returns the published model's stages. python: another Python for it. Raises UserError when it cannot run."""
    if python is None:
        try:
            from conversion.reference import run_published
        except ImportError:
            raise UserError("the published model runs in PyTorch: pip install 'redvillm_jax[convert]'") from None
        try:
            return run_published(source, vision, inputs, trust)
        except Exception as error:  # transformers and a folder's own code raise any exception
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: the published model cannot be run: {reason}") from error
    np.savez(folder / "inputs.npz", **inputs)
    flags = [f"--source={source}", f"--inputs={folder / 'inputs.npz'}", f"--out={folder / 'reference.npz'}"]
    flags += [f"--vision={vision}"] * (vision is not None) + ["--trust_remote_code"] * trust
    done = subprocess.run([python, "-m", "conversion.reference", *flags], cwd=Path(__file__).parents[1])
    if done.returncode != 0:
        raise UserError(f"{source}: the published model did not run under {python}, see above")
    return dict(np.load(folder / "reference.npz"))


# ---- the comparison


def differences(got: np.ndarray, want: np.ndarray) -> tuple[float, float, float]:
    """The largest |a - b|, its mean, and the largest |a - b| / max(|b|, RMS of b); ids: the number of unequal ones."""
    if want.shape != got.shape:
        return (float("inf"),) * 3
    if want.dtype.kind in "iu":
        return (float((got != want).sum()),) * 3
    gap = np.abs(got.astype(np.float64) - want)
    scale = max(float(np.sqrt(np.mean(np.square(want, dtype=np.float64)))), 1e-30)
    return float(gap.max()), float(gap.mean()), float((gap / np.maximum(scale, np.abs(want))).max())


def print_table(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], limit: float) -> int:
    """Prints one row for each stage, and returns the number of rows over their limits."""
    print(table_row(HEADER, COLUMNS))
    over = 0
    stages = [name for name in reference if name in ours]
    for name in stages:
        want, shape = reference[name], "x".join(map(str, ours[name].shape))
        largest, mean, relative = differences(ours[name], want)
        allowed = 0 if want.dtype.kind in "iu" else limit
        over += not relative <= allowed
        numbers = f"{largest:.2g}", f"{mean:.2g}", f"{relative:.2g}", f"{allowed:.0e}"
        print(table_row((name, shape, *numbers, "yes" if relative <= allowed else "NO"), COLUMNS))
    if rest := [name for name in reference if name not in ours]:
        print(f"not run here: {', '.join(rest)}")
    if lacking := [name for name in ours if name not in reference]:
        print(f"not in the published model: {', '.join(lacking)}")
        over += len(lacking)
    print(f"{len(stages)} stages compared, {over} over their limits")
    return over


def compare(
    source: Path | None,
    base: Path | None,
    *,
    family: str | None = None,
    vision: Path | None = None,
    tokenizer: bool = True,
    num_frames: int = 4,
    limit: float = 1e-4,
    python: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Prints the table and returns the number of rows over their limits. Raises UserError.

    At least one of source and base is given. The published model runs first, and only samples of its stages are kept.
    """
    if num_frames < 1 or round(num_frames**0.5) ** 2 != num_frames:
        raise UserError(f"--frames is {num_frames}: Qwen-VL's code takes square numbers only, such as 4, 9 or 100")
    with tempfile.TemporaryDirectory(prefix="redvillm-compare-") as name:
        folder = Path(name)
        if source is not None:
            with quiet():
                from_torch(family, source, base or folder / "base", vision, tokenizer=tokenizer)
        opened = open_base(base or folder / "base")
        inputs = make_inputs(opened, num_frames, tokenizer)
        published = source or opened.path
        apart = vision or (published / "vision" if (published / "vision").is_dir() else None)
        reference = run_reference(published, apart, inputs, folder, python, trust_remote_code)
        from conversion.stages import run_ours  # JAX takes memory, and PyTorch has the first turn

        return print_table(run_ours(opened, inputs), reference, limit)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the lines of conversion.from_torch out of the table."""
    with contextlib.redirect_stdout(None):
        yield


def main(argv: list[str]) -> int:
    parser = Parser("python -m conversion.compare", __doc__)
    parser.add_argument("--source", type=local_path, metavar="DIR", help="the published folder")
    parser.add_argument("--base", type=local_path, metavar="DIR", help="its base folder; made where it is missing")
    parser.add_argument("--family", help="which image LLM it is, where config.json does not say so")
    parser.add_argument("--vision", type=local_path, metavar="DIR", help="the folder of a CLIP published apart (LLaVA)")
    parser.add_argument("--frames", type=int, default=4, help="frames of the clip, a square number (default 4)")
    parser.add_argument("--limit", type=float, default=1e-4, help="largest |a - b| / max(|b|, RMS) (default 1e-4)")
    parser.add_argument("--without_tokenizer", action="store_true", help="arbitrary ids, for a folder without one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the folder brings along")
    parser.add_argument("--python", metavar="PYTHON", help="run the published model in this Python")
    args = parser.parse_args(argv)
    if args.source is None and args.base is None:
        raise UserError("--source or --base is needed (see --help)")
    jax.config.update("jax_platforms", "cpu")  # also keeps libtpu from looking for a TPU
    over = compare(
        args.source,
        args.base,
        family=args.family,
        vision=args.vision,
        tokenizer=not args.without_tokenizer,
        num_frames=args.frames,
        limit=args.limit,
        python=args.python,
        trust_remote_code=args.trust_remote_code,
    )
    return int(over > 0)


if __name__ == "__main__":
    run(main)
