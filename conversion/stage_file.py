"""What both sides of conversion.compare share: their inputs' names, and samples of large arrays."""

import numpy as np

NEW_TOKENS = 8  # ids that are generated greedily
MOST = 200_000  # numbers that are kept of one array
ROWS = ("text", "picture", "clip")  # what the language model reads; pictures and clips stand within a prompt


def sample(array: np.ndarray) -> np.ndarray:
    """An array of at most MOST numbers as it is, a larger one as evenly spaced numbers of its flattened form.

    The spacing is odd, so that it runs through the channels of arrays whose last axis is a power of two.
    """
    if array.size <= MOST:
        return array
    return array.reshape(-1)[:: -(-array.size // MOST) | 1]
