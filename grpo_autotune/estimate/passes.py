"""Floating-point operations and bytes of one pass over a batch, forward and backward.

Counted as executed by transformers and TRL 1.16, padding included, but only what the mathematics needs: a product of
m x k by k x n is 2mnk operations; causal attention is counted over the pairs its mask lets through (flash kernels skip
the rest); element-wise work counts as free, as if fused. Bytes are each product's operands and result, once. The counts
are therefore the least a pass can cost on this code path, which is what a share of a limit needs.

Names: S length of a row, N positions given to the LM head, P patches.
"""

import math
from dataclasses import dataclass

from grpo_autotune.estimate.adapters import NO_ADAPTERS, AdapterSizes
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.vision_shapes import VisionShape


@dataclass(frozen=True)
class Work:
    """Phases that run one after another, each as (floating-point operations, bytes moved)."""

    phases: tuple[tuple[float, float], ...] = ()

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.phases)

    @property
    def bytes(self) -> float:
        return sum(moved for _, moved in self.phases)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.phases + other.phases)

    def __mul__(self, times: float) -> "Work":
        return Work(tuple((flops * times, moved * times) for flops, moved in self.phases))


@dataclass(frozen=True)
class Batch:
    """Input of one pass."""

    rows: float  # sequences
    length: float  # tokens of each, padding included
    scored: float  # positions of each that the LM head projects
    images: float = 0.0  # images of each row
    grid: tuple[int, int] = (0, 0)  # height and width of an image in patches
    held: float = 0.0  # tokens of each row's prompt that go through the model in another row; this row's attend to them

    @property
    def tokens(self) -> float:
        return self.rows * self.length

    @property
    def pairs(self) -> float:
        """Query-key pairs of a row."""
        return causal_pairs(self.held + self.length) - causal_pairs(self.held)

    @property
    def patches(self) -> float:
        return self.rows * self.images * self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Training:
    """Trained parameters, and the bytes in which things are kept."""

    text_weights: bool  # the decoder's own weights are trained (full fine-tuning)
    vision_weights: bool  # the vision tower's own weights are trained
    adapters: AdapterSizes  # LoRA parameters by place
    checkpointing: bool  # activations are recomputed in the backward pass
    # cost of attention's backward in forwards: 2 (four products for two), or 2.5 where the kernel computes the scores
    # again (Dao 2023, arXiv:2307.08691, section 4.1)
    attention_backward: float
    value_bytes: float  # bytes of an activation, of the head's weights and of the vision tower's
    weight_bytes: float  # bytes of a weight of the decoder's layers (4-bit base: 0.5)
    trainable_bytes: float  # bytes of a trained parameter, of its gradient and of each optimizer state
    trainable: float  # number of trained parameters
    # each adapter keeps a copy of its input: PEFT casts it to float32, and autocast casts that back
    inputs_copied: bool = False

    def through_tower(self, vision: VisionShape) -> bool:
        """True if the backward pass goes through the vision tower: trained, adapted, or pulled in by checkpointing."""
        return self.into_tower(vision) or self.adapters.blocks + self.adapters.mergers > 0

    def into_tower(self, vision: VisionShape) -> bool:
        """True if the input of the tower's first block needs a gradient."""
        return self.vision_weights or (self.checkpointing and vision.input_hooked)

    def into_text(self, vision: VisionShape | None) -> bool:
        """True if the input of the decoder's first layer needs a gradient."""
        return self.text_weights or self.checkpointing or (vision is not None and self.through_tower(vision))


def forward(shape: ModelShape, batch: Batch, training: Training, *, adapters: bool = True) -> Work:
    """One forward pass: vision tower, decoder, LM head (`adapters` off: LoRA is disabled, as for the reference)."""
    lora = training.adapters if adapters else NO_ADAPTERS
    text_flops = 2 * (shape.layers * shape.layer_weights + lora.text) * batch.tokens
    text_flops += attention_flops(shape, batch.rows, batch.pairs)
    text_bytes = shape.layers * shape.layer_parameters * training.weight_bytes + lora.text * training.trainable_bytes
    text_bytes += _layer_traffic(shape) * shape.layers * batch.tokens * training.value_bytes
    scored = batch.rows * batch.scored
    head = (2 * shape.head_weights * scored, _head_traffic(shape, scored, training, touches=2))
    tower: tuple[tuple[float, float], ...] = ()
    if shape.vision and batch.patches:
        tower = (_tower_forward(shape.vision, batch, lora, training),)
    return Work((*tower, (text_flops, text_bytes), head))


def backward(shape: ModelShape, batch: Batch, training: Training) -> Work:
    """The backward pass of one forward: input gradients everywhere, weight gradients of what is trained.

    A product costs as much again for its input's gradient, and again for its weight's; frozen weights skip the second.
    Checkpointing adds the blocks' forward without each block's last product, which nothing saved needs
    (`torch.utils.checkpoint` stops early). TRL's head recomputes its logits (`trl/kernels/chunked_logprob.py`)."""
    whole = 1 if training.text_weights else 0
    linear = 2 * shape.layers * shape.layer_weights * batch.tokens
    attention = attention_flops(shape, batch.rows, batch.pairs)
    flops = linear * (1 + whole) + attention * training.attention_backward
    flops += 4 * training.adapters.text * batch.tokens
    traffic = _layer_traffic(shape) * shape.layers * batch.tokens * training.value_bytes
    weights = shape.layers * shape.layer_parameters * training.weight_bytes
    moved = traffic * (1 + whole) + weights
    if not training.into_text(shape.vision if batch.patches else None):
        flops -= 2 * (shape.qkv_weights + training.adapters.text_first) * batch.tokens
    if training.checkpointing:
        flops += linear + attention + 2 * training.adapters.text * batch.tokens
        moved += traffic + weights
        if not training.adapters.on_text_end:
            flops -= 2 * shape.layers * shape.hidden * shape.mlp * batch.tokens
    scored = batch.rows * batch.scored
    head_flops = 2 * shape.head_weights * scored * (2 + whole)
    head = (head_flops, _head_traffic(shape, scored, training, touches=4 + whole))
    gradients = (0.0, 2 * training.trainable * training.trainable_bytes)
    tower: tuple[tuple[float, float], ...] = ()
    if shape.vision and batch.patches and training.through_tower(shape.vision):
        tower = (_tower_backward(shape.vision, batch, training),)
    return Work((head, (flops, moved), *tower, gradients))


def causal_pairs(length: float) -> float:
    """Query-key pairs of a row of `length` tokens, each seeing itself and what came before."""
    return length * (length + 1) / 2


def attention_flops(shape: ModelShape, rows: float, pairs: float) -> float:
    """Scores and their product with the values: 2 + 2 operations per pair and query channel, in every layer."""
    return 4 * shape.layers * shape.attention_width * rows * pairs


def square_grid(vision: VisionShape, image_tokens: float) -> tuple[int, int]:
    """Patch grid of an image of so many merged tokens, taken as a square."""
    side = vision.merge * max(1, round(math.sqrt(max(image_tokens, 1.0))))
    return side, side


def tower_attention_flops(vision: VisionShape, images: float, grid: tuple[int, int]) -> float:
    """Attention of the vision tower: whole images in some blocks, windows in the others."""
    whole = (grid[0] * grid[1]) ** 2
    windowed = (vision.depth - vision.full_blocks) * vision.window_pairs(*grid)
    return 4 * vision.hidden * images * (vision.full_blocks * whole + windowed)


def _tower_forward(vision: VisionShape, batch: Batch, lora: AdapterSizes, training: Training) -> tuple[float, float]:
    merged = batch.patches / vision.merge**2
    flops = 2 * (vision.patch_weights + vision.depth * vision.block_weights + lora.blocks) * batch.patches
    flops += 2 * (vision.mergers * vision.merger_weights + lora.mergers) * merged
    flops += tower_attention_flops(vision, batch.rows * batch.images, batch.grid)
    moved = vision.parameters + _block_traffic(vision) * vision.depth * batch.patches
    return flops, moved * training.value_bytes


def _tower_backward(vision: VisionShape, batch: Batch, training: Training) -> tuple[float, float]:
    whole = 1 if training.vision_weights else 0
    blocks = 2 * vision.depth * vision.block_weights * batch.patches
    merged = batch.patches / vision.merge**2
    mergers = 2 * vision.mergers * vision.merger_weights * merged
    attention = tower_attention_flops(vision, batch.rows * batch.images, batch.grid)
    flops = (blocks + mergers) * (1 + whole) + 2 * whole * vision.patch_weights * batch.patches
    flops += attention * training.attention_backward
    flops += 4 * (training.adapters.blocks * batch.patches + training.adapters.mergers * merged)
    traffic = vision.parameters + _block_traffic(vision) * vision.depth * batch.patches
    moved = traffic * (1 + whole)
    if not training.into_tower(vision):
        flops -= 2 * (3 * vision.hidden**2 + training.adapters.blocks_first) * batch.patches
    if training.checkpointing:
        flops += blocks + attention + 2 * training.adapters.blocks * batch.patches
        moved += traffic
        if not training.adapters.on_vision_end:
            flops -= 2 * vision.depth * vision.hidden * vision.mlp * batch.patches
    return flops, moved * training.value_bytes


def _layer_traffic(shape: ModelShape) -> int:
    """Values one token moves in one layer: what the seven projections and attention read and write."""
    projections = 3 * shape.hidden + shape.attention_width + 2 * shape.kv_width
    attention = 2 * shape.attention_width + 2 * shape.kv_width
    return projections + attention + shape.attention_width + shape.hidden + 3 * shape.hidden + 3 * shape.mlp


def _block_traffic(vision: VisionShape) -> int:
    """Values one patch moves in one block of the vision tower."""
    mlp = 3 * (vision.hidden + vision.mlp) if vision.gated else 2 * (vision.hidden + vision.mlp)
    return 10 * vision.hidden + mlp


def _head_traffic(shape: ModelShape, scored: float, training: Training, *, touches: int) -> float:
    """Bytes of the head: its weights, the hidden states, and the tile of logits written or read `touches` times."""
    return (shape.head_weights + scored * (shape.hidden + touches * shape.vocab)) * training.value_bytes
