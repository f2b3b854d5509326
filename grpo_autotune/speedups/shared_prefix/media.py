"""The images of a batch, row by row: whether two rows show the same pixels, and the tensors of some rows alone.

TRL hands a batch's images over as one tensor over all rows: patches with a grid an image (Qwen), or one entry an image
(LLaVA). Layouts beside these two are left to TRL.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from grpo_autotune.seams.trainer_access import BOTH_KEYS, IMAGE_KEYS

_OTHER_LAYOUTS = ("pixel_attention_mask", "spatial_shapes", "num_tiles", "image_position_ids")

INPUTS = (*IMAGE_KEYS, *BOTH_KEYS)
"""Keys of a batch that concern images."""


class Media:
    """Inputs of `_get_per_token_logps_and_entropies` beside ids and mask, as TRL names its keyword arguments; where
    each row's patches are known, no completion holds an image."""

    def __init__(self, given: Mapping[str, Any], rows: int, patches: Sequence[int] | None = None) -> None:
        self._known = patches is not None
        self.given = {key: value for key, value in given.items() if value is not None}
        pixels, grids = self.given.get("pixel_values"), self.given.get("image_grid_thw")
        counts = list(self.given.get("num_images") or [0] * rows)
        self.images = [0, *accumulate(counts)]
        if patches is not None:
            self.patches = [0, *accumulate(patches)]
        elif pixels is None:
            self.patches = [0] * (rows + 1)
        elif grids is not None:
            by_image = [0, *accumulate(grids.prod(-1).tolist())]
            self.patches = [by_image[image] for image in self.images]
        else:
            self.patches = self.images

    def why_not(self, completion_width: int) -> str | None:
        """The reason why these images cannot be told apart by row; None where they can."""
        other = [key for key in _OTHER_LAYOUTS if key in self.given]
        if other:
            return f"images of this kind ({', '.join(other)}) are not supported"
        pixels = self.given.get("pixel_values")
        if pixels is not None and self.patches[-1] != len(pixels):
            return "images laid out one row per prompt are not supported"
        kinds = self.given.get("mm_token_type_ids")
        if not self._known and kinds is not None and bool(kinds[:, -completion_width:].any()):
            return "completions hold images"
        return None

    def same(self, row: int, other: int) -> bool:
        ours, theirs = self.of([row]), self.of([other])
        return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def of(self, rows: Sequence[int]) -> dict[str, Any]:
        """The image tensors of some rows, in this order, as the model takes them."""
        tensors: dict[str, Any] = {}
        if "pixel_values" in self.given:
            tensors["pixel_values"] = _rows(self.given["pixel_values"], self.patches, rows)
        for key in ("image_grid_thw", "image_sizes"):
            if key in self.given:
                tensors[key] = _rows(self.given[key], self.images, rows)
        return tensors if any(self.images[row + 1] > self.images[row] for row in rows) else {}

    def as_given(self, rows: Sequence[int]) -> dict[str, Any]:
        """The inputs that TRL would have for a batch of these rows alone."""
        tensors = self.of(rows)
        if "num_images" in self.given:
            tensors["num_images"] = [self.given["num_images"][row] for row in rows]
        return tensors | {key: self.given[key][list(rows)] for key in BOTH_KEYS if key in self.given}


def _rows(values: torch.Tensor, edges: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    pieces = [values[edges[row] : edges[row + 1]] for row in rows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
