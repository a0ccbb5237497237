"""Writes one clip and the token ids around it, the same input for the PyTorch and the JAX model.

python -m benchmarks.make_inputs --base=BASE --out=inputs.npz [--frames=9]

The file holds frames (T, H, W, 3) uint8, a block that moves over coloured grain (its first frame is also the
picture), text_ids (1, S), video_prefix_ids and video_suffix_ids (1, P) int64: the model's own prompt around a
picture or a clip, or arbitrary ids when the base folder has no tokenizer.
"""

import json
from pathlib import Path

import numpy as np

from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from redvillm_jax.model.base_folder import Base, open_base

TEXT = "A red square moves over coloured grain, from left to right. 一个红色的方块从左向右移动。In 2.5 s."
QUESTION = "What moves, and where does it go?"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")


def make_clip(num_frames: int, size: int) -> np.ndarray:
    """Frames (T, size, size, 3) uint8."""
    rng = np.random.default_rng(0)
    frames = np.tile(rng.integers(0, 128, (size, size, 3), np.uint8), (num_frames, 1, 1, 1))
    block = size // 4
    for t, left in enumerate(np.linspace(0, size - block, num_frames).astype(int)):
        frames[t, size // 2 : size // 2 + block, left : left + block] = (230, 30, 40)
    return frames


def make_ids(base: Base) -> dict[str, np.ndarray]:
    """text_ids, video_prefix_ids, video_suffix_ids: (1, length) int64 each."""
    if any((base.path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = base.module.Tokenizer(base.path)
        before, after = base.module.prompt(tokenizer, base.config, QUESTION, None)
        rows = tokenizer.encode(TEXT), [i for i, _ in before], [i for i, _ in after]
    else:
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, min(base.config.vocab_size // 2, 200), n).tolist() for n in (24, 5, 8)]
        start = json.loads((base.path / "config.json").read_text()).get("visual", {}).get("image_start_id")
        if start is not None:  # Qwen-VL finds the picture by the marks around it
            rows = rows[0], [*rows[1], start], [start + 1, *rows[2]]
    names = ("text_ids", "video_prefix_ids", "video_suffix_ids")
    return {name: np.asarray([row], np.int64) for name, row in zip(names, rows, strict=True)}


def main(argv: list[str]) -> None:
    parser = Parser("python benchmarks/make_inputs.py", __doc__)
    parser.add_argument("--base", required=True, type=Path, help="folder made by conversion.from_torch")
    parser.add_argument("--out", required=True, type=Path, help="the .npz to write")
    parser.add_argument("--frames", type=int, default=9, help="frames of the clip")
    args = parser.parse_args(argv)
    if args.frames < 1 or round(args.frames**0.5) ** 2 != args.frames:
        raise UserError(f"--frames is {args.frames}: Qwen-VL's code takes square numbers only, such as 4, 9 or 100")
    base = open_base(args.base)
    np.savez(args.out, frames=make_clip(args.frames, base.config.image_size), **make_ids(base))


if __name__ == "__main__":
    run(main)
