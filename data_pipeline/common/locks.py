"""Locks that let one run at a time write an output, and that a dead run never keeps.

A lock is a small file that names its holder. It lies in the folder that is written, or beside a file or folder that
appears by being renamed. On a disk the kernel locks this file as well (flock), and unlocks it when the holder's process
ends for any reason. The holder writes the lock again every BEAT_SECONDS. The lock of a dead process of this machine is
taken over at once; a lock from another machine is taken over after DEAD_SECONDS without a change. So a killed or
preempted run never blocks the next run.

Guarantees:
  * on a local disk, and on a shared disk whose kernel locks reach all hosts (NFS 4, Lustre with -o flock): one run;
  * in a bucket: one run, by preconditions on the lock's generation;
  * on a shared disk without such locks: one run, unless two begin before one host sees the other's file, or two hosts
    have one name;
  * in a place where no lock can be written: none; nothing else can be written there either, and the command says so.
A holder that was suspended until another run took its lock ends with a line.
Of filelock 4.2, FileLock is the kernel's lock alone and SoftFileLease has heartbeats alone; neither knows buckets.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common import gcs
from data_pipeline.common.errors import UserError
from data_pipeline.common.files import as_path, explained, in_bucket

LOCK = ".redvillm-lock"
BEAT_SECONDS, DEAD_SECONDS = 15, 50
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # flock, on disks that have none


class Found(NamedTuple):
    """An existing lock: its text, and the generation of its object in a bucket."""

    text: bytes
    generation: int = 0

    @property
    def holder(self) -> dict[str, Any]:
        """The holder as the text describes it; {} for a text that is not whole."""
        try:
            holder = json.loads(self.text)
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}


@contextlib.contextmanager
def locked(path: str | Path, *, beside: bool = False, share: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Lets one run at a time write the folder `path`. Raises UserError naming the run that is writing it.

    beside: `path` is a file, or a folder that appears by being renamed; its lock lies beside it. share: (i, n) for run
    i of n runs that share the folder; they keep out other runs, and a second run i.
    """
    where = as_path(path) if in_bucket(path) else Path(os.path.realpath(path))  # one lock, whatever links lead there
    own = where.with_name(f".{where.name}{LOCK}") if beside else where / lock_name(*share)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folders(own.parent))
        stack.enter_context(held(own, path))
        if not beside:
            for name in sorted(locks_in(where)):
                if not shares(name, share[1]):
                    with held(where / name, path):
                        pass
        yield


def is_lock(name: str) -> bool:
    """Whether a file of this name is a lock, of a live or a dead run."""
    return name.startswith(LOCK)


def lock_name(number: int, count: int) -> str:
    """The lock of the one run that writes a folder, or of one of several."""
    return LOCK if count == 1 else f"{LOCK}-{number}-of-{count}"


def shares(name: str, count: int) -> bool:
    """Whether a lock is that of one of `count` runs."""
    return name == LOCK if count == 1 else name.endswith(f"-of-{count}")


def locks_in(path: Path) -> list[str]:
    """The names of the locks in a folder."""
    try:
        return [file.name for file in path.iterdir() if is_lock(file.name)]
    except OSError:
        return []


@contextlib.contextmanager
def folders(path: Path) -> Iterator[None]:
    """Makes a local folder and its parents. New folders that are still empty at the end are removed."""
    made = []
    if not in_bucket(path):
        with contextlib.suppress(OSError):
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def held(file: Path, path: Path) -> Iterator[None]:
    """Holds one lock and keeps writing it, which shows that this process lives."""
    lock = (ObjectLock if in_bucket(file) else FileLock)(file)
    over = threading.Event()
    keeper = threading.Thread(target=keep, args=(lock, path, over), daemon=True)
    with contextlib.suppress(OSError), explained(path):  # where no lock can be written, nothing else can
        take(lock, path)
        keeper.start()
    try:
        yield
    finally:
        over.set()
        if keeper.ident is not None:
            keeper.join()
        with contextlib.suppress(Exception):  # a lock that stays is taken over
            lock.release()


def take(lock: "FileLock | ObjectLock", path: Path) -> None:
    """Takes a free lock, or the lock of a dead run. Raises UserError when its holder lives."""
    found = lock.take()
    if found is not None and not is_gone(found.holder):
        if lock.is_certain(found):
            raise in_use(path, found)
        watch(lock, found, path)
    if found is not None and (other := lock.take(over=found)) is not None:
        raise in_use(path, other)


def watch(lock: "FileLock | ObjectLock", found: Found, path: Path) -> None:
    """Waits until the holder of a lock must be dead. Raises UserError as soon as the holder writes the lock."""
    print(f"note: {path}: waits up to {DEAD_SECONDS} s to see whether {who(found)} still writes here", file=sys.stderr)
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(DEAD_SECONDS / 50)
        now = lock.look()
        if now is None:
            return
        if now.text != found.text:
            raise in_use(path, now)


def keep(lock: "FileLock | ObjectLock", path: Path, over: threading.Event) -> None:
    """Writes a lock again and again until `over` is set. Ends this process when another run has taken the lock."""
    while not over.wait(BEAT_SECONDS):
        try:
            ours = lock.beat()
        except Exception:  # the disk or the network is not well: the next beat may come through
            continue
        if not ours:
            lost(path)


def lost(path: Path) -> None:
    """Ends this process: another run writes its output."""
    said = f"error: {path}: another run took the lock after {DEAD_SECONDS} s without a sign of this run: this run ends"
    print(said, file=sys.stderr, flush=True)
    os._exit(2)


def in_use(path: Path, found: Found) -> UserError:
    """Returns the error of a run that finds the lock held."""
    return UserError(f"{path}: {who(found)} is writing here: wait until it ends, or choose another output")


def who(found: Found) -> str:
    """A lock's holder in words."""
    holder = found.holder
    if not holder:
        return "another run"
    return f"another run (process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')})"


@functools.cache
def kernel() -> str:
    """An id of this start of the machine and this container, within which process ids are unique."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder is known to be dead: a process of this kernel that has ended."""
    if holder.get("kernel") != kernel() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


class Text:
    """The text of a lock: its holder, and how often the holder has written it."""

    def __init__(self):
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self.said = {"host": platform.node(), "pid": os.getpid(), "since": since, "kernel": kernel()}
        self.said["id"] = secrets.token_hex(8)  # no two are alike
        self.beats = 0

    def next(self) -> bytes:
        self.beats += 1
        return json.dumps(self.said | {"beats": self.beats}).encode()


class FileLock:
    """A lock on a disk: the kernel's lock, and the text for hosts that the kernel's lock does not reach."""

    def __init__(self, path: Path):
        self.path, self.text, self.file = path, Text(), -1
        self.kept = False  # by the kernel, for another process

    def take(self, over: Found | None = None) -> Found | None:
        """Takes the lock if it is free, or if it is `over`, a dead holder's. Otherwise returns the existing lock."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locks = self.lock(file)
                found = Found(os.pread(file, 4096, 0))
                if not self.is_at_its_path(file):
                    continue  # its holder has just released it
                here = locks and found.holder.get("host") == platform.node()  # a live holder would keep the kernel's
                if not self.kept and (not found.text or here or found == over):
                    self.file, file = file, -1
                    self.beat()
                    return None
                if found != over:
                    return found
                self.path.unlink(missing_ok=True)  # children of a dead run, or a server that waits for a dead host
            finally:
                if file >= 0:
                    os.close(file)

    def lock(self, file: int) -> bool:
        """Asks for the kernel's lock, and notes whether another process has it; False if the disk has none."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.kept = True
        except OSError as error:
            if error.errno not in WITHOUT:
                raise
            self.kept = False
            return False
        else:
            self.kept = False
        return True

    def is_at_its_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def is_certain(self, found: Found) -> bool:
        """Whether the holder certainly lives: this kernel holds its lock and knows its process."""
        return self.kept and found.holder.get("kernel") == kernel()

    def look(self) -> Found | None:
        """The existing lock, None without one."""
        try:
            return Found(self.path.read_bytes())
        except FileNotFoundError:
            return None

    def beat(self) -> bool:
        """Writes the lock again. Returns False when another run has replaced it."""
        if self.path.exists() and not self.is_at_its_path(self.file):
            return False
        text = self.text.next()
        os.pwrite(self.file, text, 0)
        os.ftruncate(self.file, len(text))
        os.fsync(self.file)  # other hosts of a shared disk see it
        return True

    def release(self) -> None:
        """Removes the lock."""
        if self.is_at_its_path(self.file):
            self.path.unlink()
        os.close(self.file)


class ObjectLock:
    """A lock in a bucket: an object that is written only over a known generation."""

    def __init__(self, path: Path):
        self.bucket, _, self.name = str(path).removeprefix("gs://").partition("/")
        self.text, self.held = Text(), Found(b"")

    def take(self, over: Found | None = None) -> Found | None:
        """Takes the lock if it is free, or if it is `over`, a dead holder's. Otherwise returns the existing lock."""
        text = self.text.next()
        if self.write(text, over.generation if over else 0):
            return None
        found = self.look()
        if found is None:
            return self.take()  # its holder has just released it
        if found.text != text:
            return found
        self.held = found  # the answer to our own first try was lost
        return None

    def write(self, text: bytes, generation: int) -> bool:
        """Writes the object if it still has this generation (0: if there is none)."""
        made = gcs.write_over(self.bucket, self.name, text, generation)
        if made is not None:
            self.held = Found(text, made)
        return made is not None

    def is_certain(self, found: Found) -> bool:
        """Whether the holder certainly lives. In a bucket this is unknown until the holder writes again."""
        return False

    def look(self) -> Found | None:
        """The existing lock, None without one."""
        found = gcs.read_object(self.bucket, self.name)
        return None if found is None else Found(*found)

    def beat(self) -> bool:
        """Writes the lock again. Returns False when another run has overwritten it."""
        text = self.text.next()
        if self.write(text, self.held.generation):
            return True
        found = self.look()
        if found is None:  # somebody has deleted it
            return self.write(text, 0)
        if found.text == text:  # the answer to our own first try was lost
            self.held = found
        return found.text == text

    def release(self) -> None:
        """Removes the object if it is still this run's."""
        gcs.delete_object(self.bucket, self.name, self.held.generation)
