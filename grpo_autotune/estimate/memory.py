"""Memory of an optimizer step beyond an idle process: what stays, and what each phase adds to it.

Counted in numbers kept, from the code that runs (transformers 5 modelling files, TRL 1.16). A step's peak is its
largest phase. Allocators round up and keep what was freed, so a measured peak is about the formula times a factor near
one plus a constant, and whoever predicts fits both.

Names: h hidden channels, w channels of all query heads, m channels of the MLP, S tokens of a row, V vocabulary.
"""

from dataclasses import dataclass

from grpo_autotune.estimate.cost import WorkFacts
from grpo_autotune.estimate.passes import Batch, Training, square_grid
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.sharding import WHOLE, Shares
from grpo_autotune.estimate.vision_shapes import VisionShape

TILE_TOKENS, TILE_VOCAB = 4096, 32768
"""Largest tile of logits that TRL's fused head holds: the V logits of a row are never materialised in training
(`TOKEN_CHUNK_SIZE` in trl/kernels/chunked_logprob.py, `_CHUNKED_LOGPROB_CHUNK_SIZE` in trl/trainer/utils.py)."""

FORWARD_TILES, BACKWARD_TILES = 3, 7
"""Float32 tiles beside the product itself where torch folds it (no Triton). Forward: scaled logits, a temporary, their
exponentials. Backward: logits, scaled logits, log-probabilities, probabilities, gradient, and two temporaries
(`_forward_tile`, `_backward_tile` in trl/kernels/chunked_logprob.py)."""

SAMPLED_COPIES = 3
"""Float32 copies of the newest logits of every row while a token is drawn: logits, processed scores, probabilities
(`_sample` in transformers/generation/utils.py)."""

PIXEL_COPIES = 2
"""Copies of the image processor's output: the batch's, and its shuffled and split copy (`_prepare_inputs` in
trl/trainer/grpo_trainer.py)."""

MERGER_NUMBERS = 5
"""Numbers that a merger keeps per channel of a merged token: normalised input and its parts, both sides of the
activation, input of the last product (`Qwen3VLVisionPatchMerger` in modeling_qwen3_vl.py); none is checkpointed."""

PIXEL_BYTES = 4
"""The image processor's output is float32."""
DECODED_BYTES = 4
"""Bytes of a pixel in an RGB image that Pillow decoded: three channels in a word (Imaging.h, `IMAGING_TYPE_UINT8`)."""

STATE_BYTES = 4

GATHERED_LAYERS = 2
"""Layers whose parameters a rank has whole during a pass over sharded ones: the one under way, and the next, fetched
meanwhile (`fully_shard` in torch/distributed/fsdp; DeepSpeed's `stage3_prefetch_bucket_size` is about a layer)."""


@dataclass(frozen=True)
class Sizes:
    """Longest sequences and the settings that decide memory, beside `WorkFacts`."""

    prompt: float  # tokens of the longest prompt, image included
    completion: float  # tokens of the longest completion
    image_tokens: float  # language-model tokens of the largest image
    eager: bool = False  # attention keeps its scores (`attn_implementation: eager`)
    # bytes of optimizer state a trained parameter (AdamW: two moments in the parameter's type)
    moments_bytes: float = 8.0
    reference_model: bool = False  # a second model is held for the reference (full fine-tuning with a KL term)
    engine_bytes: float = 0.0  # vLLM's share of the device, 0 without an engine in this process
    engine_sleeps: bool = False  # whether it gives that back while weights are trained
    fused: bool = False  # whether kernels fold the head's tiles in place (CUDA with Triton)
    # pixels of all images that the loader decodes for a step; 0 where the model is on a GPU. TRL loads a whole
    # generation batch for every micro step, and the trainer holds those of one optimizer step at a time
    # (`get_batch_samples` in transformers/trainer.py)
    loaded_pixels: float = 0.0
    kept_images: float = 0.0  # images whose features `vision_cache` keeps, which take `feature_limit` bytes at most
    feature_limit: float = 0.0
    pixel_bytes: float = PIXEL_BYTES  # bytes of a number of the image processor's output where the model runs
    weight_copies: float = 0.0  # bytes of weights in other forms while `generate` runs
    shares: Shares = WHOLE  # what this rank holds of parameters, gradients and optimizer state
    gathers_all: bool = False  # whether sharded parameters are all gathered while completions are written

    @property
    def row(self) -> float:
        """Tokens of a row of a log-prob pass, padding included."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold."""

    weights: float  # the model, its adapters, and the reference model where there is one
    moments: float  # optimizer state, from the first step on
    gradients: float  # of what is trained
    activations: float  # what one training pass keeps for its backward pass
    backward: float  # the layer under way in the backward pass
    forward: float  # a pass without gradients at its most, in a layer or in the head
    head: float  # the tiles of logits in training
    pixels: float  # the image processor's output for a generation
    images: float  # decoded images of a step's rows
    features: float  # outputs of a frozen vision tower that are kept
    cache: float  # keys and values of `generate`
    prefill: float  # largest intermediate of the prefill; decoding's logits where they are larger
    copies: float  # weights in other forms while completions are written, and sharded ones gathered for it
    gathered: float  # parameters of the layer under way where they are sharded, and of the next
    update: float  # temporaries of the optimizer's update
    engine: float  # vLLM's share
    engine_sleeps: bool  # whether the engine's share is free in training
    accumulates: bool  # whether gradients of earlier passes are held during a pass

    @property
    def training(self) -> float:
        """Bytes of a training pass at its most, gradients included: in the head's turn everything is kept, and in the
        last layer's all gradients are there."""
        if self.accumulates:
            return self.gradients + self.activations + max(self.head, self.backward)
        return max(self.activations + max(self.head, self.backward), self.gradients + self.backward)

    @property
    def phases(self) -> dict[str, float]:
        """Bytes beyond an idle process in each phase of a step."""
        stays = self.weights + self.moments + self.pixels + self.images + self.features + self.gathered
        engine = 0.0 if self.engine_sleeps else self.engine
        return {
            "generation": stays + self.cache + self.prefill + self.copies + self.engine,
            "scoring": stays + self.forward + engine,
            "training": stays + self.training + engine,
            "optimizer": stays + self.gradients + self.update + engine,
        }

    @property
    def peak(self) -> float:
        return max(self.phases.values())


def memory(shape: ModelShape, facts: WorkFacts, sizes: Sizes) -> Memory:
    """Memory of a step on this process."""
    training = facts.training
    grid = square_grid(shape.vision, sizes.image_tokens) if shape.vision and facts.images else (0, 0)
    micro = Batch(facts.micro_batch, sizes.row, sizes.row, facts.images, grid)
    copies = facts.generation_rows
    prompts = Batch(copies, sizes.prompt, 1, facts.images, grid)
    adapters, held = training.adapters.whole * training.trainable_bytes, sizes.shares
    weights = weight_bytes(shape, training) * (2 if sizes.reference_model else 1) + adapters
    sharded = 1.0 - held.parameters
    scored = facts.micro_batch * (sizes.completion if facts.compact_head else sizes.row - 1)
    fills, padded = not facts.use_vllm, facts.padding_share > 0.0
    sampled = SAMPLED_COPIES * STATE_BYTES * copies * shape.vocab
    return Memory(
        weights=weights * held.parameters,
        moments=training.trainable * sizes.moments_bytes * held.optimizer,
        gradients=training.trainable * training.trainable_bytes * held.gradients,
        activations=kept_bytes(shape, micro, training, eager=sizes.eager, padded=padded),
        backward=backward_bytes(shape, micro, training, eager=sizes.eager, padded=padded),
        forward=max(
            largest_intermediate(shape, micro, training, eager=sizes.eager),
            head_bytes(shape, scored, training, fused=sizes.fused, tiles=FORWARD_TILES),
        ),
        head=head_bytes(shape, scored, training, fused=sizes.fused, tiles=BACKWARD_TILES),
        pixels=PIXEL_COPIES * _pixel_bytes(shape.vision, prompts, sizes.pixel_bytes),
        images=DECODED_BYTES * sizes.loaded_pixels,
        features=min(sizes.feature_limit, sizes.kept_images * _feature_bytes(shape, sizes.image_tokens, training)),
        cache=copies * sizes.row * shape.kv_bytes_per_token(training.value_bytes) if fills else 0.0,
        prefill=max(largest_intermediate(shape, prompts, training, eager=sizes.eager), sampled) if fills else 0.0,
        copies=sizes.weight_copies + weights * sharded * sizes.gathers_all if fills else 0.0,
        gathered=GATHERED_LAYERS * largest_layer_bytes(shape, training) if sharded else 0.0,
        update=training.trainable * training.trainable_bytes * held.optimizer,
        engine=sizes.engine_bytes,
        engine_sleeps=sizes.engine_sleeps,
        accumulates=facts.passes > 1,
    )


def weight_bytes(shape: ModelShape, training: Training) -> float:
    """The base model: layers as they are stored (4-bit: half a byte), embeddings, norms and vision tower in the run's
    type, since bitsandbytes packs the decoder's linear layers only."""
    layers = shape.layers * shape.layer_weights
    return layers * training.weight_bytes + (shape.parameters - layers) * training.value_bytes


def largest_layer_bytes(shape: ModelShape, training: Training) -> float:
    """Bytes of the parameters that are gathered at once: of a decoder layer, or of the embedding."""
    return max(shape.layer_parameters * training.weight_bytes, shape.head_weights * training.value_bytes)


def layer_numbers(shape: ModelShape, length: float, training: Training, *, eager: bool, padded: bool) -> float:
    """Numbers a token leaves in one decoder layer for its backward pass.

    A norm keeps its input and its output, which the projections' adapters read: 2 h; in half precision the input is
    kept in float32, and a trained weight keeps the normalised input too. Queries and keys are kept as projected where
    they are normalised, and as rotated; values as projected; under a mask (padded rows) or `eager` keys and values are
    kept repeated for every query head; then the output of attention. The MLP keeps the gate, its activation, the up
    projection and their product: 4 m. `eager` keeps the softmax of every head and pair of tokens in float32, and its
    copy in the run's type (RMSNorm, TextAttention and TextMLP in `modeling_qwen3_vl.py`; `sdpa_attention.py`). Adapters
    that cast their input keep a copy each."""
    h, w, kv, m = shape.hidden, shape.attention_width, shape.kv_width, shape.mlp
    half = training.value_bytes < STATE_BYTES
    norm = 2 + half + training.text_weights
    projected = (w + kv) * (norm - 1) if shape.qk_norm else 0
    attended = 2 * w if padded or eager else 2 * kv
    scores = shape.heads * length * (STATE_BYTES / training.value_bytes + half) if eager else 0
    copies = training.adapters.text_copied / shape.layers if training.inputs_copied else 0
    return 2 * norm * h + projected + w + attended + w + 4 * m + scores + copies


def block_numbers(vision: VisionShape, grid: tuple[int, int], *, eager: bool) -> float:
    """Numbers a patch leaves in one block of the vision tower, as `layer_numbers` counts them; the mean over blocks
    that attend to the whole image and blocks that attend to windows."""
    h, m = vision.hidden, vision.mlp
    patches, windowed = grid[0] * grid[1], vision.depth - vision.full_blocks
    pairs = (vision.full_blocks * patches**2 + windowed * vision.window_pairs(*grid)) / vision.depth
    scores = vision.heads * pairs / patches if eager else 0
    return 4 * h + 9 * h + (4 if vision.gated else 2) * m + scores


def kept_bytes(shape: ModelShape, batch: Batch, training: Training, *, eager: bool, padded: bool = False) -> float:
    """Bytes that one pass keeps for its backward pass: with checkpointing each layer's input (Chen et al. 2016,
    arXiv:1604.06174). A tower that no gradient reaches keeps nothing."""
    value = training.value_bytes
    inputs = shape.hidden * batch.tokens * value
    layer = inputs if training.checkpointing else layer_bytes(shape, batch, training, eager=eager, padded=padded)
    kept = shape.layers * layer + 3 * inputs  # embeddings, and the last norm's input and output
    vision = shape.vision
    if vision is None or not batch.patches or not training.through_tower(vision):
        return kept
    block_inputs = vision.hidden * batch.patches * value
    kept += MERGER_NUMBERS * vision.mergers * vision.merged * batch.patches / vision.merge**2 * value
    block = block_inputs if training.checkpointing else block_bytes(vision, batch, training, eager=eager)
    return kept + vision.depth * block


def layer_bytes(shape: ModelShape, batch: Batch, training: Training, *, eager: bool, padded: bool = False) -> float:
    """Bytes that one decoder layer keeps for its backward pass."""
    numbers = layer_numbers(shape, batch.length, training, eager=eager, padded=padded)
    return numbers * batch.tokens * training.value_bytes


def block_bytes(vision: VisionShape, batch: Batch, training: Training, *, eager: bool) -> float:
    """Bytes that one block of the vision tower keeps."""
    numbers = block_numbers(vision, batch.grid, eager=eager)
    numbers += training.adapters.blocks_copied / vision.depth if training.inputs_copied else 0
    return numbers * batch.patches * training.value_bytes


def backward_bytes(shape: ModelShape, batch: Batch, training: Training, *, eager: bool, padded: bool = False) -> float:
    """Bytes of one layer under way in the backward pass. Without checkpointing, its gradients; with it, what the layer
    computes again and the first of its gradients, since each frees what it was computed from."""
    if not training.checkpointing:
        return largest_intermediate(shape, batch, training, eager=eager)
    again = layer_bytes(shape, batch, training, eager=eager, padded=padded)
    if shape.vision is not None and batch.patches and training.through_tower(shape.vision):
        again = max(again, block_bytes(shape.vision, batch, training, eager=eager))
    return again + shape.mlp * batch.tokens * training.value_bytes


def largest_intermediate(shape: ModelShape, batch: Batch, training: Training, *, eager: bool) -> float:
    """Bytes of the largest moment of a pass without gradients: the MLP's three matrices or attention's copies beside
    the residual, in the decoder or in the tower, whichever is more. Scores count three times: product, masked, softmax.
    """
    value = training.value_bytes
    h, w, m = shape.hidden, shape.attention_width, shape.mlp
    scores = 3 * shape.heads * batch.length if eager else 0
    decoder = (2 * h + max(3 * m, 6 * w + scores)) * batch.tokens
    vision = shape.vision
    if vision is None or not batch.patches:
        return decoder * value
    an_image = batch.grid[0] * batch.grid[1]
    scores = 3 * vision.heads * an_image * an_image if eager else 0  # images go through attention one after another
    tower = (2 * vision.hidden + max((3 if vision.gated else 2) * vision.mlp, 8 * vision.hidden)) * batch.patches
    return max(decoder, tower + scores) * value


def head_bytes(shape: ModelShape, scored: float, training: Training, *, fused: bool, tiles: int) -> float:
    """The tile of logits with `tiles` copies, and the float32 gradient of the hidden states. A fused kernel works
    inside a tile that is allocated whole; torch makes copies of the part that the vocabulary fills."""
    rows, columns = min(scored, TILE_TOKENS), min(shape.vocab, TILE_VOCAB)
    tile = rows * (TILE_VOCAB if fused else columns) * training.value_bytes
    copies = 0.0 if fused else tiles * rows * columns * STATE_BYTES
    gradient = shape.head_weights * STATE_BYTES if training.text_weights and tiles == BACKWARD_TILES else 0.0
    return tile + copies + scored * shape.hidden * STATE_BYTES + gradient


def _feature_bytes(shape: ModelShape, tokens: float, training: Training) -> float:
    """A tower's outputs for one image: of its last block for each patch, of each merger for each token."""
    vision = shape.vision
    if vision is None:
        return 0.0
    return tokens * (vision.merge**2 * vision.hidden + (1 + vision.deepstack) * vision.out) * training.value_bytes


def _pixel_bytes(vision: VisionShape | None, batch: Batch, bytes_: float) -> float:
    """One copy of the patches' pixels: channels x frames x side^2 of each."""
    if vision is None:
        return 0.0
    return batch.patches * vision.channels * vision.temporal_patch * vision.patch**2 * bytes_
