"""The demo's tiny bases on generated videos. The family is the argument of get_config, "llava" by default.

python -m redvillm_jax.train --config=configs/demo.py:llava --workdir=RUN --config.base=BASE --config.data=FRAMES
"""

import importlib
from pathlib import Path

from ml_collections import ConfigDict

from configs.common import get_common

NO_FAMILY = ("common", "demo")


def family_config(family: str) -> ConfigDict:
    """Returns the config of a family: its file in this folder, or the common defaults for a module of your own."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in NO_FAMILY)
    configs: dict[str, ConfigDict] = {}
    for name in names:  # the first of several configs of one family: llava before llava_next
        config = importlib.import_module(f"configs.{name}").get_config()
        configs.setdefault(config.family, config)
    if family in configs:
        return configs[family]
    if "." not in family:
        raise LookupError(f"unknown family {family!r}, expected one of {', '.join(configs)}")
    config = get_common()
    config.family = family
    return config


def get_config(family: str = "llava"):
    config = family_config(family)
    config.num_frames = 16
    config.learning_rate = 4e-3  # chosen on the development videos; the paper's rate is for 7B models
    config.batch_questions = 80
    config.row_length = 128 if family == "llava" else 160  # a video with its six questions
    config.dtype = "float32"
    config.remat = "none"
    config.checkpoint_every = 100
    return config
