"""The stream cache: trains as frames do, without the encoder, and is refused when it is stale."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, NUM_FRAMES, Folders
from helpers import change_json, change_store, change_tensor, without_hashes
from test_train import losses, make_config

from data_pipeline.common.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import encode, train
from redvillm_jax.model import build
from redvillm_jax.model.video_llm import IMAGES_PER_DEVICE, VideoLLM
from redvillm_jax.runtime.sharding import make_mesh

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
ONE = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}


def encode_store(family: str, base: Path, frames: Path, out: Path, *more: str) -> None:
    config = [f"--config={DEMO}:{family}", f"--config.base={base}", f"--config.num_frames={NUM_FRAMES}"]
    encode.main([*config, f"--data={frames}", f"--out={out}", *more])


@pytest.fixture(scope="module")
def streams(common, bases, stores) -> Folders:
    """fp32 streams of each family's store."""

    def make(family: str, folder: Path) -> None:
        encode_store(family, bases[family], stores[family], folder, "--dtype=float32", "--batch_size=5")

    return Folders(common / "streams", make)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_streams_equals_training_from_frames(family, bases, stores, streams, tmp_path):
    for name, data in (("frames", stores[family]), ("streams", streams[family])):
        train.train(make_config(family, bases[family], data, **ONE), tmp_path / name, jax.devices()[:1])
    np.testing.assert_allclose(losses(tmp_path / "streams"), losses(tmp_path / "frames"), rtol=1e-6)


def test_bf16_streams_stay_within_their_rounding(bases, stores, streams, tmp_path):
    encode_store("llava", bases["llava"], stores["llava"], tmp_path / "store")
    half, whole = (open_store(path) for path in (tmp_path / "store", streams["llava"]))
    for name in ("temporal", "spatial"):
        got, want = half[0][name], whole[0][name]
        assert got.dtype == "bfloat16" and got.shape == want.shape
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8, atol=1e-6)
    train.train(make_config("llava", bases["llava"], tmp_path / "store", **ONE), tmp_path / "run", jax.devices()[:1])
    train.train(make_config("llava", bases["llava"], streams["llava"], **ONE), tmp_path / "fp32", jax.devices()[:1])
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "fp32"), rtol=2e-3)


def test_with_streams_the_encoder_is_not_even_loaded(bases, streams, tmp_path, monkeypatch):
    loaded = []
    load_part = build.load_part
    monkeypatch.setattr(build, "load_part", lambda base, part, **kw: loaded.append(part) or load_part(base, part, **kw))
    train.train(make_config("llava", bases["llava"], streams["llava"]), tmp_path)
    assert set(loaded) == {"projector", "llm"}


def test_a_stale_cache_is_refused_and_says_what_differs(bases, streams, tmp_path):
    config = make_config("llava", bases["llava"], streams["llava"])
    other = tmp_path / "base"
    shutil.copytree(bases["llava"], other)
    change_json(other / "base.json", lambda meta: meta.update(fingerprint="0" * 64))
    for change, message in (
        ({"base": str(other)}, "was made with base="),
        ({"num_frames": 5}, "was made with num_frames=4, this model needs 5"),
        ({"spatial_pool": 2}, "was made with spatial_pool=1, this model needs 2"),
        ({"data": str(streams["qwen_vl"])}, "resize=bicubic, this model needs nearest"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(config | change, tmp_path / "run")


def test_a_cache_of_other_frames_is_refused(bases, streams, tmp_path):
    shutil.copytree(streams["llava"], tmp_path / "streams")
    change_store(tmp_path / "streams", sampling="middle")
    with pytest.raises(UserError, match="was made with sampling=middle, this model needs uniform"):
        train.train(make_config("llava", bases["llava"], tmp_path / "streams"), tmp_path / "run")


def test_a_killed_run_encodes_only_what_is_missing(bases, stores, streams, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.store.VIDEOS_PER_SHARD", 5)
    out = tmp_path / "store"
    encode_store("llava", bases["llava"], stores["llava"], out, "--dtype=float32")
    shards = sorted(out.glob("streams-train*"))
    kept = {shard: (shard.stat().st_mtime_ns, shard.read_bytes()) for shard in shards}
    assert len(shards) == 3
    shards[1].unlink()
    encode_store("llava", bases["llava"], stores["llava"], out, "--dtype=float32")
    assert shards[1].stat().st_mtime_ns > kept[shards[1]][0]
    assert all(shard.stat().st_mtime_ns == kept[shard][0] for shard in (shards[0], shards[2]))
    whole, again = open_store(streams["llava"]), open_store(out)
    for i in range(len(whole)):
        for name in ("temporal", "spatial"):
            np.testing.assert_allclose(again[i][name], whole[i][name], atol=1e-5)


def test_streams_that_are_not_finite_are_refused(bases, stores, tmp_path, monkeypatch):
    base = without_hashes(shutil.copytree(bases["llava"], tmp_path / "base"))
    name = "vision_tower.encoder.layers.0.mlp.fc1.bias"
    change_tensor(base, name, lambda bias: np.full_like(bias, np.nan))
    first = open_store(stores["llava"]).videos[0]["video"]
    message = f"video '{first}': base {base} makes NaN or infinite values of it"
    with pytest.raises(UserError, match=f"{message} .stream .*temporal.*dtype=bfloat16") as error:
        encode_store("llava", base, stores["llava"], tmp_path / "streams")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "streams").glob("streams-train*"))
    with pytest.raises(UserError, match="is not finished"):
        open_store(tmp_path / "streams")

    # finite in fp32, too large for bfloat16's last step
    record = {"temporal": np.full((2, 3), np.finfo(np.float32).max, np.float32)}
    encode.check_finite(record, "v", "base", "float32")
    with pytest.raises(UserError, match=r"video 'v'.*\(stream temporal, --dtype=bfloat16\)"):
        encode.check_finite({"temporal": record["temporal"].astype("bfloat16")}, "v", "base", "bfloat16")


@pytest.mark.parametrize(("devices", "frames"), [(1, 4), (1, 101), (4, 40), (4, 101)])
def test_each_device_encodes_as_many_pictures_at_once_as_it_may(devices, frames):
    """A prime number of frames, too, and on many devices as on one."""
    seen = []

    def encoder(pixels):
        seen.append(pixels.shape[0])
        return pixels.mean((1, 2))[:, None]

    base = SimpleNamespace(MEAN=(0.5, 0.5, 0.5), STD=(0.5, 0.25, 0.125), BOTH_DIRECTIONS=False)
    model = VideoLLM(base, SimpleNamespace(grid=(1, 1)), None, encoder=encoder, projectors={}, llm=None)
    pictures = np.random.default_rng(0).integers(0, 256, (8, frames, 2, 2, 3), np.uint8)
    with jax.set_mesh(make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])):
        features = jax.jit(lambda frames: model.encode(frames, jnp.float32))(pictures)
    want = (pictures / 255 - np.array(base.MEAN)) / np.array(base.STD)
    np.testing.assert_allclose(features[:, :, 0], want.mean((2, 3)), atol=1e-6)
    per_device, videos = seen[0] // devices, 8 // devices
    most = min(frames, max(1, IMAGES_PER_DEVICE // videos))
    assert per_device <= max(IMAGES_PER_DEVICE, videos)
    assert -(-frames // (per_device // videos)) == -(-frames // most), "no more steps than the bound asks for"


def test_reading_computing_and_fetching_overlap(stores):
    frames = open_store(stores["llava"])
    batches = list(encode.read_ahead(frames, [3, 0, 2, 1, 4], 2))
    assert [videos for videos, _ in batches] == [[3, 0], [2, 1], [4]]
    for (_, got), want in zip(batches, ([3, 0], [2, 1], [4, -1]), strict=True):
        want = frames.padded(want)
        assert all(np.array_equal(got[name], want[name]) for name in want)
    events = []

    def computed():
        for i in range(3):
            events.append(f"ask for {i}")
            yield i

    for i in encode.one_behind(computed()):
        events.append(f"fetch {i}")
    assert events == ["ask for 0", "ask for 1", "fetch 0", "ask for 2", "fetch 1", "fetch 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--dtype=int8", "argument --dtype: invalid choice: 'int8'"),
        ("--batch_size=none", "expected a positive integer"),
        ("--out=", "--out is needed"),
        ("--data=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(bases, stores, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        encode_store("llava", bases["llava"], stores["llava"], tmp_path / "out", change)
