"""Fidelity as a training metric: an unlocked engine's rollouts are watched, and the trainer logs what was seen.

The part gets the engine before there is a trainer, so its layer is on the trainer's class; it leaves when the engine
does. TRL logs the plain differences itself (`sampling/sampling_logp_difference/*`); what is added is under `rollout/`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.rollout.parts import Part, engine_of, part_of
from grpo_autotune.seams.layers import AttributeSlot, Handle, Next, wrap

if TYPE_CHECKING:
    from grpo_autotune.rollout.fidelity.meter import FidelityMeter


class FidelityLog(Part):
    """The watch on one engine's rollouts."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.meter: FidelityMeter | None = None  # made when its trainer first generates

    def install(self, generation: Any) -> list[Handle]:
        from trl.trainer.grpo_trainer import GRPOTrainer

        alive = weakref.ref(generation)

        def score(call_next: Next, trainer: Any, /, *args: Any, **kwargs: Any) -> Any:
            ours = getattr(trainer, "vllm_generation", None)
            watched = ours is not None and ours is alive() and trainer.model.training
            meter = meter_of(trainer) if watched else None
            output = call_next(trainer, *args, **kwargs)
            if meter is not None:
                for name, value in meter.see(output).items():
                    trainer._metrics["train"][name].append(value)
            return output

        handle = wrap(AttributeSlot(GRPOTrainer, "_generate_and_score_completions"), score)
        weakref.finalize(generation, handle.remove)
        return [handle]


def meter_of(trainer: Any) -> FidelityMeter | None:
    """The meter that is given every generation of a trainer, installed on first use; None with TRL's plain engine."""
    from grpo_autotune.rollout.fidelity.meter import FidelityMeter

    generation = getattr(trainer, "vllm_generation", None)
    engine, log = engine_of(generation), part_of(generation, FidelityLog)
    if engine is None or log is None:
        return None
    if log.meter is None:
        log.meter = FidelityMeter(trainer)
        engine.handles += log.meter.install()
    return log.meter
