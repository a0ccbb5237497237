"""What a value of a config may be: each bound is a function that says in words what is expected instead of a value."""

from collections.abc import Callable
from typing import Any

Bound = Callable[[Any], str]  # what is expected instead of a value, "" where the value is right


def whole(least: int, most: int) -> Bound:
    """An integer, both bounds included."""
    expected = f"a whole number from {least} to {most}"
    return lambda value: "" if type(value) is int and least <= value <= most else expected


def number(least: float, most: float, *, above: bool = False) -> Bound:
    """A number, both bounds included, or more than the lower one."""
    expected = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"

    def bound(value: Any) -> str:
        fits = type(value) in (int, float) and least <= value <= most  # nan is not
        return "" if fits and not (above and value == least) else expected

    return bound


def one_of(*values: Any) -> Bound:
    """One of a few values, of their type."""
    expected = f"one of {', '.join(map(str, values))}"
    return lambda value: "" if any(type(value) is type(one) and value == one for one in values) else expected


def text(value: Any) -> str:
    """Any string."""
    return "" if isinstance(value, str) else "a text"
