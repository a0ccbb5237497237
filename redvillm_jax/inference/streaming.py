"""Turns tokens into text while they are generated."""

from collections.abc import Callable, Iterable, Iterator


def pieces(decode: Callable[[list[int]], str], token_ids: Iterable[int]) -> Iterator[str]:
    """Yields text as tokens come. Joined, the pieces are `decode` of all tokens without white space at its ends.

    An incomplete character, and white space that may be the end, are kept back until the next tokens. One exception:
    when the tokens end inside a character, `decode` of all tokens may also replace complete bytes before it, which are
    yielded already.
    """
    ids: list[int] = []
    shown = text = ""
    for token in token_ids:
        ids.append(token)
        text = decode(ids).strip()
        certain = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
        if len(certain) > len(shown):
            yield certain[len(shown) :]
            shown = certain
    if text != shown:
        yield text[len(shown) :]
