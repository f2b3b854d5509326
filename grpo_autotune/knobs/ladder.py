"""The ladder of a training that ran out of memory: settings that need less, those that learn the same first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.apply import GROUP, MICRO, Knobs, kind_of, knobs_of, same_value, why_not, with_knobs
from grpo_autotune.knobs.context import context_of
from grpo_autotune.knobs.table import PROMPTS, Kind
from grpo_autotune.knobs.values import divisors
from grpo_autotune.records.alerts import Rung
from grpo_autotune.speedups.selection import selections

RANK, IMAGE, LENGTH = "peft.r", "data.image_size", "grpo.max_completion_length"
CHECKPOINTING, SPEED_UPS = "grpo.gradient_checkpointing", "speedups"
SHARE, SEQUENCES = "vllm.gpu_memory_utilization", "vllm.max_num_seqs"

LEAST_SHARE = 0.1
"""Share of memory below which an engine is not pressed."""

Stage = Literal["training", "generation", "engine"]
"""The part of a run that ran out: `engine` is vLLM, or the start-up beside it."""

CONSENTS = {"micro_batch": MICRO, "image_size": IMAGE, "lora_rank": RANK, "num_generations": GROUP,
            "max_completion_length": LENGTH}  # fmt: skip
"""Item of `on_oom_allow` -> the knob that it lets change what is learned."""

OF_TRAINING = {MICRO, CHECKPOINTING}
HELPLESS: dict[Stage, set[str]] = {
    "training": set(),
    "generation": OF_TRAINING,
    "engine": {*OF_TRAINING, *CONSENTS.values(), SPEED_UPS},
}
"""Stage -> knobs that change nothing in its memory."""


def next_rung(
    config: RunConfig, machine: Machine | None, stage: Stage = "training", taken: Sequence[Knobs] = ()
) -> Knobs | None:
    """The next values by which the stage that ran out needs less memory; None where none is left. Of those that change
    what is learned each comes in turn, by how often it was `taken`."""
    times = Counter(key for knobs in taken for key in knobs)
    allowed = sorted((CONSENTS[name] for name in config.on_oom_allow), key=lambda key: times[key])
    candidates = chain(_exact(config), (_lowered(config, key) for key in allowed))
    helpful = (knobs for knobs in candidates if not HELPLESS[stage] & knobs.keys())
    return next((knobs for knobs in helpful if _applies(config, knobs, machine)), None)


def kind_of_rung(config: RunConfig, knobs: Knobs) -> Kind:
    """`learning` where a value changes what is learned, else `exact`."""
    changed = [key for key, value in knobs_of(config, knobs).items() if not same_value(value, knobs[key])]
    return "learning" if any(kind_of(config, key) == "learning" for key in changed) else "exact"


def descended(config: RunConfig, rungs: Sequence[Rung]) -> tuple[RunConfig, list[Rung]]:
    """The configuration at the foot of the rungs, and those that changed it: one whose values the user has changed
    meanwhile says nothing."""
    held = []
    for rung in rungs:
        if all(same_value(value, rung.before[key]) for key, value in knobs_of(config, rung.knobs).items()):
            config = with_knobs(config, rung.knobs)
            held.append(rung)
    return config, held


def _exact(config: RunConfig) -> Iterator[Knobs]:
    micro = config.batch.micro_batch
    yield {MICRO: divisors(micro)[-2] if micro > 1 else 1}
    wanted, holding = selections(config.speedups), _holding(config)
    if holding & {one.name for one in wanted}:
        kept = [one for one in wanted if one.name not in holding]
        yield {SPEED_UPS: [{"name": one.name, **one.options} if one.options else one.name for one in kept] or "none"}
    yield {CHECKPOINTING: True}
    yield from _engine(config)


def _holding(config: RunConfig) -> set[str]:
    """Speed-ups that hold memory of their own here: merged weights while completions are written, images' features."""
    known = context_of(config)
    dtype = known.model.get("dtype", known.text.get("dtype")) if config.model.dtype == "auto" else config.model.dtype
    merges = config.peft is not None and not config.use_vllm and dtype not in ("bfloat16", "float16")
    return ({"merge_for_generation"} if merges else set()) | ({"vision_cache"} if known.images is not False else set())


def _engine(config: RunConfig) -> Iterator[Knobs]:
    values = knobs_of(config, (SHARE, SEQUENCES))
    share, sequences = round(0.85 * values[SHARE], 3), max(1, int(0.75 * values[SEQUENCES]))
    if config.use_vllm and share >= LEAST_SHARE:
        yield {SHARE: share, SEQUENCES: sequences}
        yield {SHARE: share}


def _lowered(config: RunConfig, key: str) -> Knobs:
    """Three quarters of a length, half of another number; the prompts of a step stay as many."""
    value = knobs_of(config, (key,))[key]
    if value is None:
        return {}
    lower: dict[str, Any] = {key: max(1, 3 * value // 4 if key in (IMAGE, LENGTH) else value // 2)}
    return {**lower, **knobs_of(config, (PROMPTS,))} if key == GROUP else lower


def _applies(config: RunConfig, knobs: Knobs, machine: Machine | None) -> bool:
    changed = [key for key, value in knobs_of(config, knobs).items() if not same_value(value, knobs[key])]
    consents = {CONSENTS[name] for name in config.on_oom_allow}
    if not changed or any(kind_of(config, key) == "learning" and key not in consents for key in changed):
        return False
    return why_not(config, knobs, machine) is None
