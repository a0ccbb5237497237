"""Batches of rows with their videos, read by Grain; a batch is a function of its step."""

import contextlib
import functools
import re
import signal
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from data_pipeline.common.errors import UserError
from data_pipeline.common.processes import follow_parent
from data_pipeline.packing import Row, Step
from data_pipeline.store import VideoStore

CHECKED = {"grain": "0.2.18"}  # the version whose message about a dead worker was last read
RowFn = Callable[[Row], dict[str, np.ndarray]]


def batches(
    steps: Sequence[Step],
    row_fn: RowFn,
    store: VideoStore,
    *,
    start_step: int = 0,
    rows_per_step: int,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of steps[start_step:], one dict a step, of R = len(rows) rows.

    rows: the rows to read of each step, among 0 … rows_per_step - 1; by default all.
    row_fn: a row -> its arrays; one of them is "videos", (G,) record indices or -1. It is pickled for the workers.
    Each array of row_fn gets a leading axis R. A step also has the arrays of `store.padded`, by row and group:
      frames      (R, G, T, H, W, 3) uint8, zeros after a video's last frame and in groups without a video;
                  or the streams, (R, G, M, D) each.
      num_frames  (R, G) int32, 0 = no video.
    A step with fewer rows than rows_per_step is filled up with row_fn(()). The content of a row depends neither on the
    other rows that are read nor on the number of workers. Closing the generator ends the workers. Raises UserError
    when a worker is killed.
    """
    rows = range(rows_per_step) if rows is None else rows
    if (most := max(map(len, steps), default=0)) > rows_per_step:
        raise ValueError(f"a step has {most} rows, rows_per_step is {rows_per_step}")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, also when there is no app.run
    load = functools.partial(
        _load,
        steps=steps,
        row_fn=row_fn,
        store=store,
        rows=rows,
    )
    # One thread and one step ahead: a step of frames can take hundreds of megabytes.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    dataset = grain.MapDataset.range(len(steps) * len(rows)).map(load).batch(len(rows))[start_step:]
    dataset = dataset.to_iter_dataset(read)
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    iterator = iter(dataset)
    try:
        with _explained():
            yield from iterator
    finally:
        iterator.close()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns Grain's error about a lost worker into a UserError that names the likely cause."""
    try:
        yield
    except RuntimeError as error:
        if not (found := re.search(r"[Ww]orker process .*exit code (-?\d+)", str(error))):
            raise
        code = int(found[1])
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        # A full /dev/shm, through which workers hand over their batches, is a SIGBUS.
        cause = "the machine's memory or /dev/shm is probably full" if code < 0 else "see above"
        raise UserError(
            f"a process that reads videos {what}: {cause}; lower config.num_workers or free some, then run the same "
            "command again"
        ) from None


def _start_worker(index: int, count: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a machine that is shut down sends it to all, and the parent saves
    follow_parent()


def _load(
    index: int,
    *,
    steps: Sequence[Step],
    row_fn: RowFn,
    store: VideoStore,
    rows: Sequence[int],
) -> dict[str, np.ndarray]:
    """Returns one row's arrays and videos; `index` counts the rows that are read over all steps."""
    step, row = steps[index // len(rows)], rows[index % len(rows)]
    arrays = row_fn(step[row] if row < len(step) else ())
    return {**arrays, **store.padded(arrays["videos"].tolist())}
