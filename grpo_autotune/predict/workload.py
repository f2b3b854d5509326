"""A configuration's work before it ran: what the probe saw, carried over to other knob values.

Lengths come from the probe's distribution; a batch is padded to the longest of its rows, so the expected longest of n
draws stands for it. Tokens of an image at another size come from the processor where the probe asked it, else from the
square law on the grid of tokens.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_autotune.config.batch import BatchPlan
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.cost import WorkFacts, facts_from_records
from grpo_autotune.estimate.engine import BYTES, FLOAT_BYTES
from grpo_autotune.estimate.memory import PIXEL_BYTES, Sizes
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.estimate.sharding import MASTER_BYTES, sent_bytes, shares_of
from grpo_autotune.estimate.vision_shapes import image_tokens
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import engine, knobs_of
from grpo_autotune.knobs.apply import same_value
from grpo_autotune.knobs.context import gpu_bytes, pixel_bounds
from grpo_autotune.knobs.sharding import ZERO_KNOBS
from grpo_autotune.predict.speedups import effective, tower_is_kept, weight_copies
from grpo_autotune.records.probe import ImageFacts, ProbeRecord, Sharding, Spread, TokenFacts, TrainerFacts
from grpo_autotune.rollout.failures import CPU_SPACE
from grpo_autotune.speedups.base import FEATURE_BYTES
from grpo_autotune.speedups.batches.passes import Part, Row, planned
from grpo_autotune.speedups.selection import chosen
from grpo_autotune.units import GIB

PLACES = np.linspace(0.0, 1.0, 201)
MOST_PADDING = 0.99
STEPS_KEPT = 4
"""Steps of a trial, whose images' features `vision_cache` keeps; a run fills its memory to the limit in time."""
SMALL_MOMENTS = {"8bit": 2.0}
"""Bytes of Adam's moments a parameter, by a word in `grpo.optim`; else two moments in the parameter's own type."""


@dataclass(frozen=True)
class Workload:
    """Input of the models: the work of one configuration."""

    shape: ModelShape | None  # the model's sizes; None for an architecture without formulas
    facts: WorkFacts  # work of an optimizer step
    sizes: Sizes  # what memory depends on beside it
    trainer: TrainerFacts  # under this configuration
    pixels: float  # of an image as the data set holds it
    rows_loaded: float  # rows that the loader hands out in an optimizer step
    generations: float  # generations an optimizer step
    speedups: frozenset[str]  # those that are asked for and that this setting lets work
    merged: float = 1.0  # micro batches of a training pass
    waves: float = 1.0  # how often the completions of a generation take turns in the engine
    # bytes that a rank which shares a model sends in an optimizer step, by part of `features.PARTS`
    sent: Mapping[str, float] = field(default_factory=dict)
    wakes: bool = True  # whether the engine is put to sleep and woken, where the probe's was


def workload(
    config: RunConfig,
    base: RunConfig,
    record: ProbeRecord,
    machine: Machine,
    *,
    measured: bool = False,
    seen_tokens: Mapping[str, float] | None = None,
    worst_case: bool = False,
) -> Workload:
    """The work of `config`, made from `base` by turning knobs, of which `record` is a probe; where `measured`, that is
    of `config` itself, so that its padding is known. Trials have `seen_tokens` of an image at some sizes (keys as in
    `data.image_size`). The worst case has the longest prompts, the largest images and full-length completions."""
    shape = shape_of(record)
    trainer = _trainer(config, base, record)
    tokens, images, pixels = _tokens(config, base, record, seen_tokens or {})
    plan, cap = config.batch, trainer.max_completion_length
    tokens, longest_prompt = _in_batch(tokens, plan, cap, worst_case=worst_case)
    facts = facts_from_records(
        shape or TEXT_ONLY, trainer, tokens, images, old_policy=_old_policy(config, base, record)
    )
    if not measured:
        padded = _padded(tokens, longest_prompt)
        if not worst_case:
            padded *= _padding_beyond_formula(base, record)
        facts = replace(facts, padding_share=1.0 - 1.0 / max(1.0, padded))
    completion = tokens.completion.max
    grid = images.tokens if images is not None else None
    image_max = 0.0 if grid is None else grid.max if worst_case else grid.mean
    speedups, on_gpu = effective(config, trainer), trainer.device.startswith("cuda")
    prompts = plan.micro_batch * plan.accumulation / plan.num_generations
    batches = 1 if "images_once" in chosen(config.speedups) else plan.accumulation  # TRL loads one every micro step
    rows_loaded = float(plan.micro_batch * plan.steps_per_generation * batches)
    sharding, by_token = trainer.sharding, config.grpo.get("ds3_gather_for_generation") is False
    gathers_all = sharding is not None and sharding.name == "ZeRO-3" and not by_token
    gathers = 1.0 if gathers_all or trainer.use_vllm else facts.longest_completion
    generations = plan.accumulation / (plan.steps_per_generation * plan.num_iterations)
    sizes = Sizes(
        prompt=longest_prompt,
        completion=completion,
        image_tokens=image_max,
        eager=trainer.attn_implementation == "eager",
        moments_bytes=_moments_bytes(config, facts, sharding),
        reference_model=trainer.has_ref_model and trainer.beta != 0,
        engine_bytes=_engine_bytes(config, machine, record, shape, longest_prompt + completion, worst_case=worst_case),
        engine_sleeps=engine.sleep_level(config) > 0,
        fused=facts.compact_head,
        loaded_pixels=rows_loaded * pixels * facts.images if trainer.device == "cpu" else 0.0,
        kept_images=STEPS_KEPT * prompts * facts.images if tower_is_kept(facts, speedups) else 0.0,
        feature_limit=FEATURE_BYTES,
        pixel_bytes=facts.training.value_bytes if on_gpu and "images_once" in speedups else PIXEL_BYTES,
        weight_copies=0.0 if shape is None else weight_copies(shape, facts.training, speedups, on_gpu=on_gpu),
        shares=shares_of(sharding, on_gpu=on_gpu),
        gathers_all=gathers_all,
    )
    return Workload(
        shape=shape,
        facts=facts,
        sizes=sizes,
        trainer=trainer,
        pixels=pixels,
        rows_loaded=rows_loaded,
        generations=generations,
        speedups=speedups,
        merged=_merged(plan, facts, longest_prompt + completion, speedups, trainer.device),
        waves=engine.waves(config),
        sent=sent_bytes(sharding, facts, trainer.parameters * facts.training.weight_bytes, generations * gathers),
        wakes=engine.sleep_level(config) > 0 or engine.sleep_level(base) == 0,
    )


def _in_batch(tokens: TokenFacts, plan: BatchPlan, cap: int, *, worst_case: bool = False) -> tuple[TokenFacts, float]:
    """Token counts whose longest completion is the one expected in a generation, and its longest prompt."""
    rows = plan.micro_batch * plan.steps_per_generation
    prompts = max(1.0, rows / plan.num_generations)
    longest_prompt = tokens.prompt.max if worst_case else expected_longest(tokens.prompt, prompts)
    longest = float(cap) if worst_case else expected_longest(tokens.completion, rows, cap)
    mean = float(cap) if worst_case else mean_length(tokens.completion, cap)
    lengths = tokens.completion.model_copy(update={"mean": mean, "max": longest})
    return tokens.model_copy(update={"completion": lengths}), longest_prompt


def _padded(tokens: TokenFacts, longest_prompt: float) -> float:
    """Tokens of a row that is padded to the longest prompt and completion, over those that it holds."""
    return (longest_prompt + tokens.completion.max) / (tokens.prompt.mean + tokens.completion.mean)


def _padding_beyond_formula(base: RunConfig, record: ProbeRecord) -> float:
    """Padded tokens that the probe measured over those of the formula: the base is predicted as it was measured."""
    assert record.tokens is not None
    formula = max(1.0, _padded(*_in_batch(record.tokens, base.batch, record.trainer.max_completion_length)))
    return 1.0 / (1.0 - min(record.tokens.padding_share, MOST_PADDING)) / formula


def _merged(plan: BatchPlan, facts: WorkFacts, row: float, speedups: frozenset[str], device: str) -> float:
    """Micro batches of a training pass, for rows of mean length, padded to `row` tokens, sorted by prompt in a step."""
    window = min(plan.accumulation, plan.steps_per_generation)
    if "merge_passes" not in speedups or max(plan.accumulation, plan.steps_per_generation) % window:
        return 1.0
    micro = plan.micro_batch
    rows = [Row(n // plan.num_generations, facts.prompt_tokens, facts.completion_tokens) for n in range(window * micro)]
    parts = [Part(None, rows[begin : begin + micro]) for begin in range(0, len(rows), micro)]
    shared, by_launches = "shared_prefix" in speedups, device.startswith("cuda")
    return window / len(planned(parts, micro * row, shared=shared, by_launches=by_launches))


def expected_longest(lengths: Spread, draws: float, cap: float | None = None) -> float:
    """Expected longest of so many draws: the quantile n / (n + 1), cut off at `cap`."""
    longest = float(quantiles(lengths, np.array([draws / (draws + 1.0)]))[0])
    return min(longest, cap) if cap else longest


def mean_length(lengths: Spread, cap: float | None = None) -> float:
    """Mean length, each cut off at `cap`."""
    if not cap or cap >= lengths.max:
        return lengths.mean
    curve = quantiles(lengths, PLACES)
    return float(np.minimum(curve, cap).mean() / curve.mean() * lengths.mean)


def quantiles(lengths: Spread, places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths at places between 0 and 1: lines through the percentiles of a record, from a least length, which is not
    recorded, that gives the recorded mean."""
    above = 0.4 * (lengths.p50 + lengths.p90) / 2 + 0.09 * (lengths.p90 + lengths.p99) / 2
    above += 0.01 * (lengths.p99 + lengths.max) / 2
    least = min(lengths.p50, max(1.0, (lengths.mean - above) * 4 - lengths.p50))
    return np.interp(places, [0.0, 0.5, 0.9, 0.99, 1.0], [least, lengths.p50, lengths.p90, lengths.p99, lengths.max])


def tokens_at(side: int, record: ProbeRecord, base: RunConfig, seen: Mapping[str, float]) -> float | None:
    """Tokens of an image whose longest side is at most `side` pixels; None where images have no grid. A size that was
    seen answers for itself. An image smaller than `side` stays as it is; else the nearest known size is scaled as the
    processor would scale a square."""
    images = record.images
    if images is None or images.tokens is None:
        return None
    if str(side) in seen:
        return seen[str(side)]
    now_side = float(base.data.image_size or math.sqrt(images.pixels.p50))
    if side >= now_side and base.data.image_size is None:
        return images.tokens.mean
    if str(side) in images.tokens_at:
        return images.tokens_at[str(side)]
    known = {now_side: images.tokens.mean, **{float(s): n for s, n in images.tokens_at.items()}}
    near = min(known, key=lambda s: abs(math.log(s / side)))
    vision = record.trainer.model_config_json.get("vision_config") or {}
    unit = int(vision.get("patch_size") or 16) * int(vision.get("spatial_merge_size") or 2)
    bounds = pixel_bounds(base)
    return known[near] * image_tokens(side, side, unit, bounds) / image_tokens(near, near, unit, bounds)


def shape_of(record: ProbeRecord) -> ModelShape | None:
    """The sizes of the probed model; None for an architecture without formulas."""
    try:
        return ModelShape.from_config(record.trainer.model_config_json)
    except ConfigError:
        return None


def _trainer(config: RunConfig, base: RunConfig, record: ProbeRecord) -> TrainerFacts:
    """The trainer's facts under `config`: the probe's, with what the turned knobs change."""
    facts, plan = record.trainer, config.batch
    update: dict[str, Any] = {
        "num_generations": plan.num_generations,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_generation": plan.steps_per_generation,
        "num_iterations": plan.num_iterations,
        "generation_batch_size": plan.generation_batch,
    }
    for key in ("gradient_checkpointing", "use_vllm", "max_completion_length", "beta", "dataloader_num_workers"):
        value = _turned(config, base, f"grpo.{key}")
        if value is not None:
            update[key] = value
    kernel = _turned(config, base, "model.attn_implementation")
    if config.model.attn_implementation != base.model.attn_implementation:
        update["attn_implementation"] = kernel or "sdpa"
    rank = _turned(config, base, "peft.r")
    if rank is not None and facts.peft:
        update["trainable_parameters"] = facts.trainable_parameters * rank / facts.peft.get("r", rank)
        update["peft"] = {**facts.peft, "r": rank}
    if config.speedups != base.speedups:
        update["speedups"] = chosen(config.speedups)
    update["sharding"] = _sharding(config, facts.sharding)
    packed = _turned(config, base, "model.load_in_4bit")
    if packed is not None:
        quantization = {"load_in_4bit": True} if packed else None
        update["model_config_json"] = {**facts.model_config_json, "quantization_config": quantization}
    return facts.model_copy(update=update)


def _sharding(config: RunConfig, probed: Sharding | None) -> Sharding | None:
    """The parts that ranks share under `config`, which tells where it asks for DeepSpeed; else what the probe saw."""
    if probed is None or not config.grpo.get("deepspeed"):
        return probed
    stage, optimizer, parameters = (knobs_of(config, ZERO_KNOBS)[key] for key in ZERO_KNOBS)
    update = {"offload_optimizer": optimizer != "none", "offload_parameters": parameters != "none"}
    return probed.model_copy(update={"name": f"ZeRO-{stage}", **update})


def _turned(config: RunConfig, base: RunConfig, key: str) -> Any:
    """The knob's value where it differs from the base's, else None."""
    before, value = knobs_of(base, [key])[key], knobs_of(config, [key])[key]
    return None if same_value(before, value) else value


def _tokens(
    config: RunConfig, base: RunConfig, record: ProbeRecord, seen: Mapping[str, float]
) -> tuple[TokenFacts, ImageFacts | None, float]:
    """Token counts, image counts and pixels of an image at the configuration's size."""
    tokens, images = record.tokens, record.images
    assert tokens is not None
    if images is None:
        return tokens, None, 0.0
    side, pixels, now = config.data.image_size, images.pixels.mean, images.tokens
    if now is None or side is None or side == base.data.image_size:
        return tokens, images, pixels
    pixels *= min(1.0, side**2 / (base.data.image_size or math.sqrt(images.pixels.p50)) ** 2)
    after = tokens_at(side, record, base, seen) or now.mean
    fewer = images.per_prompt * (now.mean - after)
    grid = Spread(**{name: n * after / now.mean for name, n in now})
    prompt = Spread(**{name: max(1.0, n - fewer) for name, n in tokens.prompt})
    return tokens.model_copy(update={"prompt": prompt}), images.model_copy(update={"tokens": grid}), pixels


def _old_policy(config: RunConfig, base: RunConfig, record: ProbeRecord) -> bool | None:
    """True if the old policy's pass was seen; TRL's rule where the batch's timing or the engine is another."""
    row = next((row for row in record.timings.stages if row.name == "policy_logprob"), None)
    parts = sum(row.parts.get("old_policy", [])) > 0 if row is not None else None
    plans = (base.batch, config.batch)
    aligned = [(p.accumulation % (p.steps_per_generation * p.num_iterations), p.num_iterations) for p in plans]
    return parts if aligned[0] == aligned[1] and config.use_vllm == base.use_vllm else None


def _moments_bytes(config: RunConfig, facts: WorkFacts, sharding: Sharding | None) -> float:
    if sharding is not None and sharding.name != "FSDP2":
        return MASTER_BYTES
    optim = str(config.grpo.get("optim") or "")
    return next((size for word, size in SMALL_MOMENTS.items() if word in optim), 2.0 * facts.training.trainable_bytes)


def _engine_bytes(
    config: RunConfig, machine: Machine, record: ProbeRecord, shape: ModelShape | None, row: float, *, worst_case: bool
) -> float:
    """The engine's memory in the training process. On a GPU its share is taken whole. On a CPU its keys and values are
    promised and filled as they are used: those of a generation at first, in the end all."""
    if not config.use_vllm or config.vllm.at_server:
        return 0.0
    if (whole := gpu_bytes(machine, record.trainer)) is not None:
        return engine.share_of(config) * whole
    if shape is None:
        return 0.0
    need = engine.need(shape, config, row, row, BYTES.get(config.model.dtype, FLOAT_BYTES))
    fixed, space = need.weights + need.activations, os.environ.get(CPU_SPACE)
    room = float(space) * GIB if space else max(0.0, engine.share_of(config) * machine.memory_bytes - fixed)
    return fixed + (room if worst_case else min(room, engine.running(config) * need.row))


SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
TEXT_ONLY = ModelShape.from_config({**dict.fromkeys(SIZES, 1), "tie_word_embeddings": True})
"""Stands in where an architecture has no formulas: `facts_from_records` then reads the counts alone."""
