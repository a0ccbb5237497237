"""A representation that no file of the product names: an overview picture, and every frame behind its time."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from redvillm_jax.modules.bounds import one_of
from redvillm_jax.video.contract import Field, Representation, Stream

FIELDS = {
    "toy_digits": Field(1, one_of(0, 1), "tokens"),
    "toy_overview": Field("mean", one_of("mean", "max"), "streams"),
    "toy_start": Field("copy", one_of("copy", "random"), "start"),
}
GROUPS = ("whole", "detail")


@dataclasses.dataclass(frozen=True)
class Video(Representation):
    toy_digits: int = 1
    toy_overview: str = "mean"
    toy_start: str = "copy"

    def arrange(self, frames: jax.Array, num_frames: jax.Array) -> jax.Array:
        """The frames, and a picture of all of them together."""
        real = (jnp.arange(frames.shape[1]) < num_frames[:, None])[:, :, None, None, None]
        x = frames.astype(jnp.float32) * real
        count = jnp.maximum(num_frames, 1)[:, None, None, None]
        together = x.sum(1) / count if self.toy_overview == "mean" else x.max(1)
        return jnp.concatenate([frames, jnp.round(together).astype(jnp.uint8)[:, None]], axis=1)

    def pool(self, features: jax.Array, num_frames: jax.Array) -> dict[str, jax.Array]:
        frames, overview = features[:, :-1], features[:, -1]
        return {
            "each": rearrange(frames, "b t r c d -> b (t r c) d"),
            "overview": rearrange(overview, "b r c d -> b (r c) d"),
        }

    def order(self, grid: tuple[int, int], num_frames: int) -> tuple[Stream, ...]:
        return Stream("overview", "whole", grid), Stream("each", "detail", (num_frames, *grid))

    def projectors(self) -> dict[str, str]:
        return {"whole": "image", "detail": self.toy_start}

    def merge(self, name: str, tokens: jax.Array, layout: tuple[int, ...]) -> jax.Array:
        """One token of each frame: the mean of its own."""
        return reduce(tokens, "b (t n) k -> b t k", "mean", t=layout[0]) if name == "each" else tokens

    def text(self, name: str, frame: int | None, seconds: float | None) -> str:
        return "all:" if name == "overview" else f"{seconds:.{self.toy_digits}f}s"

    def trained(self) -> tuple[str, ...]:
        return ("detail",)
