"""Rows of a generation: their kind, and a key by which prompt and images are known again in a later one."""

import zlib
from collections.abc import Mapping
from typing import Any, Literal


def row_kinds(output: Mapping[str, Any]) -> list[Literal["image", "text"]]:
    """`image` for each row of a generation whose prompt holds one, else `text`."""
    counts = output.get("num_images") or [0] * len(output["prompt_ids"])
    return ["image" if count else "text" for count in counts]


def row_keys(output: Mapping[str, Any]) -> list[tuple[Any, ...] | None]:
    """For each row a key of prompt and images, known by the sum over their patches, which one pass on the device gives;
    None where the model's images cannot be told apart row by row."""
    prompts, masks = output["prompt_ids"], output["prompt_mask"]
    ids = [zlib.crc32(row[mask.bool()].cpu().numpy().tobytes()) for row, mask in zip(prompts, masks, strict=True)]
    pixels, counts = output.get("pixel_values"), output.get("num_images")
    if pixels is None or counts is None:
        return [(key,) for key in ids]
    grid = output.get("image_grid_thw")
    if grid is None:
        return [None if count else (key,) for key, count in zip(ids, counts, strict=True)]
    patches = iter(grid.prod(dim=-1).tolist())
    lengths = [sum(next(patches) for _ in range(count)) for count in counts]
    sums = [float(part.double().sum()) for part in pixels.split(lengths)]
    return [(key, total) for key, total in zip(ids, sums, strict=True)]
