"""Requests that differ within the buckets of their shapes run what is compiled already; a new bucket compiles once."""

import functools

import jax
import numpy as np
import pytest
from conftest import NUM_FRAMES

import redvillm_jax
from configs.demo import get_config
from redvillm_jax.demo.moving_shapes import write_mp4
from redvillm_jax.model.settings import plain_config

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)
WORDS = "What Which colour circle square shape is the red moves first and then".split()


def compilations(request) -> int:
    """How many programs a request compiles."""
    COMPILED.clear()
    request()
    return len(COMPILED)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Thirty videos of 1 to 9 frames."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    paths = [folder / f"{number}.mp4" for number in range(30)]
    for number, path in enumerate(paths):
        write_mp4(rng.integers(0, 256, (1 + number % 9, 64, 64, 3), np.uint8), path)
    return paths


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen_vl", marks=pytest.mark.slow)])
def test_only_new_buckets_compile(family, bases, clips):
    model = redvillm_jax.load(bases[family], config=plain_config(get_config(family)) | {"num_frames": NUM_FRAMES})
    rng = np.random.default_rng(1)
    lengths = set()

    def question(low: int, high: int) -> str:
        """A question whose ids behind the video are low to high in number."""
        while True:
            text = " ".join(rng.choice(WORDS, rng.integers(1, high))) + "?"
            length = len(model.video_prompt(text, {"num_frames": NUM_FRAMES}).question)
            if low <= length <= high:
                lengths.add(length)
                return text

    def request(number: int) -> None:
        settings = {
            "max_new_tokens": 1 + number % 16,
            "temperature": 0.3 * (number % 4),
            "top_k": number % 3,
            "top_p": 1 - 0.1 * (number % 5),
            "repetition_penalty": 1 + 0.1 * (number % 2),
            "seed": number,
        }
        if number % 3:
            model.ask(clips[number], question(1, 32), **settings)
        else:
            list(model.stream(clips[number], question(1, 32), **settings))

    for first in (0, 1):  # one streams, one does not
        assert compilations(functools.partial(request, first)) > 0
    assert [compilations(functools.partial(request, number)) for number in range(30)] == [0] * 30
    assert len(lengths) > 5

    buckets = {
        "longer questions": lambda: model.ask(clips[1], question(33, 64), max_new_tokens=3),
        "longer answers": lambda: model.ask(clips[2], question(1, 32), max_new_tokens=int(rng.integers(17, 33))),
        "more questions": lambda: model.ask(
            clips[3], [question(1, 32) for _ in range(rng.integers(9, 17))], max_new_tokens=3
        ),
    }
    for name, ask in buckets.items():
        assert compilations(ask) > 0, name
        assert [compilations(ask) for _ in range(3)] == [0] * 3, name
