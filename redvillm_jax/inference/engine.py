"""Answers questions about videos and pictures in batches; encodes and prefills each video once."""

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.common.errors import UserError
from redvillm_jax.inference import generate
from redvillm_jax.inference.prompts import Prompt, bucket
from redvillm_jax.inference.sampler import Sampling
from redvillm_jax.model.video_llm import VideoLLM
from redvillm_jax.runtime.sharding import num_batch_shards, to_global

LEAST_QUESTION, LEAST_ANSWER = 32, 16  # the smallest buckets, in tokens

IN_PROMPTS = ("seconds", "grid", "size")  # arrays of a video or picture that decide its prompt alone
SUMS = ("sources", "weights")

Arrays = Mapping[str, np.ndarray]
Videos = dict[Hashable, tuple[Arrays, Prompt]]


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings of generation: the fields of `sampler.Sampling`, the longest answer in tokens, and a random seed."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), Integral if field.type is int else Real
            if isinstance(value, bool) or not isinstance(value, kind):
                expected = "a whole number" if kind is Integral else "a number"
                raise UserError(f"{field.name} is {value!r:.80}, expected {expected}")
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < 100, "0 (the most likely token) or more, less than 100"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all tokens) or more, less than 2**31"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < 100, "more than 0 (1: none), less than 100"),
            ("seed", 0 <= self.seed < 2**32, "0 or more, less than 2**32"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def sampling(self) -> Sampling:
        """The fields of `Sampling` as float or int, because another type would compile a program again."""
        numbers = float(self.temperature), int(self.top_k), float(self.top_p), float(self.repetition_penalty)
        return Sampling(*numbers)


class Asked(NamedTuple):
    """A question. video: the key of its video. arrays: of the video, for `Inference.prefill`. number: for its seed."""

    prompt: Prompt
    video: Hashable
    arrays: Arrays
    number: int


class Prefixes(NamedTuple):
    """Keys and values of some videos. rows: the row of each video in the cache, by the key of the video."""

    cache: generate.Cache
    rows: dict[Hashable, int]


class Decoded(NamedTuple):
    """An answer. ids: without the stop token. stopped: there was one. finite: all logits were; else ignore the ids."""

    ids: list[int]
    stopped: bool
    finite: bool


class Inference:
    """The compiled steps of a model: `prefill` videos, `start` rows of questions, `decode` answers.

    A program is compiled once per shape; numbers of rows and lengths are rounded up, so that there are few shapes.
    """

    def __init__(self, model: VideoLLM, mesh: jax.sharding.Mesh, dtype: jnp.dtype, stop_ids: Sequence[int]):
        self.graphdef, self.weights = nnx.split(model)
        self.mesh, self.dtype = mesh, dtype
        self.stop_ids = np.array(stop_ids, np.int32)
        self.vocab_size = model.config.vocab_size
        self.context_class = model.llm.context_class
        # jit caches programs by function: these belong to this object alone
        self._prefill = jax.jit(self._prefill_program)
        self._lay_out = jax.jit(generate.lay_out, static_argnames="num_slots")
        self._place = jax.jit(generate.place, donate_argnums=0)
        self._start = jax.jit(self._start_program, donate_argnums=1, static_argnames="max_new_tokens")
        self._decode = jax.jit(self._decode_program, donate_argnums=1)
        self._keys = jax.jit(
            lambda seed, numbers: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        )

    def _prefill_program(self, weights: Any, videos: Mapping[str, jax.Array], prefixes: Mapping[str, jax.Array]) -> Any:
        model = nnx.merge(self.graphdef, weights)
        if "num_tiles" in videos:
            tokens = model.tile_tokens(videos["pictures"], videos["num_tiles"], self.dtype)
        elif "pictures" in videos:
            tokens = model.picture_tokens(videos["pictures"], self.dtype)
        else:
            tokens = model.video_tokens(videos, self.dtype)
        return generate.prefill(model, tokens, prefixes)

    def _start_program(self, weights: Any, *arguments: Any, max_new_tokens: int) -> generate.Decoding:
        return generate.start(nnx.merge(self.graphdef, weights), *arguments, max_new_tokens=max_new_tokens)

    def _decode_program(self, weights: Any, *arguments: Any) -> generate.Decoding:
        return generate.decode(nnx.merge(self.graphdef, weights), *arguments)

    def prefill(self, videos: Videos, rows: int) -> Prefixes:
        """Encodes at most `rows` videos and computes the keys and values of their prefixes.

        videos: by key, (arrays, prompt). arrays: as for `VideoLLM.video_tokens` or of a picture (`reading.read_media`),
        without a batch axis. prompt: any prompt about the video, of the key's context class.
        """
        arrays, prompts = zip(*videos.values(), strict=True)
        names = [name for name in arrays[0] if name not in IN_PROMPTS]
        stacked = {name: pad_rows([video[name] for video in arrays], rows) for name in names}
        width = prompts[0].width
        prefixes = {
            "token_ids": pad([[token for token, _ in p.prefix] for p in prompts], rows, width, 0),
            "video_slots": pad([[slot for _, slot in p.prefix] for p in prompts], rows, width, -1),
            "length": column([p.prefix_length for p in prompts], rows),
            "context_length": column([p.length for p in prompts], rows),
        }
        if prompts[0].sums is not None:
            sums = zip(*(p.sums for p in prompts), strict=True)
            prefixes |= {name: pad_blocks(part, rows, width) for name, part in zip(SUMS, sums, strict=True)}
        with jax.set_mesh(self.mesh):
            cache = self._prefill(self.weights, to_global(stacked, self.mesh), to_global(prefixes, self.mesh))
        return Prefixes(cache, {key: row for row, key in enumerate(videos)})

    def start(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[Hashable],
        prefixes: Iterable[Prefixes],
        generation: Generation,
        numbers: Sequence[int],
        rows: int,
    ) -> generate.Decoding:
        """Begins at most `rows` answers; unused rows count as stopped.

        keys: of the prompts' videos. prefixes: an iterable, to hold one of them in memory at a time. numbers: one per
        prompt; number and seed decide the random draws of its answer.
        """
        width = bucket(max(len(p.question) for p in prompts), LEAST_QUESTION)
        texts = [p.text_ids for p in prompts]
        before = max(len(text) - len(p.question) for text, p in zip(texts, prompts, strict=True))
        new = bucket(generation.max_new_tokens, LEAST_ANSWER)
        with jax.set_mesh(self.mesh):
            cache = None
            for some in prefixes:
                index = column([some.rows.get(key, -1) for key in keys], rows, -1)
                if cache is None:
                    cache = self._lay_out(some.cache, index, num_slots=prompts[0].width + width + new)
                else:
                    cache = self._place(cache, some.cache, index)
                del some
            questions = {
                "token_ids": pad([p.question for p in prompts], rows, width, 0),
                "length": column([len(p.question) for p in prompts], rows),
                "prefix_length": column([p.prefix_length for p in prompts], rows),
                "text_ids": pad(texts, rows, before + width, self.vocab_size),
            }
            random = self._keys(np.uint32(generation.seed), column(numbers, rows))
            arguments = (generation.sampling, random, self.stop_ids)
            return self._start(self.weights, cache, to_global(questions, self.mesh), *arguments, max_new_tokens=new)

    def decode(self, state: generate.Decoding, generation: Generation, until: int) -> generate.Decoding:
        """Continues until every row has stopped or has `until` tokens. Donates `state`."""
        with jax.set_mesh(self.mesh):
            return self._decode(self.weights, state, generation.sampling, self.stop_ids, np.int32(until))

    def answers(
        self, asked: Iterable[Asked], generation: Generation, *, batch_size: int, video_batch_size: int
    ) -> Iterator[list[tuple[Asked, Decoded]]]:
        """Yields batches of answers in the order of the questions. Adjacent questions about one video share its prefix.

        batch_size: questions decoded at once. video_batch_size: videos encoded at once.
        """
        shards = num_batch_shards(self.mesh)
        rows, video_rows = (-(-size // shards) * shards for size in (batch_size, video_batch_size))
        computed: tuple[Videos | None, Prefixes | None] = None, None

        def prefixes_of(groups: Iterable[Videos]) -> Iterator[Prefixes]:
            nonlocal computed
            for group in groups:
                if computed[0] is not group:
                    computed = None, None  # its memory is needed
                    computed = group, self.prefill(group, video_rows)
                yield computed[1]

        for part, keys, groups in self.batches(asked, rows, video_rows):
            prefixes = prefixes_of({id(group): group for group in groups}.values())
            prompts, numbers = [one.prompt for one in part], [one.number for one in part]
            state = self.start(prompts, keys, prefixes, generation, numbers, rows)
            state = self.decode(state, generation, generation.max_new_tokens)
            yield list(zip(part, self.finished(state, len(part)), strict=True))

    def batches(self, asked: Iterable[Asked], rows: int, video_rows: int) -> Iterator[tuple[tuple, tuple, tuple]]:
        """Yields batches of questions, keys and videos (see `grouped`); a batch has pictures or videos, not both."""

        def shape(one: Asked) -> tuple:
            return one.prompt.width, one.arrays.keys(), one.prompt.sums is None

        for _, alike in itertools.groupby(asked, shape):
            questions = self.grouped(alike, video_rows)
            while batch := list(itertools.islice(questions, rows)):
                yield tuple(zip(*batch, strict=True))

    def grouped(self, asked: Iterable[Asked], video_rows: int) -> Iterator[tuple[Asked, Hashable, Videos]]:
        """Yields each question with the key of its prefix and all videos that are encoded together with its video."""
        videos: Videos = {}
        part: list[tuple[Asked, Hashable]] = []
        for one in asked:
            key = one.video, self.context_class(one.prompt.length)
            if key not in videos and len(videos) == video_rows:
                yield from ((*question, videos) for question in part)
                videos, part = {}, []
            videos.setdefault(key, (one.arrays, one.prompt))
            part.append((one, key))
        yield from ((*question, videos) for question in part)

    def finished(self, state: generate.Decoding, rows: int, first: int = 0) -> list[Decoded]:
        """Returns the answers in the first `rows` rows, from token `first` up to the stop token."""
        ids, finite, step = jax.device_get((state.ids, state.finite, state.step))
        answers = []
        for row, sound in zip(ids[:rows, first:step].tolist(), finite.tolist(), strict=False):
            end = next((i for i, token in enumerate(row) if token in self.stop_ids), len(row))
            answers.append(Decoded(row[:end], end < len(row), sound))
        return answers


def column(values: Sequence[int], rows: int, fill: int = 0) -> np.ndarray:
    """Returns (rows,) int32 that begins with `values` and is filled up."""
    return np.array([*values, *[fill] * (rows - len(values))], np.int32)


def pad(lines: Sequence[Sequence[int]], rows: int, width: int, fill: int) -> np.ndarray:
    """Returns (rows, width) int32; its rows begin with `lines` and are filled up."""
    out = np.full((rows, width), fill, np.int32)
    for row, line in zip(out, lines, strict=False):
        row[: len(line)] = line
    return out


def pad_blocks(blocks: Sequence[np.ndarray], rows: int, width: int) -> np.ndarray:
    """Returns (rows, width, n) of blocks (any, n), filled up with zeros."""
    out = np.zeros((rows, width, blocks[0].shape[1]), blocks[0].dtype)
    for row, block in zip(out, blocks, strict=False):
        row[: len(block)] = block
    return out


def pad_rows(arrays: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Stacks arrays of one shape and adds zeros: (rows, ...)."""
    first = np.asarray(arrays[0])
    out = np.zeros((rows, *first.shape), first.dtype)
    out[: len(arrays)] = arrays
    return out
