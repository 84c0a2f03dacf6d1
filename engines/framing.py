"""What SDXL's networks are told of how an image is framed: its size, where it was cut, and the size it was cut to.

Source: Podell et al. 2023, "SDXL", section 2.2; the order is diffusers'.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Size


def whole_image(size: Size) -> NDArray[np.float32]:
    """(6,) of an image drawn as a whole: height, width, top and left of the cut, height and width again; pixels."""
    return np.array([size.height, size.width, 0, 0, size.height, size.width], np.float32)
