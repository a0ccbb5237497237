"""RED-VILLM: frame features pooled over time (spatial stream) and over space (temporal stream).

Paper section 3.2-3.3, equations (1)-(3). The paper's prose swaps z and t; here as in its equations:
z = mean over time (N tokens) goes through the image LLM's projector, t = mean over space (T tokens) through the
temporal module, and Q_v = [Q_t ; Q_z].
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import reduce

Stream = tuple[jax.Array, jax.Array, tuple[int, ...]]  # features (B, M, D), mask (B, M) bool, layout


OPTIONS = {  # the method's switches and their values
    "streams": ("both", "spatial", "temporal"),
    "stream_order": ("temporal_first", "spatial_first"),
    "temporal_module": (True, False),
    "spatial_pool": (1, 2),
    "short_video": ("mask", "zero"),
}


@dataclasses.dataclass(frozen=True)
class Video:
    """The method's switches; the defaults are the paper's.

    streams: "both" | "spatial" | "temporal" (Table 3). stream_order: "temporal_first" (eq. 3) | "spatial_first".
    temporal_module: its own projector for the temporal stream (Table 4), or the shared one. spatial_pool: window
    of the mean over the grid of the spatial stream, 2 = a quarter of the tokens (Table 7). short_video: frames
    that a short video lacks take no token ("mask") or are attended zero features ("zero", Video-ChatGPT).
    """

    streams: str = "both"
    stream_order: str = "temporal_first"
    temporal_module: bool = True
    spatial_pool: int = 1
    short_video: str = "mask"

    POOLED: ClassVar[tuple[str, ...]] = ("temporal", "spatial")

    def order(self) -> tuple[tuple[str, str], ...]:
        """(stream, projector) in token order; a projector is "spatial" (the image LLM's) or "temporal"."""
        pairs = (("temporal", "temporal" if self.temporal_module else "spatial"), ("spatial", "spatial"))
        if self.stream_order == "spatial_first":
            pairs = pairs[::-1]
        return tuple(pair for pair in pairs if self.streams in ("both", pair[0]))

    def layouts(self, grid: tuple[int, int], num_frames: int) -> dict[str, tuple[int, ...]]:
        """The layout of each stream's features: (rows, cols) of the picture, (frames,) of the sequence."""
        rows, cols = (side // self.spatial_pool for side in grid)
        return {"temporal": (num_frames,), "spatial": (rows, cols)}

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        """Pools frame features over space and over time; no parameters, so the result can be stored.

        features: (B, T, N, D), patches in row-major order of a square grid; num_frames: (B,) int32, how many of
        the T frames are real (0: no video, all zero). Means are taken in fp32 over real frames only.
        Returns {"temporal": (B, T, D), "spatial": (B, N / spatial_pool^2, D)}.
        """
        _, t, n, _ = features.shape
        side = round(n**0.5)
        real = jnp.arange(t) < num_frames[:, None]
        x = features.astype(jnp.float32) * real[:, :, None, None]
        spatial = x.sum(1) / jnp.maximum(num_frames, 1)[:, None, None]
        spatial = reduce(
            spatial,
            "b (r p1 c p2) d -> b (r c) d",
            "mean",
            p1=self.spatial_pool,
            p2=self.spatial_pool,
            c=side // self.spatial_pool,
        )
        temporal = reduce(x, "b t n d -> b t d", "mean")
        return {"temporal": temporal.astype(features.dtype), "spatial": spatial.astype(features.dtype)}

    def describe(self, pooled: dict[str, jax.Array], num_frames: jax.Array) -> dict[str, Stream]:
        """Pooled features with their masks and layouts, as the projectors take them."""
        temporal, spatial = pooled["temporal"], pooled["spatial"]
        side = round(spatial.shape[1] ** 0.5)
        real = jnp.arange(temporal.shape[1]) < num_frames[:, None]
        attended = real if self.short_video == "mask" else jnp.ones_like(real)
        return {
            "temporal": (temporal, attended, (temporal.shape[1],)),
            "spatial": (spatial, jnp.ones(spatial.shape[:2], bool), (side, side)),
        }

    def token_slots(self, projector, grid: tuple[int, int], max_frames: int, num_frames: int) -> list[int]:
        """Which of a video's static token slots hold tokens when it has `num_frames` of `max_frames` frames.

        `projector.token_layout(layout)` says how the tokens of a stream lie; they stand first in its slots.
        """
        slots, start = [], 0
        longest = self.layouts(grid, max_frames)
        actual = self.layouts(grid, num_frames if self.short_video == "mask" else max_frames)
        for stream, _ in self.order():
            slots += range(start, start + math.prod(projector.token_layout(actual[stream])))
            start += math.prod(projector.token_layout(longest[stream]))
        return slots
