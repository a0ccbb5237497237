"""Measures speed and memory of preparing videos and reading batches.

python benchmarks/data.py [--parts=prepare,loader,memory]

prepare: frames a second against PyAV alone on the same generated files, with one worker and with two.
loader:  batches from frames and from streams against the step of a tiny model on this machine, and at the sizes of
         LLaVA-7B against the step that `redvillm_jax.plan` predicts for v5e-16 (docs/performance.md: 433 ms a step, 16
         rows of 2048 tokens; 4 hosts, each reads 4 of the rows).
memory:  of the loader and its workers over many batches.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import av  # noqa: E402
import numpy as np  # noqa: E402
from av.video.reformatter import VideoReformatter  # noqa: E402
from PIL import Image  # noqa: E402

from data_pipeline import prepare, store  # noqa: E402
from data_pipeline.common.cli import Parser  # noqa: E402
from data_pipeline.common.processes import ordered_map  # noqa: E402
from data_pipeline.media.resizing import resize_nearest  # noqa: E402
from data_pipeline.media.sampling import uniform_indices  # noqa: E402
from data_pipeline.packing import Step, fill_row, plan_epoch, row_bounds  # noqa: E402
from redvillm_jax.demo import moving_shapes  # noqa: E402
from redvillm_jax.model.places import VideoPlaces  # noqa: E402
from redvillm_jax.model.settings import model_settings, plain_config  # noqa: E402
from redvillm_jax.training.recipe import recipe_of  # noqa: E402
from redvillm_jax.training.rows import row_settings  # noqa: E402

# Modules that need JAX are imported inside functions, because the workers import this file, too.

SETTINGS = {"kind": "frames", "num_frames": 100, "sampling": "uniform", "image_size": 224, "resize": "nearest"}
JPEG = SETTINGS | {"format": "jpeg", "quality": 95}
VIDEO_TOKENS, WIDTH = (100, 256), 1024  # LLaVA-7B's streams
PARTS = ("prepare", "loader", "memory")


def main() -> None:
    parser = Parser("python benchmarks/data.py", __doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="(all)")
    parser.add_argument("--videos", type=int, default=12, help="generated, for prepare (12)")
    parser.add_argument("--frames", type=int, default=1500, help="of each of them, 320 × 240 (1500: a minute)")
    parser.add_argument("--rounds", type=int, default=3, help="of prepare, the median counts (3)")
    parser.add_argument("--step_ms", type=float, default=433, help="predicted step (433: v5e-16, docs/performance.md)")
    parser.add_argument("--step_rows", type=int, default=16, help="rows of that step (16)")
    parser.add_argument("--hosts", type=int, default=4, help="hosts that read them (4)")
    parser.add_argument("--batches", type=int, default=20_000, help="for memory (20000)")
    flags = parser.parse_args(sys.argv[1:])
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {min(unknown)!r} is none of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="redvillm_data.") as folder:
        work = Path(folder)
        if "prepare" in flags.parts:
            compare_prepare(work / "prepare", flags.videos, flags.frames, flags.rounds)
        if "loader" in flags.parts or "memory" in flags.parts:
            base, stores = make_tiny(work / "tiny")
        if "loader" in flags.parts:
            compare_tiny_step(base, stores)
            compare_predicted_step(work / "large", flags.step_ms / 1000, flags.step_rows, flags.hosts)
        if "memory" in flags.parts:
            watch_memory(base, stores["streams"], flags.batches)


def compare_prepare(folder: Path, videos: int, frames: int, rounds: int) -> None:
    """Prints the rates of decoding alone, of the same work by hand, and of prepare."""
    (folder / "videos").mkdir(parents=True)
    first = folder / "videos" / "v000.mp4"
    write_minute(first, frames)
    for i in range(1, videos):
        os.link(first, folder / "videos" / f"v{i:03d}.mp4")
    write_minute(folder / "videos" / "a.mp4", 2)  # comes first and starts a worker before the clock does
    write_minute(folder / "videos" / "b.mp4", 2)
    source = {"video": "v", "source": first.name, "bytes": 0}
    by_one: dict[str, Callable[[], object]] = {  # of these the processor's time counts, whatever else the machine does
        "PyAV, decoding alone": lambda: by_hand(first, 0),
        "PyAV, 100 frames as JPEG": lambda: by_hand(first, 100),
        "prepare": lambda: prepare.encode_video(source, str(first.parent), JPEG),
    }
    used = {name: [] for name in by_one}
    spent = {workers: [] for workers in (1, 2)}
    for i in range(rounds):
        for name, work in by_one.items():
            start = time.process_time()
            work()
            used[name].append(time.process_time() - start)
        for workers in spent:
            spent[workers].append(time_prepare(folder, f"{workers}-{i}", videos, workers))
    print(f"\n{videos} videos of {frames} frames, 320 × 240, H.264, 100 frames of each kept; median of {rounds} rounds")
    rates = {name: frames / median(values) for name, values in used.items()}
    for name, rate in rates.items():
        ratio = rates["prepare"] / rate
        print(
            f"  {name:26} {rate:7.0f} frames per second of a core"
            + (f"; prepare / it {ratio:.2f}" if ratio != 1 else "")
        )
    for workers, values in spent.items():
        print(f"  prepare, {workers} workers, shards included {videos * frames / median(values):7.0f} frames a second")
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"  two workers / one: {median(spent[1]) / median(spent[2]):.2f} ({load})")


def write_minute(path: Path, frames: int) -> None:
    """A pattern that moves, with some noise, at 25 frames a second."""
    rng = np.random.default_rng(0)
    pattern = np.kron(rng.integers(0, 256, (60, 80, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noise = rng.integers(0, 12, (4, 240, 320, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(frames):
            y, x = i % 240, 2 * i % 320
            image = pattern[y : y + 240, x : x + 320] // 2 + noise[i % 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def by_hand(path: Path, keep: int) -> None:
    """Decodes a file on one thread in the plainest loop; `keep` frames become JPEG as prepare makes them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(uniform_indices(stream.frames, keep).tolist()) if keep else set()
        to_rgb = VideoReformatter()
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                image = resize_nearest(to_rgb.reformat(frame, format="rgb24").to_ndarray(), 224)
                Image.fromarray(image).save(os.devnull, "JPEG", quality=95, subsampling=0)


def time_prepare(folder: Path, out: str, videos: int, workers: int) -> float:
    """Seconds from when the workers have started until all shards are written."""
    names = ["a", "b", *(f"v{i:03d}" for i in range(videos))]
    sources = [{"video": name, "source": f"{name}.mp4", "bytes": 0} for name in names]
    work = functools.partial(prepare.encode_video, root=str(folder / "videos"), settings=JPEG)
    start = 0.0

    def encode(missing: list[store.Source]) -> Iterator[store.Result]:
        nonlocal start
        warm = ordered_map(work, missing, workers, time_limit=600, failed=functools.partial(prepare.lost, folder))
        for i, result in enumerate(warm):
            start = start or time.perf_counter() * (i == 1)
            yield result

    store.write_shards(folder / out, JPEG, sources, encode)
    return time.perf_counter() - start


def make_tiny(folder: Path) -> tuple[Any, dict[str, Path]]:
    """The demo's tiny LLaVA, and generated videos as frames and as streams."""
    from conversion import from_torch
    from redvillm_jax import encode
    from redvillm_jax.model.base_folder import open_base

    moving_shapes.main([f"--out={folder}", "--train=24", "--dev=1", "--test=1"])
    source = ROOT / "redvillm_jax" / "demo" / "bases" / "llava"
    from_torch.main(["--family=llava", f"--source={source}", f"--out={folder / 'base'}"])
    stores = {kind: folder / kind for kind in ("frames", "streams")}
    data = (f"--videos={folder / 'train' / 'videos'}", f"--instructions={folder / 'train' / 'instructions.jsonl'}")
    prepare.main([*data, f"--base={folder / 'base'}", "--num_frames=16", f"--out={stores['frames']}"])
    config = (f"--config={ROOT / 'configs' / 'demo.py'}:llava", f"--config.base={folder / 'base'}")
    encode.main([*config, f"--data={stores['frames']}", f"--out={stores['streams']}"])
    return open_base(folder / "base"), stores


def tiny_plan(base: Any, videos: store.VideoStore) -> tuple[dict[str, Any], Any]:
    """The demo's config and its plan of rows, of as many steps as 60 epochs have."""
    from configs import demo
    from redvillm_jax.training.rows import plan_rows

    config = plain_config(demo.get_config("llava")) | {"base": str(base.path), "num_epochs": 60}
    places, tokenizer = VideoPlaces(base, model_settings(config)), base.module.Tokenizer(base.path)
    return config, plan_rows(row_settings(config), base, videos, tokenizer, places)


def compare_tiny_step(base: Any, stores: dict[str, Path]) -> None:
    """Prints examples a second of the loader and of the train step, for both kinds of store."""
    import jax
    import jax.numpy as jnp

    from data_pipeline.pipeline import batches
    from redvillm_jax.model.build import load_model
    from redvillm_jax.model.settings import needed_parts
    from redvillm_jax.runtime.sharding import make_mesh, to_global
    from redvillm_jax.training.recipe import make_training

    print("\ntiny LLaVA on this machine's CPU, 80 questions a step; examples a second")
    for kind, path in stores.items():
        videos = store.open_store(path)
        config, plan = tiny_plan(base, videos)
        rows = plan.bounds.rows_per_step
        read = functools.partial(batches, plan.steps, plan.row_fn, videos, rows_per_step=rows)
        loader = {workers: rate(read(num_workers=workers), plan.steps) for workers in (0, 2)}
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        with jax.set_mesh(mesh):
            model = load_model(base, model_settings(config), mesh, dtype=jnp.float32, parts=needed_parts(videos))
            sizes = {"num_steps": len(plan.steps), "row_length": plan.slots_per_row}
            training = make_training(recipe_of(config), base, model_settings(config), model, mesh, **sizes)
            batch, state = to_global(next(read()), mesh), training.state
            stepped = rate(train(training, state, batch), plan.steps)
        print(
            f"  from {kind:8} loader {loader[0]:7.0f} in this process, {loader[2]:7.0f} with 2 workers; "
            f"train step {stepped:7.0f}; loader / step {loader[0] / stepped:.2f}, {loader[2] / stepped:.2f}"
        )


def train(training, state, batch) -> Iterator[None]:
    """Steps on one batch, each waited for."""
    import jax

    trainable, optimizer = state["trainable"], state["optimizer"]
    while True:
        trainable, optimizer, values = training.step(trainable, optimizer, training.frozen, batch)
        jax.block_until_ready(values)
        yield


def rate(iterator: Iterator, steps: Sequence[Step], *, least: float = 3.0) -> float:
    """Questions a second, once the first three steps have passed."""
    questions, start = 0, 0.0
    for i, _ in enumerate(iterator):
        if i == 3:
            start = time.perf_counter()
        if i > 3:
            questions += sum(len(group) for row in steps[i] for _, group in row)
            if time.perf_counter() - start > least or i == len(steps) - 1:
                break
    spent = time.perf_counter() - start
    iterator.close()
    return questions / spent


def compare_predicted_step(folder: Path, step_seconds: float, step_rows: int, hosts: int) -> None:
    """Prints the rows a second that one of several hosts needs at the 7B sizes, and the rows that this loader reads."""
    from data_pipeline.pipeline import batches
    from redvillm_jax.planning.workload import paper_lengths
    from redvillm_jax.training.rows import pad_row

    question_videos, prefixes, questions = paper_lengths(sum(VIDEO_TOKENS))
    count = 64
    question_videos = question_videos % count  # few videos on the disk; each row asks about as many as ever
    steps = plan_epoch(
        question_videos,
        [len(prefix.ids) for prefix in prefixes[:count]],
        [len(question.ids) for question in questions],
        row_length=2048,
        batch_questions=10 * step_rows,
        pack=True,
        seed=0,
        epoch=0,
    )
    bounds = row_bounds(steps, prefixes, questions)
    rows = -(-bounds.rows_per_step // hosts) * hosts
    row_fn = functools.partial(
        fill_row,
        prefixes=prefixes[:count],
        questions=questions,
        row_length=pad_row(bounds.slots_per_row),
        max_groups=bounds.groups_per_row,
        max_targets=bounds.targets_per_row,
        tokens_per_video=sum(VIDEO_TOKENS),
    )
    needed = step_rows / hosts / step_seconds
    print(
        f"\nLLaVA-7B's sizes, rows of 2048 with up to {bounds.groups_per_row} videos; a host of {hosts} must read "
        f"{needed:.1f} rows a second ({step_rows} rows a step of {1000 * step_seconds:.0f} ms)"
    )
    for kind, make in {"frames": write_frames, "streams": write_streams}.items():
        videos = make(folder / kind, count)
        for workers in (0, 2):
            mine = range(rows // hosts)
            read = batches(steps, row_fn, videos, rows_per_step=rows, rows=mine, num_workers=workers)
            examples = rate(read, steps)
            per_step = len(questions) / len(steps)
            got = examples / per_step * rows / hosts  # rows a second of this host
            print(
                f"  from {kind:8} {workers} workers: {got:7.1f} rows a second, {got / needed:6.2f} × what is needed "
                f"({examples:.0f} examples a second for all hosts)"
            )


def write_frames(path: Path, count: int) -> store.VideoStore:
    """Records of 100 JPEG frames of 224 × 224, about as many bytes as photographs have."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (100, 28, 28, 3), np.uint8)
    frames = np.stack(
        [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in coarse]
    )
    record = {"frames": store.encode_frames(frames, "jpeg", 95), "timestamps": np.arange(100, dtype=np.float32)}
    return write_store(path, JPEG, record, count)


def write_streams(path: Path, count: int) -> store.VideoStore:
    """Records of the pooled streams in bfloat16."""
    shapes = {name: [length, WIDTH] for name, length in zip(("temporal", "spatial"), VIDEO_TOKENS, strict=True)}
    rng = np.random.default_rng(0)
    record = {name: rng.standard_normal(shape, np.float32).astype("bfloat16") for name, shape in shapes.items()}
    return write_store(path, SETTINGS | {"kind": "streams", "dtype": "bfloat16", "streams": shapes}, record, count)


def write_store(path: Path, settings: dict, record: dict, count: int) -> store.VideoStore:
    """A store with one record many times."""
    sources = [{"video": str(i), "source": str(i), "bytes": 0} for i in range(count)]
    results = ({"line": {"video": str(i), "num_frames": 100}, "record": record} for i in range(count))
    shards = store.write_shards(path, settings, sources, lambda _: results)
    store.finish_store(path, settings, shards, [], {})
    return store.open_store(path)


def watch_memory(base: Any, path: Path, count: int) -> None:
    """Prints the resident memory of the loader's processes at intervals."""
    from data_pipeline.pipeline import batches

    videos = store.open_store(path)
    _, plan = tiny_plan(base, videos)
    steps = (plan.steps * -(-count // len(plan.steps)))[:count]
    print(f"\nmemory of the loader over {count} batches of streams, MiB after every tenth: this process + its workers")
    for workers in (0, 2):
        read = batches(steps, plan.row_fn, videos, rows_per_step=plan.bounds.rows_per_step, num_workers=workers)
        seen = []
        for i, _ in enumerate(read, start=1):
            if i % max(1, count // 10) == 0:
                seen.append(resident())
        sums = [own + others for own, others in seen]
        shown = ", ".join(f"{own:.0f}+{others:.0f}" for own, others in seen)
        print(f"  {workers} workers: {shown}; from the second to the last {sums[-1] - sums[1]:+.1f} MiB")


def resident() -> tuple[float, float]:
    """Resident memory of this process and of its children, MiB."""
    own = os.getpid()
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it has ended
        parents[int(fields["Pid"])] = int(fields["PPid"]), int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
    return parents[own][1], sum(size for parent, size in parents.values() if parent == own)


if __name__ == "__main__":
    main()
