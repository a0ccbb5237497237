"""SmolVLM on a computer without an accelerator (docs/laptop.md), or with the paper's recipe (smolvlm.py:paper).

python -m redvillm_jax.train --config=configs/smolvlm.py --workdir=RUN --config.base=BASE --config.data=STREAMS
"""

from configs.common import get_common

RECIPES = ("laptop", "paper")


def get_config(recipe: str = "laptop"):
    if recipe not in RECIPES:
        raise LookupError(f"unknown recipe {recipe!r}, expected one of {', '.join(RECIPES)}")
    config = get_common()
    config.family = "smolvlm"
    if recipe == "laptop":
        config.num_frames = 16  # the encoder takes nearly all the time, in proportion to it
        config.batch_questions = 8  # more steps an epoch for a few hundred questions
        config.learning_rate = 1e-4  # fewer steps and a smaller model than the paper's
        config.row_length = 512
        config.dtype = "float32"
        config.remat = "none"
    return config
