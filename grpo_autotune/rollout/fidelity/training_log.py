"""Fidelity as a training metric: an unlocked engine's rollouts are watched, and the trainer logs what was seen.

The part gets the engine before there is a trainer, so its layer is on the trainer's class; it leaves when the engine
does. TRL logs the plain differences itself (`sampling/sampling_logp_difference/*`); what is added is under `rollout/`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from grpo_autotune.rollout.colocate.unlock import engine_of
from grpo_autotune.rollout.fidelity.meter import FidelityMeter
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.seams.layers import AttributeSlot, Handle, wrap

_PART = "fidelity"


def install(generation: Any, options: EngineOptions) -> list[Handle]:
    """Watch the trainer that this engine generates for."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    alive = weakref.ref(generation)

    def score(call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
        ours = getattr(trainer, "vllm_generation", None)
        if ours is None or ours is not alive() or not trainer.model.training:
            return call_next(trainer, *args, **kwargs)
        meter = meter_of(trainer)
        output = call_next(trainer, *args, **kwargs)
        for name, value in meter.see(output).items():
            trainer._metrics["train"][name].append(value)
        return output

    handle = wrap(AttributeSlot(GRPOTrainer, "_generate_and_score_completions"), score)
    weakref.finalize(generation, handle.remove)
    return [handle]


def meter_of(trainer: Any) -> FidelityMeter:
    """The meter of a trainer whose engine is unlocked, made and installed on first use."""
    engine = engine_of(trainer.vllm_generation)
    if engine is None:
        raise ValueError("the trainer's engine is not unlocked")
    if _PART not in engine.parts:
        meter = engine.parts[_PART] = FidelityMeter(trainer)
        engine.handles += meter.install()
    found: FidelityMeter = engine.parts[_PART]
    return found


def is_watched(trainer: Any) -> bool:
    """Whether `meter_of` has a meter that is given every generation without anybody's doing."""
    generation = getattr(trainer, "vllm_generation", None)
    return generation is not None and engine_of(generation) is not None
