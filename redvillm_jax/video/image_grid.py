"""Image grid: a few frames of a video stand side by side in one picture, and the image LLM reads that picture.

Set config.num_frames=6, or more, of which six are taken. Nothing is trained. IG-VLM (arXiv 2403.18406) takes six frames
at equal distances, left to right and top to bottom, two in a row. The paper's prompt tells the model that it sees a
grid: put such words into the question. One difference: published code (github.com/imagegridworth/IG-VLM,
vision_processor/) pads the grid of full frames as the image LLM pads pictures; here each frame is a square already and
is scaled into its cell of a picture of the encoder's size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from redvillm_jax.modules.bounds import whole
from redvillm_jax.video.contract import Field, Representation, Stream, spread, take_frames

FIELDS = {
    "grid_rows": Field(3, whole(1, 16), "streams"),
    "grid_cols": Field(2, whole(1, 16), "streams"),
}
GROUPS = ("image",)


@dataclasses.dataclass(frozen=True)
class Video(Representation):
    """grid_rows, grid_cols: the number of rows and columns of frames in the picture."""

    grid_rows: int = 3
    grid_cols: int = 2

    def arrange(self, frames: jax.Array, num_frames: jax.Array) -> jax.Array:
        """Scales frames (B, T, H, W, 3) uint8 into the cells of one picture of the same size, (B, 1, H, W, 3) uint8.

        If there are fewer frames than cells, some frames come twice. The filter is linear with antialiasing. If the
        rows or columns do not divide the size, the first cells are a pixel larger.
        """
        height, width = frames.shape[2:4]
        chosen = spread(num_frames, self.grid_rows * self.grid_cols, repeat=True)
        cells = take_frames(frames, chosen).astype(jnp.float32)
        cells = rearrange(cells, "b (r c) h w d -> r c b h w d", c=self.grid_cols)
        heights, widths = parts(height, self.grid_rows), parts(width, self.grid_cols)
        lines = [
            jnp.concatenate([scale(cell, h, w) for cell, w in zip(line, widths, strict=True)], axis=2)
            for line, h in zip(cells, heights, strict=True)
        ]
        return jnp.round(jnp.concatenate(lines, axis=1)).clip(0, 255).astype(jnp.uint8)[:, None]

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        return {"image": rearrange(features, "b 1 r c d -> b (r c) d")}

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        return (Stream("image", "image", grid),)

    def projectors(self) -> dict[str, str]:
        return {"image": "image"}


def parts(size: int, count: int) -> list[int]:
    """Splits `size` pixels into `count` parts; if they do not divide, the first parts are a pixel larger."""
    return [size // count + (i < size % count) for i in range(count)]


def scale(pictures: jax.Array, height: int, width: int) -> jax.Array:
    """Scales pictures (B, H, W, 3) fp32 to (B, height, width, 3)."""
    return jax.image.resize(pictures, (len(pictures), height, width, 3), "linear", antialias=True)
