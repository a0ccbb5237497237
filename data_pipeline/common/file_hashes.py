"""The hashes of a folder's files, checked once and remembered.

The result is remembered in the user's cache folder by the file's path, size and modification time, so that a large
base is read as a whole only once. Damage that changes neither size nor time is found by `--check_files`, which reads
every file again.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import cache_folder, write_text

CHUNK = 8 * 2**20
THREADS = 4  # reading at once
FLAG = "--check_files"
HELP = "read all files of a base and compare their hashes, also if that was done before"

always = False  # whether this process was told --check_files


def hash_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The SHA-256, by name, of files below a folder (default: all files), several read at once."""
    names = (
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if names is None
        else names
    )
    sizes = {name: (folder / name).stat().st_size for name in names}
    options = {"unit": "B", "unit_scale": True, "delay": 1, "dynamic_ncols": True}
    with (
        tqdm(total=sum(sizes.values()), desc=f"hash {folder.name}", **options) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def one(name: str) -> str:
            digest = hashlib.sha256()  # hashlib.file_digest would not move the bar
            with (folder / name).open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            return digest.hexdigest()

        return dict(zip(sizes, pool.map(one, sizes), strict=True))


def check_files(folder: Path, hashes: Mapping[str, str] | None, remedy: str) -> None:
    """Raises UserError unless every file of `hashes` is there and has its hash; `remedy` says what to do.

    A folder without hashes (None), of an earlier version, passes unless --check_files is set.
    """
    if hashes is None:
        if always:
            raise UserError(f"{folder}: was made without hashes of its files, {FLAG} has nothing to compare; {remedy}")
        return
    if not isinstance(hashes, dict) or not all(isinstance(name, str) for name in (*hashes, *hashes.values())):
        raise UserError(f"{folder}: the hashes of its files are no hashes; {remedy}")
    stats = {}
    for name in hashes:
        try:
            stats[name] = (folder / name).stat()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; {remedy}") from None
        if not stat.S_ISREG(stats[name].st_mode):
            raise UserError(f"{folder / name}: is not a file; {remedy}")
    now = {name: [found.st_size, found.st_mtime_ns, hashes[name]] for name, found in stats.items()}
    memory = memory_of(folder)
    known = {} if always else recall(memory)
    unknown = [name for name, what in now.items() if known.get(name) != what]
    if not unknown:
        return
    try:
        found = hash_files(folder, unknown)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {remedy}") from None
    if damaged := [name for name in unknown if found[name] != hashes[name]]:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise UserError(f"{folder / damaged[0]}: is not as it was when the folder was made{more}; {remedy}")
    remember(memory, now)


def memory_of(folder: Path) -> Path:
    """The file that remembers the checked hashes of a folder."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_folder() / "checked" / f"{name}.json"


def recall(memory: Path) -> dict[str, list]:
    """The remembered hashes, {} when the file cannot be read."""
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(memory: Path, found: Mapping[str, list]) -> None:
    """Remembers checked hashes. When the cache cannot be written, the next check reads the files again."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(memory, json.dumps(found) + "\n")
    except OSError:
        pass
