"""The demo's tiny bases on generated videos; get_config("llava") or get_config("qwen_vl").

python -m redvillm_jax.train --config=configs/demo.py:llava --workdir=RUN --config.base=BASE --config.data=FRAMES
"""

import importlib

FAMILIES = {"llava": "configs.llava", "qwen_vl": "configs.qwen"}


def get_config(family: str = "llava"):
    if family not in FAMILIES:
        raise LookupError(f"unknown base {family!r}, expected one of {', '.join(FAMILIES)}")
    config = importlib.import_module(FAMILIES[family]).get_config()
    config.num_frames = 16
    config.learning_rate = 4e-3  # chosen on the development videos; the paper's rate is for 7B models
    config.batch_questions = 80
    config.row_length = {"llava": 128, "qwen_vl": 160}[family]  # a video with its six questions
    config.dtype = "float32"
    config.remat = "none"
    config.checkpoint_every = 100
    return config
