"""Pictures per second through the frozen encoder: this project against PyTorch, on one machine in one run.

python benchmarks/encode_vs_torch.py [--family=llava] [--size=tiny|7b] [--steps=N]

Frames as stored (uint8) go in, patch features come out. PyTorch runs transformers' CLIPVisionModel with SDPA, eager
and compiled, as LLaVA uses it: all layers run, and the features before the last layer are taken. This project therefore
runs one layer less. For qwen_vl PyTorch runs an independent implementation of Qwen-VL's vision transformer. tiny: the
demo's bases in fp32, one CPU core for each variant, features equal within 1e-4. 7b: CLIP ViT-L/14 with 224 pixels or
Qwen-VL's ViT-bigG with 448, bf16, random weights. TFLOP/s count this project's operations.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_vs_torch import ROOT, TOLERANCE, big_config, convert
from benchmarks.variants import Variant, failed, measure, parse, print_table
from data_pipeline.common.cli import Parser
from data_pipeline.common.errors import run
from redvillm_jax.bases.contract import load_family
from redvillm_jax.model.base_folder import read_config

VIDEOS = {("llava", "7b"): (2, 100), ("qwen_vl", "7b"): (1, 50)}  # videos and frames of a step; tiny: (4, 16)


def main(argv: list[str]) -> int:
    parser = Parser("python benchmarks/encode_vs_torch.py", __doc__)
    flags = parse(parser, argv)
    gpu, size = flags.gpu, flags.size
    module = load_family(flags.family)

    with tempfile.TemporaryDirectory() as folder:
        if size == "tiny":
            source, base = ROOT / "redvillm_jax" / "demo" / "bases" / flags.family, Path(folder) / "base"
            config = read_config(module, source)
            convert(flags.family, source, base)
        else:
            source, base, config = None, None, big_config(module)
        side = config.image_size
        videos = VIDEOS.get((flags.family, size), (4, 16))
        frames = np.random.default_rng(0).integers(0, 256, (*videos, side, side, 3), dtype=np.uint8)
        common = {
            "family": flags.family,
            "config": config,
            "frames": frames,
            "device": "gpu" if gpu else "cpu",
            "dtype": "float32" if size == "tiny" else "bfloat16",
        }
        torch_side = {"folder": source, **common}
        variants = [
            Variant("torch eager", "torch_encoder", {**torch_side, "compiled": False}),
            Variant("torch.compile", "torch_encoder", {**torch_side, "compiled": True}),
            Variant("this project", "jax_step", {"folder": base, **common}),
        ]
        print(
            f"{flags.family} {size} encoder, {common['dtype']}, {gpu or 'CPU'}: {videos} frames of {side} pixels a step"
        )
        measured = measure("make_encoder", variants, rounds=flags.rounds, steps=flags.steps, alternate=not gpu)

    results = {name: result for name, result in measured.items() if not failed(result)}
    pictures = int(np.prod(videos))
    lines = []
    for variant in variants:
        if variant.name not in results:
            continue
        result = results[variant.name]
        line = {
            "variant": variant.name,
            "ms a step": f"{1000 * result.seconds:.1f}",
            "images/s": f"{pictures / result.seconds:.1f}",
            "TFLOP/s": f"{pictures * flops_per_picture(config) / result.seconds / 1e12:.3g}",
            "peak GiB": f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "-",
        }
        for other in variants[:2]:
            seconds = results[other.name].seconds if other.name in results else None
            line[f"x {other.name}"] = f"{seconds / result.seconds:.2f}" if seconds else "-"
        lines.append(line)
    print_table(lines)
    print(f"median of {flags.rounds} x {flags.steps} steps after 2 warm-up steps; x: images/s over that variant's")
    wrong = len(results) < len(variants)
    if size == "tiny" and "torch eager" in results:
        gap = max(float(np.abs(r.first - results["torch eager"].first).max()) for r in results.values())
        print(f"features lie within {gap:.1e} of torch eager's (limit {TOLERANCE:g})")
        wrong |= not gap <= TOLERANCE
    return int(wrong)


def flops_per_picture(config: Any) -> float:
    """Floating-point operations of one picture in the layers that run; a multiply-add counts two."""
    d, m, n = config.vision_hidden_size, config.vision_intermediate_size, config.num_patches
    layers = getattr(config, "vision_layers_used", config.vision_num_hidden_layers)
    slots = n + hasattr(config, "vision_layers_used")  # CLIP's class token
    patches = 2 * n * 3 * config.patch_size**2 * d
    return patches + layers * (2 * slots * (4 * d * d + 2 * d * m) + 4 * slots * slots * d)


if __name__ == "__main__":
    run(main)
