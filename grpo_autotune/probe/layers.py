"""The probe's layers on TRL's seams: most only time a call, a few also read its arguments and its result."""

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from grpo_autotune.console import warn
from grpo_autotune.probe.collectives import Collectives
from grpo_autotune.probe.facts import ImageCollector, RewardCollector, TokenCollector
from grpo_autotune.probe.spans import SpanRecorder
from grpo_autotune.probe.stages import APART
from grpo_autotune.rollout.fidelity.meter import FidelityMeter
from grpo_autotune.rollout.metrics.scheduler import EngineMeter
from grpo_autotune.seams.layers import AttributeSlot, ClassSlot, Handle, Layer, Next, take_off, wrap
from grpo_autotune.seams.table import DEEPSPEED_STEP, TABLE, Seam, lost, reward_slots, wrap_rows


class Observer(Protocol):
    """The part of the probe that its layers use."""

    trainer: Any
    recorder: SpanRecorder
    collectives: Collectives
    watched: bool
    fidelity: FidelityMeter
    engine: EngineMeter
    tokens: TokenCollector
    images: ImageCollector
    rewards: RewardCollector
    closed: int
    rollout: tuple[list[list[int]], list[list[int]]]
    weight_sync_bytes: int | None

    def counting(self) -> bool: ...
    def see_generation(self, inputs: Any, output: dict[str, Any]) -> None: ...
    def step_ended(self, grad_norm: Any) -> None: ...


def install(probe: Observer) -> list[Handle]:
    """Put the probe's layers on every seam of its trainer; one on what may outlive the trainer (a module, a class, a
    list of rewards, a processor) holds nothing of it. A stage whose method the installed TRL lacks is named in a
    warning, and left to `other`; SeamError where it is the end of a step."""
    special: dict[str, Callable[[Observer, Seam], Layer]] = {
        "score": _score_layer,
        "rollout": _rollout_layer,
        "logps": _logps_layer,
        "rewards": _rewards_layer,
        "adapter": _switch_layer,
        "checkpointing": _switch_layer,
        "processor": _prompt_layer,
        "chat_template": _prompt_layer,
        "prepare_messages": _prompt_layer,
        "log_save_evaluate": _step_end_layer,
        "backward": _backward_layer,
    }
    if gone := lost(probe.trainer):
        warn(f"not measured, the rest is: {'; '.join(error.what for error in gone.values())}")
    rows = [row for row in TABLE if row.key not in gone]
    handles = wrap_rows(probe.trainer, [(row, special.get(row.key, _timed_layer)(probe, row)) for row in rows])
    try:
        for name, is_async, slot in reward_slots(probe.trainer):
            handles.append(wrap(slot, _reward_function_layer(probe, name, is_async)))
        handles += [*_counters(probe), *probe.engine.install(), *probe.collectives.install()]
        if (engine := sys.modules.get(DEEPSPEED_STEP.owner)) is not None:
            slot = AttributeSlot(engine.DeepSpeedEngine, DEEPSPEED_STEP.attribute)
            handles.append(wrap(slot, _timed_layer(probe, DEEPSPEED_STEP)))
        if not probe.watched:
            handles += probe.fidelity.install()
    except BaseException:
        take_off(handles)
        raise
    return handles


def _timed_layer(probe: Observer, row: Seam) -> Layer:
    stage, part, enter, leave = row.stage, row.part, probe.recorder.enter, probe.recorder.leave

    def timed(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        span = enter(stage, part)
        try:
            return call_next(*args, **kwargs)
        finally:
            leave(span)

    return timed


def _prompt_layer(probe: Observer, row: Seam) -> Layer:
    """Time prompt processing; what a reward model tokenizes counts as the reward's time."""
    recorder, timed = probe.recorder, _timed_layer(probe, row)

    def prompt(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if recorder.inside("reward"):
            return call_next(*args, **kwargs)
        return timed(call_next, *args, **kwargs)

    return prompt


def _logps_layer(probe: Observer, row: Seam) -> Layer:
    """Time a log-prob pass; TRL has one method for three of them, which caller and model tell apart."""
    recorder, trainer = probe.recorder, probe.trainer
    adapters = _adapter_state(trainer.model)

    def logps(call_next: Next, /, model: Any, *args: Any, **kwargs: Any) -> Any:
        stage, part = "policy_logprob", "old_policy"
        if recorder.inside("policy_logprob", "training_forward"):
            part = "training_forward"
        elif model is getattr(trainer, "ref_model", None) or adapters() in ("disabled", "ref"):
            stage, part = "reference_logprob", ""
        with recorder.span(stage, part):
            return call_next(model, *args, **kwargs)

    return logps


def _adapter_state(model: Any) -> Callable[[], str]:
    """A function that returns `disabled`, or the name of the model's active adapter ("" without any)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)

    def state() -> str:
        if layer is None:
            return ""
        if layer.disable_adapters:
            return "disabled"
        active = layer.active_adapter
        return active if isinstance(active, str) else ",".join(active)

    return state


def _switch_layer(probe: Observer, row: Seam) -> Layer:
    """Time entering and leaving a context around no-grad log-prob passes (without a reference, the old policy's)."""
    recorder = probe.recorder
    stage = row.stage if probe.trainer.beta != 0.0 else "policy_logprob"

    @contextmanager
    def switched(call_next: Next, /, *args: Any, **kwargs: Any) -> Iterator[Any]:
        context = call_next(*args, **kwargs)
        with ExitStack() as stack:
            with recorder.span(stage, row.part):
                entered = stack.enter_context(context)
            yield entered
            with recorder.span(stage, row.part):
                stack.close()

    return switched


def _score_layer(probe: Observer, row: Seam) -> Layer:
    recorder, trainer = probe.recorder, probe.trainer

    def score(call_next: Next, /, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.span("", row.key):
            if recorder.is_open and trainer.environment_factories is not None:
                recorder.begin("tools", "reset")  # until the rollout begins
            output = call_next(inputs, *args, **kwargs)
            if recorder.is_open and not recorder.inside(APART) and trainer.model.training:
                with recorder.span("", "probe"):
                    probe.see_generation(inputs, output)
        return output

    return score


def _rollout_layer(probe: Observer, row: Seam) -> Layer:
    """Keep prompt and completion ids as they were sampled: later TRL masks truncated completions out."""
    recorder = probe.recorder

    def rollout(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        before = recorder.current()
        if before is not None and before.part == "reset":
            recorder.end(before)
        with recorder.span(row.stage, row.part):
            result = call_next(*args, **kwargs)
        probe.rollout = result[0], result[1]
        return result

    return rollout


def _rewards_layer(probe: Observer, row: Seam) -> Layer:
    recorder = probe.recorder

    def rewards(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with recorder.span("reward"):
            scores = call_next(*args, **kwargs)
        of_further = recorder.inside("prompt", "copy")  # of `resample`, which hands over those of the chosen rows later
        if recorder.is_open and not recorder.inside(APART) and not of_further:
            probe.tokens.see_rewards(probe.closed, scores)
        return scores

    return rewards


def _reward_function_layer(probe: Observer, name: str, is_async: bool) -> Layer:
    recorder, seen = probe.recorder, probe.rewards

    def timed(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        counted = recorder.is_open and not recorder.inside(APART)
        span = None if recorder.on_main_thread() else recorder.begin_elsewhere("reward" if counted else APART, name)
        with recorder.span("reward", name):
            scores = call_next(*args, **kwargs)
        if span is not None:
            recorder.end_elsewhere(span)
        if counted:
            seen.see(name, False, time.perf_counter() - begin)
        return scores

    async def awaited(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        counted = recorder.is_open and not recorder.inside(APART)
        span = recorder.begin_elsewhere("reward" if counted else APART, name)
        scores = await call_next(*args, **kwargs)
        recorder.end_elsewhere(span)
        if counted:
            seen.see(name, True, span.host_s)
        return scores

    return awaited if is_async else timed


def _step_end_layer(probe: Observer, row: Seam) -> Layer:
    recorder = probe.recorder

    def step_end(call_next: Next, /, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.span(row.stage, row.part):
            result = call_next(tr_loss, grad_norm, *args, **kwargs)
        probe.step_ended(grad_norm)
        return result

    return step_end


def _backward_layer(probe: Observer, row: Seam) -> Layer:
    timed, collectives = _timed_layer(probe, row), probe.collectives

    def backward(call_next: Next, /, loss: Any, *args: Any, **kwargs: Any) -> Any:
        collectives.begin_backward(loss)
        return timed(call_next, loss, *args, **kwargs)

    return backward


def _counters(probe: Observer) -> list[Handle]:
    """Layers that count decoded images, runs of the image processor, and bytes of a weight sync."""
    handles = []
    processor = getattr(probe.trainer.processing_class, "image_processor", None)
    if processor is not None:
        from datasets import Image

        alive = weakref.ref(probe)

        def preprocess(call_next: Next, /, images: Any, *args: Any, **kwargs: Any) -> Any:
            if (seen := alive()) is not None and not seen.images.full and seen.counting():
                seen.images.processed[seen.closed] += _count(images)
            return call_next(images, *args, **kwargs)

        def decode(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
            if (seen := alive()) is not None and not seen.images.full and seen.counting():
                seen.images.decoded[seen.closed] += 1
            return call_next(*args, **kwargs)

        handles.append(wrap(ClassSlot(processor, "preprocess"), preprocess))
        handles.append(wrap(AttributeSlot(Image, "decode_example"), decode))
    engine = getattr(probe.trainer, "vllm_generation", None)
    if hasattr(engine, "_iter_named_params"):

        def named(call_next: Next, /, *args: Any, **kwargs: Any) -> Iterator[Any]:
            pushed = 0
            for name, parameter in call_next(*args, **kwargs):
                pushed += parameter.numel() * parameter.element_size()
                yield name, parameter
            probe.weight_sync_bytes = pushed

        handles.append(wrap(AttributeSlot(engine, "_iter_named_params"), named))
    return handles


def _count(images: Any) -> int:
    if isinstance(images, list | tuple):
        return sum(_count(image) for image in images)
    return 0 if images is None else 1
