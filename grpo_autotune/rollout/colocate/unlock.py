"""Entrances to TRL's engine: it is given every key that was asked for, and the parts that put it right.

`VLLMGeneration.__init__` is where TRL decides on the engine, and the global `LLM` of its module is what it calls there;
both are wrapped on the class and the module, since trainers build theirs inside their own constructor. That one is
wrapped too, for the data whose images the engine is sized for, and to mend the finished trainer.
"""

import functools
import importlib
import inspect
import operator
import time
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any

from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.rollout.colocate.dtype import TrainerDtype
from grpo_autotune.rollout.colocate.image_sizes import image_sizes
from grpo_autotune.rollout.colocate.placeholders import OnePlaceholder, ServedImageTokens
from grpo_autotune.rollout.colocate.processors import TrainerProcessor
from grpo_autotune.rollout.colocate.requests import JoinedRequests
from grpo_autotune.rollout.fidelity.training_log import FidelityLog
from grpo_autotune.rollout.options import EngineOptions, SleepLevel, WeightSync
from grpo_autotune.rollout.parts import MARK, Engine, Part, engine_of
from grpo_autotune.rollout.server.client import ServerSync
from grpo_autotune.rollout.sync.sync import ColocateSync
from grpo_autotune.seams import mixed_image_rows
from grpo_autotune.seams.import_hooks import ENGINE_MODULE, TRAINER_MODULE
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, take_off, wrap

PARTS: dict[str, tuple[type[Part], ...]] = {
    "colocate": (TrainerDtype, ColocateSync, TrainerProcessor, OnePlaceholder, JoinedRequests, FidelityLog),
    "server": (ServerSync, ServedImageTokens, FidelityLog),
}
"""By TRL's mode, in the order of installation: of equal order, a later part's layers lie outside an earlier one's on
the same seam."""


class Unlocked(AbstractContextManager["Unlocked"]):
    """The unlocking, in force until `close` for trainers to come, and on those built meanwhile until `remove`."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._entrances: list[Handle] = []
        self._engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self._building: list[tuple[Any, Engine]] = []
        self._data: list[tuple[Any, ...]] = []
        self._signature = self._trainer_signature = inspect.Signature()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Trainers built from here on get TRL's plain engine."""
        take_off(self._entrances)

    def remove(self) -> None:
        """`close`, and take every layer off the engines there are; an engine keeps the arguments it was built with."""
        self.close()
        for generation in self._engines:
            vars(generation).pop(MARK).take_off()
        self._engines.clear()

    def enter(self, module: ModuleType) -> None:
        """Wrap the entrances of `trl.generation.vllm_generation`."""
        self._signature = inspect.signature(module.VLLMGeneration.__init__)
        self._entrances.append(wrap(AttributeSlot(module.VLLMGeneration, "__init__"), self._built, INNER))
        if hasattr(module, "LLM"):  # without vLLM, TRL says so itself
            self._entrances.append(wrap(AttributeSlot(module, "LLM"), self._started, INNER))
        self._entrances.append(wrap(AttributeSlot(module, "VLLMClient"), self._connected, INNER))

    def enter_trainers(self, module: ModuleType) -> None:
        """Wrap the entrance of `trl.trainer.grpo_trainer`."""
        self._trainer_signature = inspect.signature(module.GRPOTrainer.__init__)
        self._entrances.append(wrap(AttributeSlot(module.GRPOTrainer, "__init__"), self._trainer_built, INNER))

    def _trainer_built(self, call_next: Next, trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        self._data.append(data_of(self._trainer_signature.bind(trainer, *args, **kwargs).arguments))
        try:
            call_next(trainer, *args, **kwargs)
        finally:
            self._data.pop()
        generation = getattr(trainer, "vllm_generation", None)
        if generation is not None and generation in self._engines:
            vars(generation)[MARK].handles += mixed_image_rows.mend(trainer)

    def _built(self, call_next: Next, generation: Any, /, *args: Any, **kwargs: Any) -> None:
        if engine_of(generation) is not None:  # unlocked twice: the newer one is further out
            call_next(generation, *args, **kwargs)
            return
        given = self._signature.bind(generation, *args, **kwargs).arguments
        del given[next(iter(given))]  # the object itself
        mode = given.get("mode", "colocate")
        data = self._data[-1] if self._data and mode == "colocate" else ()
        engine = Engine(replace(self.options, image_sizes=image_sizes(data)), PARTS.get(mode, ()))
        setattr(generation, MARK, engine)
        self._building.append((generation, engine))
        try:
            call_next(generation, **(given | self._arguments()))
        finally:
            self._building.pop()
        self._engines.add(generation)
        for part in engine.parts:
            engine.handles += part.install(generation)

    def _started(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if not self._building:
            return call_next(*args, **kwargs)
        generation, engine = self._building[-1]
        needed = (part.llm_keys(generation) for part in engine.parts)
        engine.llm_keys = functools.reduce(operator.or_, [kwargs, *needed, dict(engine.options.keys)])
        begun = time.monotonic()
        llm = call_next(*args, **engine.llm_keys)
        engine.start_s = time.monotonic() - begun
        former = engine_of(llm)
        if former is not None:  # a worker gives the engine of its last trial again
            former.take_off()
        setattr(llm, MARK, engine)
        for part in engine.parts:
            engine.handles += part.started(generation, llm)
        return llm

    def _connected(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        client = call_next(*args, **kwargs)
        if self._building:
            generation, engine = self._building[-1]
            for part in engine.parts:
                engine.handles += part.connected(generation, client)
        return client

    def _arguments(self) -> dict[str, Any]:
        """The keys that `VLLMGeneration` itself goes by, under the names of its arguments."""
        named = {VLLM_TO_TRL.get(k, k).removeprefix("vllm_"): value for k, value in self.options.keys.items()}
        if self.options.sleep_level is not None:
            named["enable_sleep_mode"] = self.options.sleep_level > 0
        return {name: value for name, value in named.items() if name in self._signature.parameters}


def data_of(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """The data sets among a trainer's arguments; none where something else may bring images as well."""
    if any(given.get(name) for name in ("tools", "environment_factory", "rollout_func")):
        return ()
    held_out = given.get("eval_dataset")
    return (given.get("train_dataset"), *(held_out.values() if isinstance(held_out, Mapping) else [held_out]))


def unlock_vllm(
    *, weight_sync: WeightSync = "auto", sleep_level: SleepLevel | None = None, **llm_keys: Any
) -> Unlocked:
    """Make the vLLM engine of every trainer built from here on right with images, and give it these keys.

    Args:
        weight_sync: The way by which trained weights reach the engine: `merged` is TRL's push of every merged tensor,
            `batched` the same in batches, `adapter` sends the adapter alone; `auto` takes the cheapest that the model
            allows.
        sleep_level: What the engine gives back while weights are trained: 0, 1 or 2; by default as the trainer's
            `vllm_enable_sleep_mode` says, whose level is 2.
        **llm_keys: Arguments of `vllm.LLM`; they win over what TRL gives.

    Returns:
        The unlocking; `close()` ends it for trainers to come, `remove()` takes it off those built meanwhile too.

    Raises:
        ConfigError: A key is unknown or decided elsewhere, or a value is not accepted."""
    return unlock(EngineOptions.of_keys(weight_sync, sleep_level, llm_keys))


def unlock(options: EngineOptions) -> Unlocked:
    """`unlock_vllm` for whoever has the options."""
    unlocked = Unlocked(options)
    unlocked.enter(importlib.import_module(ENGINE_MODULE))
    unlocked.enter_trainers(importlib.import_module(TRAINER_MODULE))
    return unlocked
