"""Gemma 3 and MedGemma: the paper's recipe.

What differs from LLaVA's: a frame has 896 x 896 pixels and 4096 features, which the projector pools to 256 tokens; a
video's tokens see each other in both directions; the prompt is the model's own chat template.

python -m redvillm_jax.train --config=configs/gemma3.py --workdir=runs/gemma3 --config.base=BASE --config.data=FRAMES
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "gemma3"
    return config
