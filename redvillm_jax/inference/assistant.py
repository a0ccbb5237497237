"""Asks a model about videos and pictures from Python, with `redvillm_jax.load`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from data_pipeline.common.errors import UserError
from data_pipeline.media.pictures import picture_size
from data_pipeline.media.reading import Clip, Picture, Reading, read_media
from data_pipeline.media.tiles import tile_grid
from redvillm_jax.inference.engine import Arrays, Generation, Inference, Prefixes
from redvillm_jax.inference.open_model import OpenedModel, open_model
from redvillm_jax.inference.prompts import Prompt, bucket, check_length, make_picture_prompt, make_prompt, stepped
from redvillm_jax.inference.streaming import pieces
from redvillm_jax.model.build import load_model, put_trained
from redvillm_jax.model.places import VideoPlaces, num_picture_tokens
from redvillm_jax.model.settings import plain_config
from redvillm_jax.model.weights import PARTS
from redvillm_jax.modules.bounds import whole
from redvillm_jax.modules.picture_places import Places
from redvillm_jax.runtime.chips import quiet_without_tpu
from redvillm_jax.runtime.sharding import make_mesh, num_batch_shards
from redvillm_jax.video.contract import image_projector

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = whole(1, 2**20)
LONGEST_SECONDS = 36000.0  # sizes the text between a video's tokens; a longer video compiles again
TOKENS_AT_ONCE = 4  # while streaming; each call takes some milliseconds besides its tokens
REMEMBERED = 4  # videos whose keys and values are kept for further questions


def load(
    model: str | Path,
    *,
    base: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    tensor: int = 1,
) -> "Assistant":
    """Opens a run, an export or a base folder, and puts the model on the machine's devices.

    config: for an untrained model, which has none of its own. base: the base folder of an export that holds projectors
    alone, or of a run whose base has moved. dtype: of the frozen weights and the computation, bfloat16, float16 or
    float32; the config's by default. tensor: the number of devices that share one copy of the model; other devices hold
    further copies. Raises UserError.
    """
    quiet_without_tpu()
    if config is not None:
        config = plain_config(config if isinstance(config, ConfigDict) else ConfigDict(config))
    return Assistant(open_model(model, config, base), dtype=dtype, tensor=tensor)


class Assistant:
    """A model on the devices; `ask` and `stream` answer questions.

    The first question about a video decodes and encodes it; further questions reuse its keys and values.
    """

    def __init__(
        self, opened: OpenedModel, *, dtype: str | None = None, tensor: int = 1, parts: tuple[str, ...] = PARTS
    ):
        self.base, self.settings = opened.base, opened.settings
        self.dtype = dtype or self.settings.dtype
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if expected := DEVICES(tensor):
            raise UserError(f"tensor is {tensor!r}, expected {expected}")
        mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": tensor}, jax.local_devices())
        with jax.set_mesh(mesh):
            model = load_model(self.base, self.settings, mesh, dtype=jnp.dtype(self.dtype), parts=parts)
            if opened.trained is not None:
                put_trained(model, opened.trained)
        self.identity = {"name": opened.name, "fingerprint": opened.fingerprint}
        self.tokenizer = self.base.module.Tokenizer(self.base.path)
        self.inference = Inference(model, mesh, jnp.dtype(self.dtype), self.tokenizer.stop_ids)
        self.places = VideoPlaces(self.base, self.settings)
        num_frames = self.settings.video.num_frames
        self._most_placed = len(self._place(num_frames, [LONGEST_SECONDS] * num_frames))
        self.picture_tokens = num_picture_tokens(self.base, self.settings)
        self.takes_pictures = image_projector(self.settings.video) is not None
        self.reading = Reading(
            num_frames,
            self.base.config.image_size,
            self.base.module.frame_fit(self.base.config),
            self.settings.sampling,
            self.base.module.picture_fit(self.base.config),
        )
        self._known: dict[tuple, Arrays] = {}
        self._prefixes: dict[tuple, Prefixes] = {}

    def ask(self, video: str | Path | Clip | Picture, question: str | list[str], **generation: Any) -> str | list[str]:
        """Answers one question about a video or `Picture`, or a list of questions, decoded together.

        generation: the fields of `engine.Generation`. Raises UserError.
        """
        settings = Generation(**generation)
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            return []
        state = self._start(video, questions, settings)
        state = self.inference.decode(state, settings, settings.max_new_tokens)
        answers = self.inference.finished(state, len(questions))
        if not all(answer.finite for answer in answers):
            raise UserError(self.not_finite)
        texts = [self.text(answer.ids) for answer in answers]
        return texts[0] if isinstance(question, str) else texts

    def stream(self, video: str | Path | Clip | Picture, question: str, **generation: Any) -> Iterator[str]:
        """Yields the answer of `ask` in pieces while it is written."""
        settings = Generation(**generation)
        state = self._start(video, [question], settings)

        def tokens() -> Iterator[int]:
            nonlocal state
            shown, ended = 0, False
            while not ended:
                (answer,) = self.inference.finished(state, 1, shown)
                yield from answer.ids
                if not answer.finite:
                    raise UserError(self.not_finite)
                shown += len(answer.ids)
                ended = answer.stopped or shown == settings.max_new_tokens
                if not ended:
                    until = min(shown + TOKENS_AT_ONCE, settings.max_new_tokens)
                    state = self.inference.decode(state, settings, until)

        return pieces(self.tokenizer.decode, tokens())

    def _place(self, num_frames: int, seconds: Sequence[float] | None) -> list[tuple[int, int]]:
        return self.places.place(num_frames, seconds, self.tokenizer.encode)

    @property
    def not_finite(self) -> str:
        """The message about an answer whose logits are not finite."""
        other = "; float16 overflows where bfloat16 does not: --dtype=bfloat16" if self.dtype == "float16" else ""
        return (
            f"{self.identity['name']} computes numbers that are none (logits NaN or infinite): look for damaged "
            f"weights with --check_files, for a damaged run or store{other}"
        )

    def text(self, ids: list[int]) -> str:
        """Decodes the ids of an answer."""
        return self.tokenizer.decode(ids).strip()

    def video_prompt(self, question: str, arrays: Arrays) -> Prompt:
        """Makes the prompt of a question about a video. arrays: num_frames and, if text needs them, seconds."""
        placed = self._place(int(arrays["num_frames"]), arrays.get("seconds"))
        return make_prompt(self.base, self.tokenizer, question, placed, self._most_placed)

    def picture_prompt(self, question: str, arrays: Arrays) -> Prompt:
        """Makes the prompt of a question about a picture. arrays: of the picture, see `reading.read_media`.

        Raises UserError when no projector takes pictures.
        """
        if not self.takes_pictures:
            raise UserError(
                "this model has no projector for pictures (its video tokens all go through copies): ask it about videos"
            )
        grid, size = (tuple(arrays[name].tolist()) if name in arrays else None for name in ("grid", "size"))
        return make_picture_prompt(self.base, self.tokenizer, question, self._picture_places(grid, size))

    def _picture_places(self, grid: tuple[int, int] | None, size: tuple[int, int] | None) -> Places:
        base = self.base
        return base.module.picture_places(self.tokenizer, base.config, self.picture_tokens, grid, size)

    def shape_of(self, media: Any) -> int:
        """Returns a number by which media of one kind are sorted, so that those of one shape are adjacent.

        It is 0 but for a picture in tiles, whose tokens are counted from its file's first bytes.
        """
        cut, size = self.reading.fit, None
        if isinstance(media, Picture) and not isinstance(cut, str):
            size = picture_size(media.path)
        if size is None:
            return 0
        return stepped(len(self._picture_places(tile_grid(*size, self.reading.image_size, cut), size).placed))

    def text_prompt(self, question: str) -> Prompt:
        """Makes the prompt of a question about a video, without visual tokens."""
        return make_prompt(self.base, self.tokenizer, question, [], 0)

    def _start(self, video: str | Path | Clip | Picture, questions: list[str], settings: Generation) -> Any:
        for question in questions:
            check_question(question)
        media = video if isinstance(video, Clip | Picture) else Clip(video)
        where, arrays = self._read(media)
        if isinstance(media, Picture):
            prompts = [self.picture_prompt(question, arrays) for question in questions]
        else:
            prompts = [self.video_prompt(question, arrays) for question in questions]
        for prompt in prompts:
            check_length(prompt, settings.max_new_tokens, self.base)
        keys = [(where, self.inference.context_class(prompt.length)) for prompt in prompts]
        shards = num_batch_shards(self.inference.mesh)

        def prefixes() -> Iterator[Prefixes]:
            for key, prompt in dict(zip(keys, prompts, strict=True)).items():
                if key not in self._prefixes:
                    remember(self._prefixes, key, self.inference.prefill({key: (arrays, prompt)}, shards))
                yield self._prefixes[key]

        rows = bucket(len(prompts), shards)
        return self.inference.start(prompts, keys, prefixes(), settings, range(len(prompts)), rows)

    def _read(self, media: Clip | Picture) -> tuple[tuple, Arrays]:
        """Returns a key that changes with the file, and the file's arrays."""
        try:
            status = os.stat(media.path)
        except OSError as error:
            raise UserError(f"{media.path}: {error.strerror}") from None
        except ValueError as error:  # a zero byte, or half a character
            raise UserError(f"{str(media.path)!r}: no file is called that ({error})") from None
        key = media, status.st_mtime_ns, status.st_size
        if key not in self._known:
            remember(self._known, key, read_media(self.reading, media))
        return key, self._known[key]


def check_question(question: str) -> None:
    """Raises UserError unless a question is text that UTF-8 can encode."""
    if not isinstance(question, str):
        raise UserError(f"the question is {question!r:.80}, expected a text")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"the question {question!r:.80} has half a character: write it in UTF-8") from None


def remember(known: dict, key: Any, value: Any) -> None:
    """Adds a value and removes the oldest ones, so that at most REMEMBERED values stay."""
    while len(known) >= REMEMBERED:
        del known[next(iter(known))]
    known[key] = value
