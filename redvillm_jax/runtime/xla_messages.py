"""What XLA's complaints about memory mean: their wording is no interface, and is read nowhere else."""

import re

CHECKED = {"jax": "0.10.2", "libtpu": "0.0.42.1"}  # the versions whose messages were last read


def out_of_memory(said: str) -> bool:
    """Whether a complaint is about memory of any kind."""
    return "RESOURCE_EXHAUSTED" in said


def small_memory(said: str) -> str:
    """In words, which of a chip's small memories a program overflows by the compiler's complaint; "" for others."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?(?:memory space |space=)([vs])mem", said, re.DOTALL)
    if not found:
        return ""
    memory = {"v": "vector memory (vmem)", "s": "scalar memory (smem)"}[found[1]]
    sizes = re.search(
        r"Used \S+ of \d[\d.]*\w?|size \S+ and limit \d[\d.]*\w?|\(size=\d+\) would exceed memory \(size=\d+\)", said
    )
    return f"an operation needs more {memory} than a chip has" + (f" ({sizes[0]})" if sizes else "")


def needed_bytes(said: str) -> float | None:
    """What a program needs, by the compiler's complaint about memory: the largest size in it; None for others."""
    if not out_of_memory(said) or "hbm" not in said.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return max(
        (float(size) * units[unit] for size, unit in re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", said)), default=None
    )
