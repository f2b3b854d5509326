"""Language-model tokens of an image, as the Qwen-VL image processors resize it."""

import math


def image_tokens(height: float, width: float, unit: int, bounds: tuple[int, int] | None = None) -> int:
    """Cells of `unit` x `unit` pixels (patch side times merge side) of an image, its sides in pixels, after resizing:
    sides to the nearest multiple, then the whole image into `bounds`, the least and most pixels of an image
    (`smart_resize` in transformers/models/qwen2_vl/image_processing_qwen2_vl.py)."""
    rows, columns = max(1, round(height / unit)), max(1, round(width / unit))
    least, most = bounds or (0, math.inf)
    area = height * width
    if rows * columns * unit**2 > most:
        scale = math.sqrt(most / area)
        rows, columns = (max(1, math.floor(side * scale / unit)) for side in (height, width))
    elif rows * columns * unit**2 < least:
        scale = math.sqrt(least / area)
        rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
    return rows * columns
