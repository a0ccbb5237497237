"""SmolVLM, on a computer without an accelerator: the paper's method with fewer frames and steps (docs/laptop.md).

python -m redvillm_jax.train --config=configs/smolvlm.py --workdir=runs/smolvlm --config.base=BASE --config.data=STREAMS
"""

from configs.common import get_common


def get_config():
    config = get_common()
    config.family = "smolvlm"
    config.num_frames = 16
    config.batch_questions = 8
    config.row_length = 512
    config.dtype = "float32"
    config.remat = "none"
    return config
