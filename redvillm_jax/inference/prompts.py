"""Prompts as token ids: the part up to the end of the video, and the question behind it."""

import itertools
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from redvillm_jax.model.base_folder import Base


class Prompt(NamedTuple):
    """One question with its video or picture.

    before: ids before it; placed: what stands in its place, (token id, -1) for text, (0, slot) for a visual token
    (see `places.VideoPlaces`); question: ids behind it, up to the answer; width: slots for the ids up to the
    question, the same for all videos, so that shapes are static.
    """

    before: list[int]
    placed: list[tuple[int, int]]
    question: list[int]
    width: int

    @property
    def prefix(self) -> list[tuple[int, int]]:
        """What stands up to the question, in the form of `placed`."""
        return [*((token, -1) for token in self.before), *self.placed]

    @property
    def prefix_length(self) -> int:
        return len(self.before) + len(self.placed)

    @property
    def num_visual(self) -> int:
        """How many visual tokens it has."""
        return sum(slot >= 0 for _, slot in self.placed)

    @property
    def text_ids(self) -> list[int]:
        """The ids of all its text."""
        return [*(token for token, slot in self.prefix if slot < 0), *self.question]

    @property
    def length(self) -> int:
        return self.prefix_length + len(self.question)


def make_prompt(
    base: Base, tokenizer: Any, question: str, placed: list[tuple[int, int]], most: int, *, picture: bool = False
) -> Prompt:
    """The prompt of a question by the base's own template; most: how much stands in the place of the longest video.

    Raises UserError when the question has no text.
    """
    if not question.strip():
        raise UserError("the question is empty; ask something")
    parts = base.module.prompt(tokenizer, base.config, question, None, picture=picture)
    before, after = ([token for token, _ in part] for part in parts)
    return Prompt(before, placed, after, len(before) + max(most, len(placed)))


def check_length(prompt: Prompt, max_new_tokens: int, base: Base) -> None:
    """Raises UserError when prompt and answer together have more positions than the base knows."""
    most = base.config.max_position_embeddings
    if prompt.length + max_new_tokens > most:
        raise UserError(
            f"the prompt takes {prompt.length} tokens ({prompt.num_visual} of them visual) and the answer up to "
            f"{max_new_tokens}, the base knows {most} positions: shorten the question, or lower max_new_tokens"
        )


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as the model reads it, with special tokens, and its visual tokens counted."""
    before, after = (tokenizer.decode(ids, keep_special=True) for ids in (prompt.before, prompt.question))
    between = ""
    for visual, run in itertools.groupby(prompt.placed, is_visual):
        ids = [token for token, _ in run]
        between += f"[{len(ids)} visual tokens]" if visual else tokenizer.decode(ids, keep_special=True)
    return f"{before}{between or '[0 visual tokens]'}{after}"


def is_visual(place: tuple[int, int]) -> bool:
    """Whether a visual token stands there."""
    return place[1] >= 0


def bucket(number: int, least: int) -> int:
    """The smallest of least, 2 * least, 4 * least, … that is not below number: few shapes serve all lengths."""
    size = least
    while size < number:
        size *= 2
    return size
