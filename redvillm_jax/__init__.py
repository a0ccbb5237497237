"""Turns an image LLM into a video LLM by training its projector and one copy of it.

import redvillm_jax
model = redvillm_jax.load("runs/qwen")
model.ask("clip.mp4", "What happens?")
model.ask(redvillm_jax.Picture("photo.jpg"), "What is this?")
"""

from typing import Any

__all__ = ["Clip", "Picture", "load"]


def __getattr__(name: str) -> Any:
    """Names of `assistant`, looked up when they are used: it imports jax, which not every command needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from redvillm_jax.inference import assistant

    return getattr(assistant, name)
