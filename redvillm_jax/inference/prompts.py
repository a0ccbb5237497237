"""Prompts as token ids: the part up to the end of the video, and the question after it."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from redvillm_jax.model.base_folder import Base
from redvillm_jax.modules.picture_places import Places


class Prompt(NamedTuple):
    """The prompt of one question about a video or picture.

    before: token ids before the video. placed: the video's part, (token id, -1) for a text token, (0, slot) for a
    visual token (see `places.VideoPlaces` and `picture_places.Places`). question: token ids after the video, up to the
    answer. width: slots of `prefix`, the same for all videos and few for pictures, so that there are few shapes. sums:
    the sources and weights of `Places`, if any.
    """

    before: list[int]
    placed: list[tuple[int, int]]
    question: list[int]
    width: int
    sums: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def prefix(self) -> list[tuple[int, int]]:
        """All tokens before the question, in the form of `placed`."""
        return [*((token, -1) for token in self.before), *self.placed]

    @property
    def prefix_length(self) -> int:
        return len(self.before) + len(self.placed)

    @property
    def num_visual(self) -> int:
        """The number of visual tokens."""
        return sum(slot >= 0 for _, slot in self.placed)

    @property
    def text_ids(self) -> list[int]:
        """The token ids of all text."""
        return [*(token for token, slot in self.prefix if slot < 0), *self.question]

    @property
    def length(self) -> int:
        return self.prefix_length + len(self.question)


def make_prompt(
    base: Base, tokenizer: Any, question: str, placed: list[tuple[int, int]], most: int, *, picture: bool = False
) -> Prompt:
    """Makes the prompt of a question with the base's own template.

    most: the length of `placed` for the longest video. Raises UserError when the question has no text.
    """
    if not question.strip():
        raise UserError("the question is empty; ask something")
    parts = base.module.prompt(tokenizer, base.config, question, None, picture=picture)
    before, after = ([token for token, _ in part] for part in parts)
    return Prompt(before, placed, after, len(before) + max(most, len(placed)))


def make_picture_prompt(base: Base, tokenizer: Any, question: str, places: Places) -> Prompt:
    """Makes the prompt of a question about a picture. Raises UserError when the question has no text."""
    most = 0 if isinstance(base.module.picture_fit(base.config), str) else stepped(len(places.placed))
    prompt = make_prompt(base, tokenizer, question, places.placed, most, picture=True)
    return prompt if places.sources is None else prompt._replace(sums=(places.sources, places.weights))


def check_length(prompt: Prompt, max_new_tokens: int, base: Base) -> None:
    """Raises UserError when prompt and longest answer together need more positions than the base has."""
    most = base.config.max_position_embeddings
    if prompt.length + max_new_tokens > most:
        raise UserError(
            f"the prompt takes {prompt.length} tokens ({prompt.num_visual} of them visual) and the answer up to "
            f"{max_new_tokens}, the base knows {most} positions: shorten the question, or lower max_new_tokens"
        )


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """Returns a prompt as text: with special tokens, and visual tokens as their number."""
    before, after = (tokenizer.decode(ids, keep_special=True) for ids in (prompt.before, prompt.question))
    between = ""
    for visual, run in itertools.groupby(prompt.placed, is_visual):
        ids = [token for token, _ in run]
        between += f"[{len(ids)} visual tokens]" if visual else tokenizer.decode(ids, keep_special=True)
    return f"{before}{between or '[0 visual tokens]'}{after}"


def is_visual(place: tuple[int, int]) -> bool:
    """Returns whether an entry of `placed` is a visual token."""
    return place[1] >= 0


def stepped(number: int) -> int:
    """Rounds up to 1, 1.25, 1.5 or 1.75 times a power of two: few shapes, and less than a quarter for nothing."""
    step = max(2 ** (number.bit_length() - 3), 1)
    return -(-number // step) * step


def bucket(number: int, least: int) -> int:
    """Rounds up to least, 2 * least, 4 * least, …, so that few shapes serve all lengths."""
    size = least
    while size < number:
        size *= 2
    return size
