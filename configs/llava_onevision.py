"""LLaVA-OneVision of the single-image stage: the paper's recipe.

What differs from LLaVA's: a frame has 384 × 384 pixels, squashed with a bicubic filter, and 27 × 27 features of
SigLIP's last layer, so a video of 100 frames takes 829 tokens; the prompt is the model's own chat template.

python -m redvillm_jax.train --config=configs/llava_onevision.py --workdir=runs/onevision --config.base=BASE \\
    --config.data=FRAMES
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "llava_onevision"
    return config
