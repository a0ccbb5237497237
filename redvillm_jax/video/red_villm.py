"""RED-VILLM: frame features pooled over time (spatial stream) and over space (temporal stream).

Source: arXiv 2404.11865, sections 3.2-3.3, equations (1)-(3). z, the mean over time (N tokens), goes through the image
LLM's projector; t, the mean over space (T tokens), goes through the temporal module; Q_v = [Q_t ; Q_z]. The paper's
prose swaps z and t; the code follows the equations.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jax.sharding import PartitionSpec as P

from redvillm_jax.modules.bounds import one_of
from redvillm_jax.modules.layers import BATCH_AXES, Linear, gelu
from redvillm_jax.video.contract import Field, Representation, Stream

FIELDS = {
    "streams": Field("both", one_of("both", "spatial", "temporal"), "tokens"),
    "stream_order": Field("temporal_first", one_of("temporal_first", "spatial_first"), "tokens"),
    "temporal_module": Field(True, one_of(True, False), "tokens"),
    "temporal_init": Field("copy", one_of("copy", "random"), "start"),
    "train_spatial": Field(True, one_of(True, False), "training"),
    "extra_mlp": Field(False, one_of(True, False), "tokens"),
    "spatial_pool": Field(1, one_of(1, 2), "streams"),
    "short_video": Field("mask", one_of("mask", "zero"), "tokens"),
}
GROUPS = ("spatial", "temporal", "extra_mlp")


class ExtraMLP(nnx.Module):
    """The paper's Table 5: a random two-layer MLP behind a projector, without residual; its sizes are not published."""

    SHARDING = ((r"weight$", P(BATCH_AXES, None)), (r"\bbias$", P()))

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(features, features, rngs=rngs)
        self.fc2 = Linear(features, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


@dataclasses.dataclass(frozen=True)
class Video(Representation):
    """The method's switches; the defaults are the paper's.

    streams: "both" | "spatial" | "temporal" (Table 3). stream_order: "temporal_first" (eq. 3) | "spatial_first".
    temporal_module: the temporal stream has a projector of its own (Table 4), or uses the image LLM's. temporal_init:
    the temporal module starts as a "copy" of the projector, or "random" (an ablation of Table 4). train_spatial: the
    image LLM's projector trains, too. extra_mlp: a random MLP follows each projector (Table 5). spatial_pool: the
    window of the mean over the spatial stream's grid; 2 leaves a quarter of the tokens (Table 7). short_video: the
    frames that a short video lacks take no tokens ("mask"), or are zero features that are attended to ("zero",
    Video-ChatGPT).
    """

    streams: str = "both"
    stream_order: str = "temporal_first"
    temporal_module: bool = True
    temporal_init: str = "copy"
    train_spatial: bool = True
    extra_mlp: bool = False
    spatial_pool: int = 1
    short_video: str = "mask"

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        """Computes means over time and over space, in fp32 and over real frames only.

        features: (B, T, rows, cols, D); num_frames: (B,) int32. Returns {"temporal": (B, T, D), "spatial":
        (B, rows * cols / spatial_pool^2, D)}, all zero for a video without frames.
        """
        real = jnp.arange(features.shape[1]) < num_frames[:, None]
        x = features.astype(jnp.float32) * real[:, :, None, None, None]
        spatial = x.sum(1) / jnp.maximum(num_frames, 1)[:, None, None, None]
        window = {"p1": self.spatial_pool, "p2": self.spatial_pool}
        spatial = reduce(spatial, "b (r p1) (c p2) d -> b (r c) d", "mean", **window)
        temporal = reduce(x, "b t r c d -> b t d", "mean")
        return {"temporal": temporal.astype(features.dtype), "spatial": spatial.astype(features.dtype)}

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        rows, cols = (side // self.spatial_pool for side in grid)
        length = num_frames if self.short_video == "mask" else self.num_frames
        temporal = Stream("temporal", "temporal" if self.temporal_module else "spatial", (length,))
        spatial = Stream("spatial", "spatial", (rows, cols))
        both = (temporal, spatial) if self.stream_order == "temporal_first" else (spatial, temporal)
        return tuple(stream for stream in both if self.streams in ("both", stream.name))

    def projectors(self) -> dict[str, str]:
        used = [stream.projector for stream in self.order((2, 2), 1)]
        return {name: {"spatial": "image", "temporal": self.temporal_init}[name] for name in used}

    def trained(self) -> tuple[str, ...]:
        return ("spatial", "temporal") if self.train_spatial else ("temporal",)

    def extra(self, name: str) -> type[nnx.Module] | None:
        return ExtraMLP if self.extra_mlp else None

    def problem(self, sampling: str, grid: tuple[int, int] | None) -> str:
        if not (set(self.trained()) & set(self.projectors()) or self.extra_mlp):
            return "config.train_spatial=False without a temporal module leaves nothing to train; leave it out"
        if sampling != "uniform" and self.short_video != "mask":
            return (
                f"config.sampling={sampling} gives videos of different lengths, and "
                f"config.short_video={self.short_video} would pad them with zeros: use "
                "short_video=mask, or sampling=uniform"
            )
        if grid is not None and any(side % self.spatial_pool for side in grid):
            rows, cols = grid
            return f"config.spatial_pool is {self.spatial_pool}, the base's {rows}×{cols} grid needs a divisor of both"
        return ""
