"""A vision tower's sizes from the `vision_config` of its config.json, and which patches attend to which.

A patch is one cell of the image grid; `merge` x `merge` patches become one token of the language model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_autotune.errors import ConfigError

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31),
    },
    "qwen3_vl": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 3584, "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24),
    },
}  # fmt: skip
"""What transformers fills in where a config.json leaves a key out (`configuration_<family>.py`)."""

SHARED_DEFAULTS = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower."""

    depth: int
    hidden: int
    heads: int
    mlp: int
    gated: bool  # whether the block's MLP has three matrices (gate, up, down) or two
    layer_norm: bool  # whether norms have a bias (LayerNorm) or not (RMSNorm); the patch embedding's bias goes with it
    patch: int
    temporal_patch: int
    channels: int
    merge: int
    out: int  # channels handed to the language model
    deepstack: int  # number of further mergers that feed the first layers of the language model
    positions: int  # rows of the learned position embedding (0: none)
    window: int | None  # side of an attention window in merged tokens; None if every block attends to the whole image
    full_blocks: int  # number of blocks that attend to the whole image
    # whether transformers takes the patch embedding for an input embedding. Gradient checkpointing then makes its
    # output require a gradient (`enable_input_require_grads`), and a frozen tower is in the backward
    input_hooked: bool

    @property
    def patch_weights(self) -> int:
        """Weights of the patch embedding, a convolution whose kernel is its stride."""
        return self.channels * self.temporal_patch * self.patch**2 * self.hidden

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices: query-key-value, output, MLP."""
        return 4 * self.hidden**2 + (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def merger_weights(self) -> int:
        """Weights of one merger's two matrices, applied once per merged token."""
        return self.merged**2 + self.merged * self.out

    @property
    def merged(self) -> int:
        """Channels of `merge` x `merge` patches laid side by side."""
        return self.hidden * self.merge**2

    @property
    def mergers(self) -> int:
        return 1 + self.deepstack

    @property
    def parameters(self) -> int:
        """All parameters of the tower: patch and position embedding, blocks, mergers."""
        norm = 2 if self.layer_norm else 1
        biases = 4 * self.hidden + (2 if self.gated else 1) * self.mlp + self.hidden
        blocks = self.depth * (self.block_weights + biases + 2 * norm * self.hidden)
        mergers = self.mergers * (self.merger_weights + self.merged + self.out)
        norms = norm * (self.hidden + self.deepstack * self.merged)
        embedding = self.patch_weights + self.hidden * self.layer_norm + self.positions * self.hidden
        return embedding + blocks + mergers + norms

    def window_pairs(self, rows: int, columns: int) -> int:
        """Query-key pairs of one windowed block on an image of `rows` x `columns` patches. Windows tile the grid of
        merged tokens from its corner, the last of a row or column being cut off (`get_vision_window_index` in
        `transformers/vision_utils.py`)."""
        side = self.window
        if side is None:
            return (rows * columns) ** 2
        across = _squares(rows // self.merge, side) * _squares(columns // self.merge, side)
        return across * self.merge**4


def vision_shape(family: str, config: Mapping[str, Any]) -> VisionShape:
    """Read a `vision_config` of one of the families in `DEFAULTS`; ConfigError for the tower of another one."""
    if family not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ConfigError(f"no cost formulas for the vision tower of `{family}`", fix=f"Known: {known}.")
    keys = SHARED_DEFAULTS | DEFAULTS[family] | {key: value for key, value in config.items() if value is not None}
    windowed = "window_size" in DEFAULTS[family]
    depth, patch, merge = int(keys["depth"]), _side(keys["patch_size"]), int(keys["spatial_merge_size"])
    return VisionShape(
        depth=depth,
        hidden=int(keys["hidden_size"]),
        heads=int(keys["num_heads"]),
        mlp=int(keys["intermediate_size"]),
        gated=windowed,
        layer_norm=not windowed,
        patch=patch,
        temporal_patch=_side(keys["temporal_patch_size"]),
        channels=int(keys["in_channels"]),
        merge=merge,
        out=int(keys["out_hidden_size"]),
        deepstack=len(keys.get("deepstack_visual_indexes", ())),
        positions=int(keys.get("num_position_embeddings", 0)),
        window=int(keys["window_size"]) // merge // patch if windowed else None,
        full_blocks=sum(index < depth for index in keys["fullatt_block_indexes"]) if windowed else depth,
        input_hooked=windowed,
    )


def _side(value: Any) -> int:
    """A size that some configs give once for each direction."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _squares(length: int, side: int) -> int:
    """Sum of squared piece lengths when `length` is cut into pieces of `side`."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2


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
