"""Text while it is written."""

from collections.abc import Callable, Iterable, Iterator


def pieces(decode: Callable[[list[int]], str], token_ids: Iterable[int]) -> Iterator[str]:
    """Yields text as tokens come; together the pieces are `decode` of all tokens without white space at its ends.

    A character may span tokens, and white space may turn out to be the end: both are kept back until it is known. Where
    the tokens end inside a character, `decode` of all may show the whole bytes before it as it shows that half.
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
