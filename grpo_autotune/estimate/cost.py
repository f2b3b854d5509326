"""Operations and bytes of one optimizer step, stage by stage, and the least time a machine needs for it.

The step is TRL 1.16's: prompts are generated from and scored once a copy, nothing is shared inside a group. The limit
is the roofline of Williams, Waterman and Patterson 2009 (doi:10.1145/1498765.1498785): a phase takes at least the
longer of its operations over the matrix rate and its bytes over the memory bandwidth.
"""

from dataclasses import dataclass, replace

from grpo_autotune.estimate.adapters import NO_ADAPTERS, AdapterSizes, adapter_sizes
from grpo_autotune.estimate.passes import Batch, Training, Work, attention_flops, backward, forward, square_grid
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.records.probe import ImageFacts, TokenFacts, TrainerFacts

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PACKED_BYTES = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}
"""Bytes of a weight under bitsandbytes, by the key of `quantization_config` that asks for it; block scales left out."""

ADAM_VALUES_MOVED = 7
"""A parameter: it, its gradient and both moments are read, all but the gradient written (Kingma, Ba 2015, alg. 1)."""

ADAM_FLOPS = 14
"""A parameter: first moment 3, second 4, bias corrections and quotient 4, step 2, decay 1 (same source)."""


@dataclass(frozen=True)
class WorkFacts:
    """Plain numbers of a run, on this process; means over steps unless said otherwise."""

    micro_batch: int  # sequences of one training pass
    passes: int  # training passes an optimizer step (gradient accumulation)
    generation_rows: int  # sequences generated at a time
    iterations: int  # times each generated sequence is trained on
    group: int  # completions of each prompt
    prompt_tokens: float  # tokens of a prompt, image tokens included
    completion_tokens: float  # tokens of a completion
    longest_completion: float  # tokens of the longest completion generated at a time
    padding_share: float  # share of the log-prob passes' tokens that is padding, 0 to 1
    images: float  # images of a prompt
    image_tokens: float  # language-model tokens of an image
    use_vllm: bool  # vLLM generates: finished sequences leave the batch, and a group's prompt is prefilled once
    old_policy: bool  # whether the no-grad pass of the old policy runs
    reference: bool  # whether the reference pass runs (with adapters off, or on a model of its own)
    compact_head: bool  # the LM head projects completion positions only (CUDA with Triton), else every position
    training: Training  # what is trained, and in how many bytes
    tokens_share: float = 1.0  # share of plain TRL's tokens that the log-prob passes forward; below 1 under a speed-up
    # share of plain TRL's images that the vision tower runs on, in the passes and in generation
    tower_share: float = 1.0
    prefill_share: float = 1.0  # share of the prompts that generation reads
    decode_share: float = 1.0  # share of the rows that decoding steps run

    @property
    def row_tokens(self) -> float:
        """Tokens of a row of a log-prob pass, padding included."""
        return (self.prompt_tokens + self.completion_tokens) / (1 - min(self.padding_share, 0.99))


def stage_work(shape: ModelShape, facts: WorkFacts) -> dict[str, Work]:
    """Work of one optimizer step on this process, by stage; stages that only wait or run user code have none."""
    parts = policy_parts(shape, facts)
    batch = training_batch(shape, facts)
    values = ADAM_VALUES_MOVED * facts.training.trainable
    work = {
        "generation": generation_work(shape, facts),
        "policy_logprob": sum(parts.values(), Work()),
        "backward": backward(shape, batch, facts.training) * facts.passes,
        "optimizer": Work(((ADAM_FLOPS * facts.training.trainable, values * facts.training.trainable_bytes),)),
    }
    if facts.reference:
        scored = forward(shape, batch, facts.training, adapters=False)
        work["reference_logprob"] = scored * (facts.passes / facts.iterations)
    return work


def policy_parts(shape: ModelShape, facts: WorkFacts) -> dict[str, Work]:
    """Work of `policy_logprob` by part: `training_forward`, and `old_policy` where that pass runs."""
    one = forward(shape, training_batch(shape, facts), facts.training)
    parts = {"training_forward": one * facts.passes}
    if facts.old_policy:
        parts["old_policy"] = one * (facts.passes / facts.iterations)
    return parts


def training_batch(shape: ModelShape, facts: WorkFacts) -> Batch:
    """Batch of one log-prob pass: prompt and completion of each row, image included; what a speed-up leaves out makes
    rows shorter on average."""
    return Batch(
        rows=facts.micro_batch,
        length=facts.row_tokens * facts.tokens_share,
        held=facts.row_tokens * (1.0 - facts.tokens_share),
        scored=facts.completion_tokens if facts.compact_head else facts.row_tokens - 1,
        images=facts.images * facts.tower_share,
        grid=square_grid(shape.vision, facts.image_tokens) if shape.vision else (0, 0),
    )


def generation_work(shape: ModelShape, facts: WorkFacts) -> Work:
    """Prefill of the prompts and decoding of the completions, a token of every sequence at a time: a step reads every
    weight once and the keys and values of all sequences so far. `generate` of transformers decodes all rows until the
    longest is done; vLLM drops those that are."""
    copies = facts.generation_rows / facts.group if facts.use_vllm else facts.generation_rows * facts.prefill_share
    prompts = replace(training_batch(shape, facts), rows=copies, length=facts.prompt_tokens, held=0.0, scored=1)
    steps = max(facts.longest_completion - 1, 0.0)
    decoded = max(facts.completion_tokens - 1, 0.0) if facts.use_vllm else steps * facts.decode_share
    prefill, decode = forward(shape, prompts, facts.training), _decode(shape, facts, steps, decoded)
    return (prefill + decode) * (facts.micro_batch * facts.passes / facts.generation_rows / facts.iterations)


def _decode(shape: ModelShape, facts: WorkFacts, steps: float, decoded: float) -> Work:
    """`steps` decoding steps, in which every row computes `decoded` tokens."""
    training = facts.training
    adapters = training.adapters.text
    weights = shape.layers * shape.layer_weights + shape.head_weights + adapters
    attended = decoded * facts.prompt_tokens + decoded * (decoded + 1) / 2
    flops = 2 * weights * facts.generation_rows * decoded + attention_flops(shape, facts.generation_rows, attended)
    read = shape.layers * shape.layer_parameters * training.weight_bytes + shape.head_weights * training.value_bytes
    read += adapters * training.trainable_bytes
    cache = facts.generation_rows * attended * shape.kv_bytes_per_token(training.value_bytes)
    return Work(((flops, steps * read + cache),))


def limit_seconds(work: Work, matrix_flops_s: float, memory_bytes_s: float) -> float:
    """Least seconds for `work` at a matrix rate (operations per second) and a memory bandwidth (bytes per second)."""
    return sum(max(flops / matrix_flops_s, moved / memory_bytes_s) for flops, moved in work.phases)


def facts_from_records(
    shape: ModelShape,
    trainer: TrainerFacts,
    tokens: TokenFacts,
    images: ImageFacts | None = None,
    *,
    old_policy: bool | None = None,
) -> WorkFacts:
    """Read the facts off a probe's records; images without a patch grid count as none. `old_policy` tells whether that
    pass was seen to run; where it is not given, TRL's own rule decides."""
    misaligned = trainer.gradient_accumulation_steps % (trainer.steps_per_generation * trainer.num_iterations) != 0
    seen = images if images is not None and images.tokens is not None else None
    return WorkFacts(
        micro_batch=trainer.per_device_train_batch_size,
        passes=trainer.gradient_accumulation_steps,
        generation_rows=trainer.per_device_train_batch_size * trainer.steps_per_generation,
        iterations=trainer.num_iterations,
        group=trainer.num_generations,
        prompt_tokens=tokens.prompt.mean,
        completion_tokens=tokens.completion.mean,
        longest_completion=tokens.completion.max,
        padding_share=tokens.padding_share,
        images=seen.per_prompt if seen else 0.0,
        image_tokens=seen.tokens.mean if seen and seen.tokens else 0.0,
        use_vllm=trainer.use_vllm,
        old_policy=misaligned or trainer.use_vllm if old_policy is None else old_policy,
        reference=trainer.beta != 0,
        compact_head=trainer.device.startswith(("cuda", "xpu")),
        training=training_of(shape, trainer),
    )


def training_of(shape: ModelShape, trainer: TrainerFacts) -> Training:
    """Trained parameters and their number formats, from the trainer's facts. A tower is taken as frozen in full
    fine-tuning when no more is trained than the decoder has. PEFT keeps adapters in float32
    (`autocast_adapter_dtype`), TRL those of a quantized base in bfloat16; other weights have the dtype that the model's
    config names, activations the run's."""
    peft, trained = trainer.peft, trainer.trainable_parameters
    adapters: AdapterSizes = adapter_sizes(shape, peft) if peft else NO_ADAPTERS
    config = trainer.model_config_json
    quantization = config.get("quantization_config") or {}
    stored_bytes = VALUE_BYTES.get(config.get("dtype") or trainer.dtype, 4)
    weight_bytes = next((size for key, size in PACKED_BYTES.items() if quantization.get(key)), stored_bytes)
    return Training(
        text_weights=not peft,
        vision_weights=not peft and trained > shape.text_parameters,
        adapters=adapters,
        checkpointing=trainer.gradient_checkpointing,
        attention_backward=2.0 if trainer.attn_implementation == "eager" else 2.5,
        value_bytes=VALUE_BYTES.get(trainer.dtype, 4),
        weight_bytes=weight_bytes,
        trainable_bytes=4 if peft else stored_bytes,
        trainable=trained,
        inputs_copied=bool(peft)
        and VALUE_BYTES.get(trainer.dtype, 4) < 4
        and not quantization
        and not {"lora_input", "fused_lora"} & {*trainer.speedups},
    )
