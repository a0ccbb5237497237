"""The video LLM: a base's encoder, the projectors of a video representation, and the base's language model."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from redvillm_jax.bases.contract import Family
from redvillm_jax.model.base_folder import EXTRA_PREFIX
from redvillm_jax.model.places import token_layout
from redvillm_jax.modules.attention import Masks, row_attention
from redvillm_jax.modules.layers import normalize, num_batch_parts, pin_batch
from redvillm_jax.video.contract import Representation, Stream, image_projector, num_features

IMAGES_PER_DEVICE = 10  # encoded at once; more need more memory and are not faster (docs/performance.md)
FEATURES_PER_DEVICE = 10240  # of the images encoded at once; the scores of attention grow with their square


class VideoLLM(nnx.Module):
    """Encoder, projectors and language model, with the computation from frames and text to logits.

    projectors: all trainable modules: the representation's projectors by name, and the extra modules as
    "extra_mlp_<stream>".
    """

    def __init__(
        self,
        base: Family,
        config: Any,
        video: Representation,
        *,
        encoder: nnx.Module | None,
        projectors: Mapping[str, nnx.Module],
        llm: nnx.Module | None,
    ):
        self.encoder = encoder
        self.projectors = nnx.Dict(projectors)
        self.llm = llm
        self.mean, self.std, self.video, self.config = base.MEAN, base.STD, video, config
        self.both_directions = base.BOTH_DIRECTIONS

    @property
    def order(self) -> tuple[Stream, ...]:
        """The streams of a video with all frames, in token order."""
        return self.video.order(self.config.grid, self.video.num_frames)

    def encode(self, frames: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Encodes frames (B, T, H, W, 3) uint8 to features (B, T, N, D) in `dtype`."""
        b, t = frames.shape[:2]
        images = min(IMAGES_PER_DEVICE, max(1, FEATURES_PER_DEVICE // math.prod(self.config.grid)))
        chunks = -(-t // max(1, images * num_batch_parts() // b))
        chunk = -(-t // chunks)
        frames = jnp.pad(frames, ((0, 0), (0, chunks * chunk - t), *[(0, 0)] * 3))

        def encode_chunk(frames: jax.Array) -> jax.Array:
            pixels = normalize(rearrange(frames, "c b ... -> (b c) ..."), self.mean, self.std, dtype)
            return rearrange(self.encoder(pin_batch(pixels)), "(b c) n d -> c b n d", b=b)

        features = jax.lax.map(encode_chunk, rearrange(frames, "b (k c) ... -> k c b ...", c=chunk))
        return pin_batch(rearrange(features, "k c b n d -> b (k c) n d")[:, :t])

    def pool(self, frames: jax.Array, num_frames: jax.Array, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Encodes and pools frames (B, T, H, W, 3) uint8 to streams (B, M, D) by name. num_frames: (B,) int32."""
        features = self.encode(self.video.arrange(frames, num_frames), dtype)
        rows, _ = self.config.grid
        return self.video.pool(rearrange(features, "b p (r c) d -> b p r c d", r=rows), num_frames)

    def project(self, streams: Mapping[str, jax.Array], num_frames: jax.Array) -> jax.Array:
        """Projects pooled streams (B, M, D) to visual tokens (B, V, K) in the representation's token order.

        Computes in fp32, the dtype of the projectors' weights, so that their gradients sum in fp32; this costs little
        compared with the language model.
        """
        tokens = []
        for index, stream in enumerate(self.order):
            features = streams[stream.name]
            real = self.real_features(index, features.shape[:2], num_frames)
            tokens.append(self.project_stream(stream, features, real))
        return jnp.concatenate(tokens, axis=1)

    def real_features(self, index: int, shape: tuple[int, int], num_frames: jax.Array) -> jax.Array:
        """Returns (B, M) bool: True for the features of real frames in stream `index`."""
        counts = num_features(self.video, self.config.grid, index)
        if len(set(counts)) == 1:
            return jnp.ones(shape, bool)
        return jnp.arange(shape[1]) < jnp.asarray(counts)[num_frames][:, None]

    def project_stream(self, stream: Stream, features: jax.Array, real: jax.Array) -> jax.Array:
        """Applies a stream's projector, extra module and `merge`: (B, M, D) to (B, tokens, K).

        real: (B, M) bool, not used when the projector is applied to each frame alone: a frame has all its features.
        """
        projector, layout = self.projectors[stream.projector], stream.layout
        x = features.astype(jnp.float32)
        if len(layout) == 3:
            frames = rearrange(x, "b (t n) d -> (b t) n d", t=layout[0])
            x = projector(frames, jnp.ones(frames.shape[:2], bool), layout[1:])
            x = rearrange(x, "(b t) n k -> b (t n) k", t=layout[0])
        else:
            x = projector(x, real, layout)
        if (extra := f"{EXTRA_PREFIX}{stream.name}") in self.projectors:
            x = self.projectors[extra](x)
        return self.video.merge(stream.name, x, token_layout(projector, layout)).astype(features.dtype)

    def picture_tokens(self, pictures: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Computes visual tokens (B, V, K) of pictures (B, H, W, 3) uint8 as the image LLM does.

        The features go through the image LLM's projector, and through the extra module of the same name, if any.
        """
        features = self.encode(pictures[:, None], dtype)[:, 0]
        name, real = image_projector(self.video), jnp.ones(features.shape[:2], bool)
        tokens = self.projectors[name](features.astype(jnp.float32), real, self.config.grid)
        if (extra := f"{EXTRA_PREFIX}{name}") in self.projectors:
            tokens = self.projectors[extra](tokens)
        return tokens.astype(dtype)

    def tile_tokens(self, tiles: jax.Array, num_tiles: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Computes the table of visual tokens (B, V, K) of pictures that are several squares (`Places`).

        tiles: (B, T, H, W, 3) uint8; num_tiles: (B,) int32, how many of them are real; tokens of others are arbitrary.
        Each device encodes the real tiles of its own pictures one after the other, so padding costs nothing.
        """
        parts = num_batch_parts()
        real = rearrange(jnp.arange(tiles.shape[1]) < num_tiles[:, None], "(p b) t -> p (b t)", p=parts)
        order = jnp.argsort(~real, axis=1, stable=True)  # real tiles first
        own = pin_batch(rearrange(tiles, "(p b) t ... -> p (b t) ...", p=parts))
        count, width = self.num_square_tokens, self.config.hidden_size
        tokens = pin_batch(jnp.zeros((*real.shape, count, width), dtype))

        def add_tile(index: jax.Array, tokens: jax.Array) -> jax.Array:
            tile = jnp.take_along_axis(own, order[:, index, None, None, None, None], axis=1)[:, 0]
            return jax.lax.dynamic_update_index_in_dim(tokens, self.picture_tokens(tile, dtype), index, axis=1)

        tokens = jax.lax.fori_loop(0, real.sum(1).max(), add_tile, tokens)
        tokens = jnp.take_along_axis(tokens, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)
        table = pin_batch(rearrange(tokens, "p (b t) n k -> (p b) (t n) k", t=tiles.shape[1]))
        newline = getattr(self.llm, "image_newline", None)
        if newline is None:
            return table
        newlines = jnp.broadcast_to(newline[...].astype(dtype), (len(table), 1, width))
        return jnp.concatenate([newlines, table], axis=1)

    @property
    def num_square_tokens(self) -> int:
        """The number of visual tokens of one square picture."""
        projector = self.projectors[image_projector(self.video)]
        return math.prod(projector.token_layout(self.config.grid))

    def video_tokens(self, videos: Mapping[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        """Computes visual tokens (B, V, K) of videos, from frames or from streams.

        videos: num_frames (B,) int32, and frames (B, T, H, W, 3) uint8 or the streams of `pool`, (B, M, D) by name.
        """
        num_frames = videos["num_frames"]
        if "frames" in videos:
            pooled = self.pool(videos["frames"], num_frames, dtype)
        else:
            pooled = {stream.name: videos[stream.name].astype(dtype) for stream in self.order}
        return self.project(pooled, num_frames)

    def embed(self, token_ids: jax.Array, video_slots: jax.Array, tokens: jax.Array) -> jax.Array:
        """Embeds text and puts the visual tokens in their places.

        token_ids: (R, S) int32; video_slots: (R, S) int32, -1 for text, else an index into the row's visual
        tokens: (R, G * V, K). Returns (R, S, K).
        """
        text = self.llm.embed(token_ids, tokens.dtype)
        visual = jnp.take_along_axis(tokens, jnp.maximum(video_slots, 0)[:, :, None], axis=1)
        return pin_batch(jnp.where((video_slots >= 0)[:, :, None], visual, text))

    def masks(
        self,
        group_ids: jax.Array,
        question_ids: jax.Array,
        position_ids: jax.Array,
        video_slots: jax.Array,
        kernel: str = "xla",
    ) -> Masks:
        """Returns what the language model's layers see in rows of packed questions; all arguments are (R, S) int32.

        group_ids, question_ids: see `attention.visible`; video_slots: see `embed`; kernel: see `choose_kernel`.
        """
        pictures = video_slots >= 0 if self.both_directions else None
        ids = group_ids, question_ids, position_ids
        return row_attention(*ids, kernel, window=self.config.window, pictures=pictures)

    def target_logits(
        self, batch: Mapping[str, jax.Array], dtype: jnp.dtype, *, remat: str = "none", kernel: str = "xla"
    ) -> jax.Array:
        """Computes logits (R, P, vocab_size) fp32 at the supervised positions of a batch of rows, and only there.

        batch: token_ids, position_ids, group_ids, question_ids, video_tokens: (R, S) int32; target_slots: (R, P)
        int32; num_frames: (R, G) int32; frames: (R, G, T, H, W, 3) uint8 or streams (R, G, M, D). remat: see
        `layers.Stack`; kernel: see `attention.choose_kernel`. Rows are of `data_pipeline.packing`.
        """
        names = [name for name in ("num_frames", "frames", *(stream.name for stream in self.order)) if name in batch]
        videos = {name: rearrange(batch[name], "r g ... -> (r g) ...") for name in names}
        rows = len(batch["token_ids"])
        tokens = rearrange(self.video_tokens(videos, dtype), "(r g) v k -> r (g v) k", r=rows)
        embeds = self.embed(batch["token_ids"], batch["video_tokens"], tokens)
        masks = self.masks(
            *(batch[name] for name in ("group_ids", "question_ids", "position_ids", "video_tokens")), kernel
        )
        hidden, _ = self.llm(embeds, batch["position_ids"], masks, remat=remat)
        supervised = jnp.take_along_axis(hidden, batch["target_slots"][:, :, None], axis=1)
        return self.llm.logits(pin_batch(supervised))

    def target_losses(
        self, batch: Mapping[str, jax.Array], dtype: jnp.dtype, *, remat: str = "none", kernel: str = "xla"
    ) -> jax.Array:
        """Computes the cross-entropy (R, P) fp32 at every supervised position.

        batch: as for `target_logits`, and target_ids: (R, P) int32.
        """
        logits = self.target_logits(batch, dtype, remat=remat, kernel=kernel)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["target_ids"])


def mean_loss(
    model: VideoLLM, batch: Mapping[str, jax.Array], dtype: jnp.dtype, *, remat: str = "none", kernel: str = "xla"
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss over a batch, weighted by `target_weights` (R, P) fp32, and each row's largest token loss.

    The second is (R,) fp32; it shows the row that spoils a step.
    """
    losses, weights = model.target_losses(batch, dtype, remat=remat, kernel=kernel), batch["target_weights"]
    worst = jnp.max(jnp.where(weights > 0, losses, 0), axis=1)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-9), worst
