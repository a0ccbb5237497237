"""Helpers of several tests: change stores and files, fill modules with tensors, compare with references."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import demo
from data_pipeline.store import Shards, VideoStore, finish_store, open_store
from redvillm_jax.inference import generate
from redvillm_jax.inference.sampler import Sampling
from redvillm_jax.model import weights
from redvillm_jax.model.base_folder import Base
from redvillm_jax.model.places import VideoPlaces
from redvillm_jax.model.settings import model_settings, plain_config
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.training.rows import RowPlan, plan_rows, row_settings

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"


def change_store(path: Path, drop_questions: int = 0, **settings: Any) -> None:
    """Changes a store of one shard as if it was made with other settings, or without its last questions."""
    store = open_store(path)
    part = json.loads(next(path.glob("parts/*-of-*.json")).read_text())
    shards = Shards(store.videos, [], [], missing=0, total=1, parts={"00000-of-00001": part})
    questions = store.instructions[: len(store.instructions) - drop_questions]
    made = {name: value for name, value in store.meta.items() if name != "fingerprint"} | settings
    finish_store(path, made, shards, questions, {})


def fill(module: nnx.Module, tensors: Mapping[str, np.ndarray], prefix: str, dtype=jnp.float32) -> nnx.Module:
    """Fills a module, of arrays or shapes, with `tensors` by canonical name, cast to `dtype`."""
    layers: dict[tuple, list[np.ndarray]] = {}
    stacked = {}
    for name, leaf in weights.name_table(module, prefix).items():
        assert tensors[name].shape == leaf.shape, f"{name}: {tensors[name].shape}, expected {leaf.shape}"
        layers.setdefault(leaf.path, []).append(tensors[name])
        stacked[leaf.path] = leaf.layer is not None
    arrays = {path: np.stack(found) if stacked[path] else found[0] for path, found in layers.items()}
    return weights.fill(module, lambda path, leaf: jnp.asarray(arrays[path], dtype))


def torch_tensors(*files: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of .bin files as fp32 numpy arrays."""
    import torch

    loaded = [torch.load(file, weights_only=True, map_location="cpu") for file in files]
    return {name: tensor.float().numpy() for tensors in loaded for name, tensor in tensors.items()}


def greedy(llm: nnx.Module, embeds: jax.Array, last_id: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Generates ids (1, steps) after embeds (1, S, K); returns them and the first layer's keys of the prompt.

    All tokens except the last take the place of a video; `last_id`, the last one, is the question.
    """
    length = embeds.shape[1]

    @jax.jit
    def run(llm: nnx.Module, embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = SimpleNamespace(llm=llm, config=SimpleNamespace(window=None), both_directions=False)
        model.embed, model.masks = (functools.partial(f, model) for f in (VideoLLM.embed, VideoLLM.masks))
        slots = jnp.arange(length - 1)[None]
        prefix = {"token_ids": 0 * slots, "video_slots": slots, "length": jnp.array([length - 1])}
        cache = generate.prefill(model, embeds, prefix | {"context_length": jnp.array([length])})
        cache = generate.lay_out(cache, jnp.array([0]), length + steps)
        question = {"token_ids": jnp.array([[last_id]]), "length": jnp.array([1]), "prefix_length": prefix["length"]}
        arguments = (question | {"text_ids": question["token_ids"]}, Sampling(), jax.random.split(jax.random.key(0), 1))
        rows = generate.start(model, cache, *arguments, jnp.array([-1]), max_new_tokens=steps)
        rows = generate.decode(model, rows, Sampling(), jnp.array([-1]), steps)
        return rows.ids, jnp.moveaxis(rows.cache[0][0][..., :length], -1, 1)

    ids, keys = run(llm, embeds)
    return np.asarray(ids), np.asarray(keys)


def without_hashes(folder: Path, mark: str = "base.json") -> Path:
    """Removes the hashes of a base or export, so that a test may change its files; returns the folder."""
    change_json(folder / mark, lambda meta: meta.pop("files"))
    return folder


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    """Changes a JSON object that the project has written, and removes its checksum."""
    said = json.loads(file.read_text())
    change(said)
    said.pop("checksum", None)
    file.write_text(json.dumps(said))


def change_tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes a tensor in a base's only safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(family: str, video: str) -> dict:
    """Returns the demo's config for a representation."""
    config = demo.get_config(family)
    config.video = video
    return plain_config(config)


def plan_of(config: Mapping[str, Any], base: Base, store: VideoStore) -> RowPlan:
    """Plans the rows of a complete config."""
    places = VideoPlaces(base, model_settings(config))
    return plan_rows(row_settings(config), base, store, base.module.Tokenizer(base.path), places)


class ParityTable:
    """Collects the largest difference of every array from its reference; `write` saves it as text.

    `write` acts only when the environment variable PARITY_TABLE names a folder; the file is `<name>_parity.txt`.
    """

    def __init__(self, name: str):
        self.name = name
        self.rows: list[tuple[str, str, float, float]] = []

    def add(self, array: str, got: np.ndarray, want: np.ndarray, *, atol: float = 1e-4) -> None:
        """Adds the largest absolute difference; integers and booleans must be equal."""
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, f"{array}: {got.shape}, expected {want.shape}"
        if want.dtype.kind in "iub":
            self.rows.append((array, "unequal", float(np.sum(got != want)), 0.0))
        else:
            difference = np.max(np.abs(got.astype(np.float64) - want), initial=0.0)
            self.rows.append((array, "max |a-b|", float(difference), atol))

    def add_gradient(self, array: str, got: np.ndarray, want: np.ndarray, *, rtol: float = 1e-3) -> None:
        """Adds the norm of the difference, relative to the reference's norm."""
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, f"{array}: {got.shape}, expected {want.shape}"
        difference = np.linalg.norm(got - want) / np.linalg.norm(want)
        self.rows.append((array, "|a-b| / |b|", float(difference), rtol))

    def check(self) -> None:
        """Fails with all rows that are above their tolerance, or NaN."""
        bad = [self.line(row) for row in self.rows if not row[2] <= row[3]]
        assert not bad, "\n" + "\n".join(bad)

    def write(self) -> None:
        folder = os.environ.get("PARITY_TABLE")
        if folder:
            Path(folder, f"{self.name}_parity.txt").write_text("".join(self.line(row) + "\n" for row in self.rows))

    @staticmethod
    def line(row: tuple[str, str, float, float]) -> str:
        return f"{row[0]:45} {row[1]:12} {row[2]:10.3g}   (limit {row[3]:g})"
