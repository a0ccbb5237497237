"""Bounds of config values. A bound is a function of a value; it returns "", or the expected values as text."""

from collections.abc import Callable
from typing import Any

Bound = Callable[[Any], str]  # a value -> "" if it is allowed, else the expected values as text


def whole(least: int, most: int) -> Bound:
    """Allows an int from `least` to `most`."""
    expected = f"a whole number from {least} to {most}"
    return lambda value: "" if type(value) is int and least <= value <= most else expected


def number(least: float, most: float, *, above: bool = False) -> Bound:
    """Allows a number from `least` to `most`; with `above`, only above `least`."""
    expected = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"

    def bound(value: Any) -> str:
        fits = type(value) in (int, float) and least <= value <= most  # false for nan
        return "" if fits and not (above and value == least) else expected

    return bound


def one_of(*values: Any) -> Bound:
    """Allows one of a few values, of the same type."""
    expected = f"one of {', '.join(map(str, values))}"
    return lambda value: "" if any(type(value) is type(one) and value == one for one in values) else expected


def text(value: Any) -> str:
    """Allows any string."""
    return "" if isinstance(value, str) else "a text"
