"""Compares this project's model with arrays of the PyTorch model, stage by stage, and prints one table.

python -m benchmarks.compare_stages --base=BASE --reference=FILE [--limit=1e-4]

FILE is an .npz of benchmarks.dump_torch, or any with the same names. The base is loaded as training loads it, in
fp32, and a clip goes through the functions that training and answering use. An array is over its limit when
|a - b| / max(1, |b|) exceeds --limit anywhere; token ids must be equal, their rows count the unequal ones. Exit
code 1 when an array is over its limit.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_stages import stages
from benchmarks.stage_file import sample
from configs.demo import family_config
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import UserError, run
from data_pipeline.common.tables import table_row
from redvillm_jax.model.base_folder import open_base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.runtime.sharding import make_mesh

NEEDED = ("pixels", "text_ids", "image_ids", "video_prefix_ids", "video_suffix_ids")
INPUTS = (*NEEDED, "frames", "text_mask", "image_mask")


def differences(got: np.ndarray, want: np.ndarray) -> tuple[float, float, float]:
    """The largest |a - b|, its mean, and the largest |a - b| / max(1, |b|); ids: the number of unequal ones thrice."""
    if want.shape != got.shape:
        got = sample(got)
    if want.shape != got.shape:
        return (float("inf"),) * 3
    if want.dtype.kind in "iu":
        return (float((got != want).sum()),) * 3
    gap = np.abs(got.astype(np.float64) - want)
    return float(gap.max()), float(gap.mean()), float((gap / np.maximum(1, np.abs(want))).max())


def main(argv: list[str]) -> int:
    parser = Parser("python benchmarks/compare_stages.py", __doc__)
    parser.add_argument("--base", required=True, type=Path, help="folder made by conversion.from_torch")
    parser.add_argument("--reference", required=True, type=Path, help="the PyTorch model's arrays")
    parser.add_argument("--limit", type=float, default=1e-4, help="largest |a - b| / max(1, |b|) that is allowed")
    args = parser.parse_args(argv)
    base = open_base(args.base)
    if not args.reference.is_file():
        raise UserError(f"{args.reference}: not found; benchmarks.dump_torch writes it")
    reference = dict(np.load(args.reference))
    if missing := [name for name in NEEDED if name not in reference]:
        raise UserError(f"{args.reference}: holds no {', '.join(missing)}; make it with benchmarks.dump_torch")
    num_frames = len(reference["frames" if "frames" in reference else "pixels"])
    config = plain_config(family_config(base.family)) | {"num_frames": num_frames}
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        got = stages(load_model(base, model_settings(config), mesh, dtype=jnp.float32), base, reference)

    header = ("array", "shape", "dtype", "largest |a-b|", "mean |a-b|", "relative", "limit", "ok")
    columns = ("<26", " <16", " <8", " >13", " >11", " >9", " >7", "  <0")
    print(table_row(header, columns))
    compared = [name for name in reference if name in got]
    over = 0
    for name in compared:
        want, shape = reference[name], "x".join(map(str, got[name].shape))
        largest, mean, relative = differences(np.asarray(got[name]), want)
        limit = 0 if want.dtype.kind in "iu" else args.limit
        over += not relative <= limit
        numbers = f"{largest:.2g}", f"{mean:.2g}", f"{relative:.2g}", f"{limit:.0e}"
        print(table_row((name, shape, want.dtype.name, *numbers, "yes" if relative <= limit else "NO"), columns))
    if rest := [name for name in reference if name not in (*compared, *INPUTS)]:
        print(f"not compared: {', '.join(rest)}")
    print(f"{len(compared)} arrays compared, {over} over their limits")
    return int(over > 0)


if __name__ == "__main__":
    run(main)
