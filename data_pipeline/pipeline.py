"""Batches of rows with their frames, as a function of the step: Grain over (step, row)."""

import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from data_pipeline.errors import UserError
from data_pipeline.packing import Row, Step
from data_pipeline.processes import follow_parent
from data_pipeline.store import FrameStore

RowFn = Callable[[Row], dict[str, np.ndarray]]


def batches(
    steps: Sequence[Step],
    row_fn: RowFn,
    frame_store: FrameStore,
    *,
    start_step: int = 0,
    rows_per_step: int,
    frames_shape: tuple[int, int, int, int],
    num_workers: int = 0,
    host_index: int = 0,
    host_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of steps[start_step:], one dict a step, of R = rows_per_step / host_count rows.

    row_fn: a row -> its arrays, "videos" (G,) record index or -1 among them; it is pickled for the workers.
    frames_shape: (T, H, W, 3). Each array of row_fn gets a leading axis R, and there are two more:
      frames      (R, G, T, H, W, 3) uint8, zeros where a video has fewer than T frames or there is none.
      num_frames  (R, G) int32, 0 = no video.
    A step with fewer rows is filled up with row_fn(()). Hosts take consecutive slices of each step's rows, so
    that their concatenation is one host's batch; the same batches come for any number of workers. Closing the
    generator ends the workers.
    """
    if rows_per_step % host_count:
        raise ValueError(f"{rows_per_step} rows per step do not divide over {host_count} hosts")
    if (most := max(map(len, steps), default=0)) > rows_per_step:
        raise ValueError(f"a step has {most} rows, rows_per_step is {rows_per_step}")
    rows = rows_per_step // host_count
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, also when there is no app.run
    load = functools.partial(
        _load,
        steps=steps,
        row_fn=row_fn,
        frame_store=frame_store,
        rows=rows,
        first_row=host_index * rows,
        frames_shape=frames_shape,
    )
    # One thread and one step ahead: a step of frames can take hundreds of megabytes.
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    dataset = grain.MapDataset.range(len(steps) * rows).map(load).batch(rows)[start_step:].to_iter_dataset(read)
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    follow_parent()


def _load(
    index: int,
    *,
    steps: Sequence[Step],
    row_fn: RowFn,
    frame_store: FrameStore,
    rows: int,
    first_row: int,
    frames_shape: tuple[int, int, int, int],
) -> dict[str, np.ndarray]:
    """Returns one row's arrays and frames; `index` counts this host's rows over all steps."""
    step, row = steps[index // rows], first_row + index % rows
    arrays = row_fn(step[row] if row < len(step) else ())
    videos = arrays["videos"]
    frames = np.zeros((len(videos), *frames_shape), np.uint8)
    num_frames = np.zeros(len(videos), np.int32)
    for group, video in enumerate(videos.tolist()):
        if video >= 0:
            found = frame_store[video]["frames"]
            if len(found) > frames_shape[0] or found.shape[1:] != frames_shape[1:]:
                raise UserError(
                    f"video {video} of {frame_store.path} has frames {found.shape}, the model takes {frames_shape}: "
                    "prepare the videos again with the model's --num_frames and --base"
                )
            frames[group, : len(found)] = found
            num_frames[group] = len(found)
    return {**arrays, "frames": frames, "num_frames": num_frames}
