"""Places of LoRA's parameters: on the decoder's matrices or on the vision tower's.

A matrix of `in` x `out` gets `r * (in + out)` adapter parameters (Hu et al. 2021, arXiv:2106.09685, section 4.1). Which
matrices are adapted follows PEFT's own rule for `target_modules`: a list matches by the end of the module's path, a
string is a regular expression over the whole path, and `all-linear` is every linear layer but the LM head.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.vision_shapes import VisionShape


class Matrix(NamedTuple):
    """One linear layer: its module path in transformers, its input and output channels."""

    path: str
    inputs: int
    outputs: int


class AdapterSizes(NamedTuple):
    """LoRA parameters by place, and whether each block's last matrix has an adapter."""

    text: int = 0  # on the decoder's layers
    blocks: int = 0  # on the vision tower's blocks, applied to every patch
    mergers: int = 0  # on its mergers, applied to every merged token
    text_first: int = 0  # of `text`, the input halves on the first layer's query, key and value projections
    blocks_first: int = 0  # of `blocks`, the input half on the first block's query-key-value projection
    # whether the decoder layers' last matrix is adapted; `on_vision_end`: that of the tower's blocks
    on_text_end: bool = False
    on_vision_end: bool = False
    # numbers that a token leaves on all layers where each adapter keeps a copy of its input, beyond what one copy of
    # each input would; `blocks_copied`: a patch, on the tower's blocks
    text_copied: int = 0
    blocks_copied: int = 0

    @property
    def whole(self) -> int:
        return self.text + self.blocks + self.mergers


NO_ADAPTERS = AdapterSizes()


def adapter_sizes(shape: ModelShape, peft: Mapping[str, Any]) -> AdapterSizes:
    """Count LoRA parameters from a PEFT config (its dictionary form: `r`, `target_modules`, `exclude_modules`)."""
    rules = (_frozen(peft.get("target_modules")), _frozen(peft.get("exclude_modules")))
    return _sizes(shape, int(peft.get("r") or 8), *rules)


def _frozen(rule: Any) -> Any:
    return rule if rule is None or isinstance(rule, str) else tuple(rule)


@lru_cache(maxsize=256)
def _sizes(shape: ModelShape, rank: int, targets: Any, excluded: Any) -> AdapterSizes:
    def adapted(matrices: Iterator[Matrix]) -> list[Matrix]:
        return [m for m in matrices if _matches(m.path, targets) and not _matches(m.path, excluded)]

    text = adapted(text_matrices(shape))
    tower = adapted(vision_matrices(shape.vision)) if shape.vision else []
    blocks = [m for m in tower if ".blocks." in m.path]
    mergers = [m for m in tower if ".blocks." not in m.path]
    first_projections = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")
    return AdapterSizes(
        text=rank * sum(m.inputs + m.outputs for m in text),
        blocks=rank * sum(m.inputs + m.outputs for m in blocks),
        mergers=rank * sum(m.inputs + m.outputs for m in mergers),
        text_first=rank * sum(m.inputs for m in text if m.path.endswith(first_projections)),
        blocks_first=rank * sum(m.inputs for m in blocks if m.path.endswith("blocks.0.attn.qkv")),
        on_text_end=any(m.path.endswith(".down_proj") for m in text),
        on_vision_end=any(m.path.endswith((".mlp.down_proj", ".mlp.linear_fc2")) for m in blocks),
        text_copied=_copied(text),
        blocks_copied=_copied(blocks),
    )


READ_TOGETHER = (".q_proj", ".k_proj", ".v_proj", ".gate_proj", ".up_proj")
"""Matrices of one module that read one input, which nothing else keeps."""

ATTENDED = (".o_proj", ".attn.proj")
"""Matrices that read attention's output, which attention keeps as well."""


def _copied(adapted: Sequence[Matrix]) -> int:
    """Channels of the copies beyond one for each input; that of the MLP's last matrix is kept by its adapter alone."""
    copies = sum(matrix.inputs for matrix in adapted if matrix.path.endswith(READ_TOGETHER + ATTENDED))
    inputs = {m.path.rpartition(".")[0]: m.inputs for m in adapted if m.path.endswith(READ_TOGETHER)}
    return copies - sum(inputs.values())


def text_matrices(shape: ModelShape) -> Iterator[Matrix]:
    """The decoder's linear layers, the LM head left out."""
    prefix = "model.language_model.layers" if shape.vision else "model.layers"
    hidden, mlp, width, kv_width = shape.hidden, shape.mlp, shape.attention_width, shape.kv_width
    sizes = {
        "self_attn.q_proj": (hidden, width),
        "self_attn.k_proj": (hidden, kv_width),
        "self_attn.v_proj": (hidden, kv_width),
        "self_attn.o_proj": (width, hidden),
        "mlp.gate_proj": (hidden, mlp),
        "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }
    for layer in range(shape.layers):
        for name, (inputs, outputs) in sizes.items():
            yield Matrix(f"{prefix}.{layer}.{name}", inputs, outputs)


def vision_matrices(vision: VisionShape) -> Iterator[Matrix]:
    """The vision tower's linear layers: blocks and mergers."""
    hidden, mlp, merged = vision.hidden, vision.mlp, vision.merged
    sizes = {"attn.qkv": (hidden, 3 * hidden), "attn.proj": (hidden, hidden)}
    if vision.gated:
        sizes |= {"mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp), "mlp.down_proj": (mlp, hidden)}
    else:
        sizes |= {"mlp.linear_fc1": (hidden, mlp), "mlp.linear_fc2": (mlp, hidden)}
    for block in range(vision.depth):
        for name, (inputs, outputs) in sizes.items():
            yield Matrix(f"model.visual.blocks.{block}.{name}", inputs, outputs)
    first, second = ("mlp.0", "mlp.2") if vision.gated else ("linear_fc1", "linear_fc2")
    for merger in ["merger", *(f"deepstack_merger_list.{index}" for index in range(vision.deepstack))]:
        yield Matrix(f"model.visual.{merger}.{first}", merged, merged)
        yield Matrix(f"model.visual.{merger}.{second}", merged, vision.out)


def _matches(path: str, rule: Any) -> bool:
    if not rule:
        return False
    if rule == "all-linear":
        return True
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in rule)
