"""Vision towers of Qwen-VL's kind: called with patches and a grid, they merge squares of patches into tokens."""

from collections.abc import Iterator
from typing import Any


def towers_of(model: Any) -> Iterator[Any]:
    """The towers of a model."""
    for module in model.modules():
        if hasattr(module, "patch_embed") and hasattr(module, "merger") and hasattr(module, "spatial_merge_size"):
            yield module
