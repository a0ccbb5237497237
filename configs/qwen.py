"""Qwen-VL, Chinese and English: the paper's recipe.

python -m redvillm_jax.train --config=configs/qwen.py --workdir=runs/qwen --config.base=BASE --config.data=FRAMES
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "qwen_vl"
    config.qwen_align = "resample"  # resample: the 256-query resampler as pre-trained | per_token: T + N tokens
    config.temporal_positions = "grid"  # of the resampler's temporal keys: grid | 1d
    return config
