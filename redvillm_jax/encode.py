"""Encodes and pools every video of a frame store once, so that training reads streams instead of frames.

python -m redvillm_jax.encode --config=configs/qwen.py --config.base=BASE --data=FRAMES --out=STREAMS

Use it before training, when videos have several questions: the encoder is frozen and the pooling has no parameters, so
a video's streams are the same for every question and epoch. Train with --config.data=STREAMS; the encoder's weights
are then not loaded. A stopped run continues with the missing shards. New questions in FRAMES are taken over without
encoding again. Several processes share the shards. Each device has the whole encoder and encodes videos of its own,
independent of config.mesh.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data_pipeline import store as stores
from data_pipeline.common.cli import Parser, path, whole
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import absolute
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.build import load_model
from redvillm_jax.model.places import has_text
from redvillm_jax.model.settings import check_store, complete, model_settings, open_config_base, stream_settings
from redvillm_jax.runtime.cli import parse
from redvillm_jax.runtime.distributed import command, is_first, locked, wait_for_all
from redvillm_jax.runtime.sharding import DATA_PARALLEL, make_mesh, num_batch_shards, to_global
from redvillm_jax.runtime.shared_folder import require_shared
from redvillm_jax.training.recipe import make_encode_step
from redvillm_jax.video.contract import Representation

READ_AHEAD = 2 * 2**30  # bytes of decoded frames that may wait for the devices


def main(argv: list[str]) -> None:
    parser = Parser("python -m redvillm_jax.encode", __doc__, needed=("config", "data", "out"))
    parser.add_argument("--data", type=path, metavar="FRAMES", help="frame store made by data_pipeline.prepare")
    parser.add_argument("--out", type=path, metavar="STREAMS", help="folder for the streams")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of the stored streams (%(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=whole(), default=8, metavar="N", help="videos that a process encodes at once (%(default)s)"
    )
    flags = parse(parser, argv, complete)
    base, frames = open_config_base(flags.config), stores.open_store(flags.data)
    if frames.meta["kind"] != "frames":
        raise UserError(f"{flags.data} holds streams already; give the frame store they were made from")
    check_store(frames, base, model_settings(flags.config))
    require_shared("--out", flags.out)
    with locked(flags.out):
        encode_store(flags.config, base, frames, flags.out, flags.dtype, flags.batch_size)


def encode_store(
    config: Mapping[str, Any], base: Base, frames: stores.VideoStore, out: Path, stored: str, batch_size: int
) -> None:
    """Writes the missing shards and the store's description. stored: the dtype of the streams on disk."""
    made_for = model_settings(config)
    mesh = make_mesh(DATA_PARALLEL, jax.local_devices())
    side, t, dtype = base.config.image_size, config["num_frames"], jnp.dtype(config["dtype"])
    batch_size = -(-batch_size // num_batch_shards(mesh)) * num_batch_shards(mesh)

    with jax.set_mesh(mesh):
        model = load_model(base, made_for, mesh, dtype=dtype, parts=("encoder",))
        pooled_streams, weights = make_encode_step(model, dtype)
        shapes = jax.eval_shape(
            pooled_streams,
            weights,
            jax.ShapeDtypeStruct((1, t, side, side, 3), jnp.uint8),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
        settings = {
            "kind": "streams",
            **{key: frames.meta[key] for key in ("num_frames", "sampling", "image_size", "resize")},
            **stream_settings(base, made_for),
            "computed_in": config["dtype"],
            "dtype": stored,
            "streams": {name: list(x.shape[1:]) for name, x in shapes.items()},
            "frames": fingerprint(frames),
        }
        index = {line["video"]: i for i, line in enumerate(frames.videos)}

        def encode(missing: list[stores.Source]) -> Iterator[stores.Result]:
            hidden = not missing or not is_first()
            bar = tqdm(total=len(missing), unit="video", disable=hidden, dynamic_ncols=True)
            computed = (
                (videos, pooled_streams(weights, **to_global(batch, mesh)))
                for videos, batch in read_ahead(frames, [index[source["video"]] for source in missing], batch_size)
            )
            for videos, streams in one_behind(computed):
                streams = {name: np.asarray(x.astype(stored)) for name, x in streams.items()}
                for i, video in enumerate(videos):
                    record = {name: x[i] for name, x in streams.items()}
                    check_finite(record, frames.videos[video]["video"], str(base.path), stored)
                    yield {"line": frames.videos[video] | times(frames, video, made_for.video), "record": record}
                bar.update(len(videos))
            bar.close()

        sources = [{"video": line["video"], "source": line["source"], "bytes": 0} for line in frames.videos]
        shard = jax.process_index() + 1, jax.process_count()
        stores.write_shards(out, settings, sources, encode, shard=shard)
    wait_for_all("the shards of the others")
    if not is_first():
        return
    shards = stores.read_shards(out, settings, sources)
    if shards.missing:
        raise UserError(f"{out}: {shards.missing} of {shards.total} shards are broken; run the command again")
    report = {"made_from": str(absolute(frames.path)), "videos_used": len(shards.videos)}
    stores.finish_store(out, settings, shards, frames.instructions, report)
    values = sum(int(np.prod(shape)) for shape in settings["streams"].values())
    size = f"{values * jnp.dtype(stored).itemsize:,} bytes each"
    print(f"{out}: {len(shards.videos)} videos, {size}; train with --config.data={out}")


def times(frames: stores.VideoStore, video: int, representation: Representation) -> dict[str, list[float | None]]:
    """{"seconds"} of a video's frames for a representation that puts text between the visual tokens."""
    if not has_text(representation):
        return {}
    return {"seconds": [None if math.isnan(at) else at for at in frames.seconds(video)]}


def check_finite(record: Mapping[str, np.ndarray], video: str, base: str, dtype: str) -> None:
    """Raises UserError unless all streams of a video are finite."""
    if bad := sorted(name for name, stream in record.items() if not np.isfinite(stream).all()):
        raise UserError(
            f"video {video!r}: base {base} makes NaN or infinite values of it (stream {', '.join(bad)}, --dtype={dtype}"
            "): look for damaged weights with --check_files, or compute and store with --config.dtype=float32 "
            "--dtype=float32"
        )


def read_ahead(
    frames: stores.VideoStore, videos: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Mapping[str, np.ndarray]]]:
    """Yields (indices, `frames.padded` of them) for batches of videos; threads read while the caller computes.

    The last batch is filled up with empty videos.
    """

    def read(number: int) -> tuple[list[int], Mapping[str, np.ndarray]]:
        batch = list(videos[number * batch_size : (number + 1) * batch_size])
        return batch, frames.padded([*batch, *[-1] * (batch_size - len(batch))])

    size = frames.meta["num_frames"] * frames.meta["image_size"] ** 2 * 3 * batch_size
    threads = max(1, min(os.cpu_count() or 1, READ_AHEAD // size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches = -(-len(videos) // batch_size)
    return iter(grain.MapDataset.range(batches).map(read).to_iter_dataset(options))


def one_behind(items: Iterator[Any]) -> Iterator[Any]:
    """Yields each item after requesting the next, so that devices compute the next while the caller fetches this."""
    waiting = next(items, None)
    while waiting is not None:
        following = next(items, None)
        yield waiting
        waiting = following


def fingerprint(frames: stores.VideoStore) -> str:
    """A hash that identifies the frames of a store, independent of its questions."""
    made = {key: value for key, value in frames.meta.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps([made, frames.videos], sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    command(main)
