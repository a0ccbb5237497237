"""LLaVA, English: the paper's recipe. The base folder decides between v1 (linear projector) and v1.5.

python -m redvillm_jax.train --config=configs/llava.py --workdir=runs/llava --config.base=BASE --config.data=FRAMES
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "llava"
    return config
