"""Prompts as token ids: the part up to the end of the video, and the question behind it."""

from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from redvillm_jax.model.base_folder import Base


class Prompt(NamedTuple):
    """One question with its video or picture.

    before: ids before it; slots: where its visual tokens lie (see `Video.token_slots`); question: ids behind it, up to
    where the answer begins; width: of before and the longest slots, the same for all videos, so that shapes are static.
    """

    before: list[int]
    slots: list[int]
    question: list[int]
    width: int

    @property
    def prefix_length(self) -> int:
        return len(self.before) + len(self.slots)

    @property
    def length(self) -> int:
        return self.prefix_length + len(self.question)


def make_prompt(
    base: Base, tokenizer: Any, question: str, slots: list[int], most_slots: int, *, picture: bool = False
) -> Prompt:
    """The prompt of a question by the base's own template; most_slots: how many the longest video has.

    Raises UserError when the question has no text.
    """
    if not question.strip():
        raise UserError("the question is empty; ask something")
    parts = base.module.prompt(tokenizer, base.config, question, None, picture=picture)
    before, after = ([token for token, _ in part] for part in parts)
    return Prompt(before, slots, after, len(before) + most_slots)


def check_length(prompt: Prompt, max_new_tokens: int, base: Base) -> None:
    """Raises UserError when prompt and answer together have more positions than the base knows."""
    most = base.config.max_position_embeddings
    if prompt.length + max_new_tokens > most:
        raise UserError(
            f"the prompt takes {prompt.length} tokens ({len(prompt.slots)} of them visual) and the answer up to "
            f"{max_new_tokens}, the base knows {most} positions: shorten the question, or lower max_new_tokens"
        )


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as the model reads it, with special tokens, and its visual tokens counted."""
    before, after = (tokenizer.decode(ids, keep_special=True) for ids in (prompt.before, prompt.question))
    return f"{before}[{len(prompt.slots)} visual tokens]{after}"


def bucket(number: int, least: int) -> int:
    """The smallest of least, 2 * least, 4 * least, … that is not below number: few shapes serve all lengths."""
    size = least
    while size < number:
        size *= 2
    return size
