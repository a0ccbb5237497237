"""The fields that all image processors' files share: preprocessor_config.json and processor_config.json."""

from collections.abc import Sequence
from typing import Any

from redvillm_jax.modules.config_fields import (
    COMMON,
    FIXED,
    Field,
    Fields,
    mapping,
    nothing,
    only,
    read_fields,
    shown,
)

FILTERS = {1: "1 (Lanczos)", 2: "2 (bilinear)", 3: "3 (bicubic)"}  # PIL's numbers


def close(wanted: float | Sequence[float]) -> Field:
    """A number, or a list of numbers, that must equal `wanted` within 1e-6."""

    def accepts(value: Any) -> bool:
        try:
            pairs = zip(value, wanted, strict=True) if isinstance(wanted, tuple) else [(value, wanted)]
            return all(abs(a - b) < 1e-6 for a, b in pairs)
        except (TypeError, ValueError, OverflowError):
            return False

    default = list(wanted) if isinstance(wanted, tuple) else wanted
    return Field(FIXED, shown(default), accepts, default)


def transform(*processors: str, resample: int, mean: tuple, std: tuple) -> Fields:
    """Returns the fields of a processor that resizes pictures, divides them by 255 and normalises them.

    processors: names of transformers' classes without their ending, such as "CLIP". resample: the filter, by PIL's
    number. A family adds its sizes and whatever else its processor does.
    """
    ends = "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil"
    return COMMON | {
        "image_processor": mapping(None),  # processor_config.json holds the fields of the other file here
        "image_processor_type": only(*(name + end for name in processors for end in ends)),
        "do_resize": only(True),
        "resample": only(resample, values=FILTERS[resample]),
        "do_rescale": only(True),
        "rescale_factor": close(1 / 255),
        "do_normalize": only(True),
        "image_mean": close(mean),
        "image_std": close(std),
        **nothing("do_convert_rgb", "processor_class", "chat_template", "image_seq_length", "disable_grouping"),
        **nothing("data_format", "input_data_format", "return_tensors", "device", "_valid_processor_keys"),
        **nothing("size_divisor", "pad_size", "processor_type"),
    }


def read_transform(config: Any, fields: Fields, where: str) -> dict[str, Any]:
    """Returns the values of an image processor's file, or of the processor in it.

    Raises UserError when it asks for another transform than `fields`.
    """
    values = read_fields(config, fields, where)
    inner = values["image_processor"]
    return values if inner is None else read_fields(inner, fields, where, "image_processor.")
