"""Slow and fast: a few frames with many tokens each, and all frames with few tokens each.

Set config.num_frames=50. SlowFast-LLaVA (arXiv 2407.15841) trains nothing: every frame goes through the image LLM's
projector; then the slow pathway pools 10 of 50 frames by 2 within rows, and the fast pathway pools all frames to 4 × 4
tokens. The defaults are the published 7B configuration (github.com/apple/ml-slowfast-llava:
slow_10frms_spatial_1d_max_pool-fast_4x4, 50 frames).

Use fast_module=True to train two projectors: the fast pathway then has a copy, as RED-VILLM duplicates the projector.
Use pool_fast="before" for small stores: it pools features instead of tokens, so that a store holds 16 features of each
frame instead of all. The tokens then differ from the published method unless the projector is linear.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from redvillm_jax.modules.bounds import one_of, whole
from redvillm_jax.modules.layers import product
from redvillm_jax.video.contract import Field, Layout, Representation, Stream, spread, take_frames

FIELDS = {
    "slow_frames": Field(10, whole(1, 10_000), "streams"),
    "slow_pool": Field("max", one_of("max", "mean", "none"), "tokens"),
    "fast_side": Field(4, whole(1, 64), "streams"),
    "pool_fast": Field("after", one_of("after", "before"), "streams"),
    "fast_module": Field(False, one_of(True, False), "tokens"),
}
GROUPS = ("slow", "fast")


@dataclasses.dataclass(frozen=True)
class Video(Representation):
    """slow_frames: the number of frames in the slow pathway. slow_pool: the pooling of two neighbouring tokens to one.
    fast_side: the rows and columns of a frame's tokens in the fast pathway. pool_fast: pools "after" the projector or
    "before" it. fast_module: the fast pathway has a projector of its own, which starts as a copy.
    """

    slow_frames: int = 10
    slow_pool: str = "max"
    fast_side: int = 4
    pool_fast: str = "after"
    fast_module: bool = False

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        """Returns {"slow": (B, slow_frames * rows * cols, D), "fast": (B, T * rows * cols, D)}.

        With pool_fast="before" the fast stream is (B, T * fast_side², D).
        """
        slow = take_frames(features, spread(num_frames, self.slow_frames))
        fast = features if self.pool_fast == "after" else pool_grid(features, self.fast_side)
        return {
            "slow": rearrange(slow, "b t r c d -> b (t r c) d"),
            "fast": rearrange(fast, "b t r c d -> b (t r c) d"),
        }

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        small = grid if self.pool_fast == "after" else (self.fast_side, self.fast_side)
        return (
            Stream("slow", "slow", (min(num_frames, self.slow_frames), *grid)),
            Stream("fast", "fast" if self.fast_module else "slow", (num_frames, *small)),
        )

    def projectors(self) -> dict[str, str]:
        return {"slow": "image"} | ({"fast": "copy"} if self.fast_module else {})

    def merge(self, name: str, tokens: jax.Array, layout: Layout) -> jax.Array:
        """Pools the tokens of each frame as the published code does: pairs in raster order, windows of the grid."""
        frames, rows, cols = layout
        if name == "slow" and self.slow_pool != "none":
            tokens = rearrange(tokens, "b (t n) k -> b t n k", t=frames)[:, :, : rows * cols // 2 * 2]
            return reduce(tokens, "b t (n pair) k -> b (t n) k", self.slow_pool, pair=2)
        if name == "fast" and self.pool_fast == "after":
            tokens = rearrange(tokens, "b (t r c) k -> b t r c k", t=frames, r=rows)
            return rearrange(pool_grid(tokens, self.fast_side), "b t r c k -> b (t r c) k")
        return tokens

    def frame_of(self, name: str, frame: int, num_frames: int) -> int:
        return frame * num_frames // min(num_frames, self.slow_frames) if name == "slow" else frame

    def problem(self, sampling: str, grid: tuple[int, int] | None) -> str:
        if grid is not None and self.fast_side > min(grid):
            rows, cols = grid
            return f"config.fast_side is {self.fast_side}, the base's {rows}×{cols} grid needs {min(grid)} or less"
        return ""


def pool_grid(x: jax.Array, side: int) -> jax.Array:
    """Averages windows of a grid in fp32: (B, T, rows, cols, D) to (B, T, side, side, D).

    As torch's AdaptiveAvgPool2d: window i of n points reaches from floor(i n / side) to ceil((i + 1) n / side).
    """
    down, across = (jnp.asarray(windows(n, side)) for n in x.shape[2:4])
    pooled = product("sr,btrcd->btscd", down, x.astype(jnp.float32))
    return product("sc,btrcd->btrsd", across, pooled).astype(x.dtype)


def windows(size: int, count: int) -> np.ndarray:
    """Returns the weights (count, size) fp32 of the mean over each window."""
    first, stop = np.arange(count) * size // count, -(-(np.arange(count) + 1) * size // count)
    inside = (np.arange(size) >= first[:, None]) & (np.arange(size) < stop[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
