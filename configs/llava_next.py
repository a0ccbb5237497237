"""LLaVA-NeXT (1.6), and LLaVA 1.x on other decoders: the paper's recipe.

What differs from LLaVA's: frames are squashed with a bicubic filter, as the model's processor makes the base view of a
picture, and have no tiles; the prompt is the model's own chat template. Mistral's and Llama 3's decoders have eight
key-value heads, so a video's cache takes a quarter of the memory.

python -m redvillm_jax.train --config=configs/llava_next.py --workdir=runs/next --config.base=BASE --config.data=FRAMES
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "llava"
    return config
