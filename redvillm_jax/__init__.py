"""Turns an image LLM into a video LLM by training its projector and one copy of it.

import redvillm_jax
model = redvillm_jax.load("runs/qwen")
model.ask("clip.mp4", "What happens?")
"""

from typing import Any


def load(*args: Any, **options: Any) -> Any:
    """Opens a run, a base or an export to ask it about videos and pictures (see `assistant.load`)."""
    from redvillm_jax.assistant import load  # imports jax, which not every command needs

    return load(*args, **options)
