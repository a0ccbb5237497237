"""Qwen-VL: the paper's recipe, on a store's questions in Chinese (qwen.py:zh), English (:en) or both (:both).

python -m redvillm_jax.train --config=configs/qwen.py --workdir=runs/qwen --config.base=BASE --config.data=FRAMES
"""

from configs.common import get_common

LANGUAGES = {"zh": "zh", "en": "en", "both": ""}


def get_config(language: str = "both"):
    if language not in LANGUAGES:
        raise LookupError(f"unknown language {language!r}, expected one of {', '.join(LANGUAGES)}")
    config = get_common()
    config.language = LANGUAGES[language]
    config.family = "qwen_vl"
    return config
