"""The stream cache: trains as frames do, without the encoder, and is refused when it is stale."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FAMILIES, NUM_FRAMES
from helpers import change_store
from test_train import losses, make_config

from data_pipeline.errors import UserError
from data_pipeline.store import open_store
from redvillm_jax import assemble, encode, train

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
ONE = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}


def encode_store(family: str, base: Path, frames: Path, out: Path, *more: str) -> None:
    config = [f"--config={DEMO}:{family}", f"--config.base={base}", f"--config.num_frames={NUM_FRAMES}"]
    encode.main([*config, f"--data={frames}", f"--out={out}", *more])


@pytest.fixture(scope="module")
def streams(tmp_path_factory, bases, stores) -> dict[str, Path]:
    """fp32 streams of each family's store."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(f"{family}_streams") / "store"
        encode_store(family, bases[family], stores[family], folders[family], "--dtype=float32", "--batch_size=5")
    return folders


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
    load_part = assemble.load_part
    monkeypatch.setattr(
        assemble, "load_part", lambda base, part, **kw: loaded.append(part) or load_part(base, part, **kw)
    )
    train.train(make_config("llava", bases["llava"], streams["llava"]), tmp_path)
    assert set(loaded) == {"projector", "llm"}


def test_a_stale_cache_is_refused_and_says_what_differs(bases, streams, tmp_path):
    config = make_config("llava", bases["llava"], streams["llava"])
    other = tmp_path / "base"
    shutil.copytree(bases["llava"], other)
    meta = json.loads((other / "base.json").read_text()) | {"fingerprint": "0" * 64}
    (other / "base.json").write_text(json.dumps(meta))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--dtype=int8", "expected bfloat16 or float32"),
        ("--batch_size=none", "expected a positive integer"),
        ("--out=", "--out is needed"),
        ("--data=/nowhere", "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(bases, stores, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        encode_store("llava", bases["llava"], stores["llava"], tmp_path / "out", change)
