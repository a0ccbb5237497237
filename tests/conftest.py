"""Fixtures: folders of random tiny bases, and a few generated videos prepared for each."""

import os
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs and their children
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # otherwise the TPU compiler, which tests use, looks for a TPU
# Tests, the processes that they start and the workers of xdist compile the same programs: one cache for all.
CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="redvillm_jax-")
if CACHE is not None:
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    os.environ["REDVILLM_CACHE"] = f"{CACHE}/redvillm_jax"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from conversion import from_torch  # noqa: E402
from data_pipeline import prepare  # noqa: E402
from redvillm_jax.bases.contract import known_families, load_family  # noqa: E402
from redvillm_jax.demo import moving_shapes  # noqa: E402
from redvillm_jax.demo.pretrain import write_text_files  # noqa: E402
from redvillm_jax.model.weights import random_parts, tensors_of  # noqa: E402
from tests import toy_base  # noqa: E402


def pytest_unconfigure() -> None:
    if CACHE is not None:
        shutil.rmtree(CACHE, ignore_errors=True)


TOY = "tests.toy_base"  # a base from outside; no file of the product names it
FAMILIES = (*known_families(), TOY)
NUM_FRAMES = 4


def published_files(family: str, folder: Path) -> dict:
    """Writes config.json and the tokenizer's files of a tiny model; returns the config."""
    return toy_base.write_text_files(folder) if family == TOY else write_text_files(family, folder)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A tiny base folder with random weights for each family, written by conversion.from_torch."""
    folders = {}
    for family in FAMILIES:
        source, out = tmp_path_factory.mktemp(f"{family}_published"), tmp_path_factory.mktemp(family) / "base"
        base = load_family(family)
        config = base.Config.from_published(published_files(family, source))
        tensors = tensors_of(base, config, random_parts(base, config))
        tensors = toy_base.published_names(tensors) if family == TOY else tensors
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        from_torch.main([f"--family={family}", f"--source={source}", f"--out={out}"])
        folders[family] = out
    return folders


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Twelve generated videos with their instructions: a folder with videos/ and instructions.jsonl."""
    out = tmp_path_factory.mktemp("shapes")
    moving_shapes.main([f"--out={out}", "--train=12", "--dev=1", "--test=1", "--num_workers=1"])
    return out / "train"


@pytest.fixture(scope="session")
def stores(tmp_path_factory, bases, videos) -> dict[str, Path]:
    """A frame store of the videos for each base, four frames each."""
    folders = {}
    for family, base in bases.items():
        out = tmp_path_factory.mktemp(f"{family}_frames") / "store"
        arguments = [f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}"]
        prepare.main([*arguments, f"--base={base}", f"--out={out}", f"--num_frames={NUM_FRAMES}", "--num_workers=1"])
        folders[family] = out
    return folders


@pytest.fixture
def fresh(tmp_path) -> Path:
    """An empty run directory."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    return tmp_path / "run"
