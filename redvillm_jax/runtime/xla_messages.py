"""Reads XLA's messages about memory. Their wording is no interface, so no other module reads them."""

import re

CHECKED = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # the versions whose messages were checked last


def out_of_memory(said: str) -> bool:
    """Returns whether a message is about memory of any kind."""
    return "RESOURCE_EXHAUSTED" in said


def small_memory(said: str) -> str:
    """Describes which small memory of a chip a program overflows, by the compiler's message; "" for others."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?(?:memory space |space=)([vs])mem", said, re.DOTALL)
    if not found:
        return ""
    memory = {"v": "vector memory (vmem)", "s": "scalar memory (smem)"}[found[1]]
    sizes = re.search(
        r"Used \S+ of \d[\d.]*\w?|size \S+ and limit \d[\d.]*\w?|\(size=\d+\) would exceed memory \(size=\d+\)", said
    )
    return f"an operation needs more {memory} than a chip has" + (f" ({sizes[0]})" if sizes else "")


def needed_bytes(said: str) -> float | None:
    """Returns the bytes that a program needs: the largest size in the compiler's message; None for other messages."""
    if not out_of_memory(said) or "hbm" not in said.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return max(
        (float(size) * units[unit] for size, unit in re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", said)), default=None
    )
