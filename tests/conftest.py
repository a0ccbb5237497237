"""Fixtures: folders of random tiny bases, and a few generated videos prepared for each."""

import os
import signal
import tempfile

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs and their children
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # otherwise the TPU compiler, which tests use, looks for a TPU
# Compiling takes most of the time of tests this small, and LLVM's optimisations, which change the last bits of results
# alone, most of that. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests, the processes that they start and the workers of xdist compile the same programs: one cache for all.
CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="redvillm_jax-")
if CACHE is not None:
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ["REDVILLM_CACHE"] = f"{CACHE}/redvillm_jax"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

import contextlib  # noqa: E402
import fcntl  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from conversion import from_torch  # noqa: E402
from data_pipeline import prepare  # noqa: E402
from redvillm_jax.demo import moving_shapes  # noqa: E402
from tests.tiny_bases import WRITERS, write_published  # noqa: E402


def pytest_unconfigure() -> None:
    if CACHE is not None:
        shutil.rmtree(CACHE, ignore_errors=True)


ORDINARY = ("llava", "gemma3")  # two unlike families stand for the rest
EVERY_FAMILY = tuple(WRITERS)  # for what each family must show
FAMILIES = tuple(name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow) for name in EVERY_FAMILY)
NUM_FRAMES = 4


class Folders(Mapping[str, Path]):
    """Folders by family. A folder is made when a test first asks for it, once for all workers of xdist."""

    def __init__(self, root: Path, make: Callable[[str, Path], None]):
        self.root, self.make = root, make

    def __getitem__(self, family: str) -> Path:
        folder = self.root / family
        with alone(folder) as is_made:
            if not is_made:
                self.make(family, folder)
        return folder

    def __iter__(self) -> Iterator[str]:
        return iter(EVERY_FAMILY)

    def __len__(self) -> int:
        return len(EVERY_FAMILY)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Lets one worker at a time make a folder; gives whether it is made already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.made").open("a+") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        mark.seek(0)
        yield bool(mark.read())
        mark.write("made")


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
    """A folder of this test run, which the workers of xdist share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"


@pytest.fixture(scope="session")
def downloads(common) -> Folders:
    """The tiny published folder of each family, as a download brings it."""
    return Folders(common / "downloads", write_published)


@pytest.fixture(scope="session")
def bases(common, downloads) -> Folders:
    """The tiny base folder of each family, written by conversion.from_torch."""

    def make(family: str, folder: Path) -> None:
        from_torch.main([f"--family={family}", f"--source={downloads[family]}", f"--out={folder}"])

    return Folders(common / "bases", make)


@pytest.fixture(scope="session")
def videos(common) -> Path:
    """Twelve generated videos with their instructions: a folder with videos/ and instructions.jsonl."""
    out = common / "shapes"
    with alone(out) as is_made:
        if not is_made:
            moving_shapes.main([f"--out={out}", "--train=12", "--dev=1", "--test=1", "--num_workers=1"])
    return out / "train"


@pytest.fixture(scope="session")
def stores(common, bases, videos) -> Folders:
    """A frame store of the videos for each family's base, four frames each."""

    def make(family: str, folder: Path) -> None:
        arguments = [f"--videos={videos / 'videos'}", f"--instructions={videos / 'instructions.jsonl'}"]
        arguments += [f"--base={bases[family]}", f"--out={folder}", f"--num_frames={NUM_FRAMES}", "--num_workers=1"]
        prepare.main(arguments)

    return Folders(common / "stores", make)


@pytest.fixture
def fresh(tmp_path) -> Path:
    """An empty run directory."""
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    return tmp_path / "run"
