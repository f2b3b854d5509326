"""Where TRL builds its colocated engine, the engine is given every key that was asked for, and the parts that mend it.

`VLLMGeneration.__init__` is where TRL decides on the engine, and the global `LLM` of its module is what it calls there;
both are wrapped on the class and the module, since trainers build theirs inside their own constructor. That one is
wrapped too, for the data whose images the engine is sized for, and to mend the finished trainer. A part (`PARTS`) is a
module that defines some of:

    llm_keys(generation, options) -> dict              arguments of `LLM` that it needs; the user's win over them
    started(generation, llm, options) -> handles       its layers on the `LLM`, before TRL calls any of its methods
    connected(generation, client, options) -> handles  its layers on a server's client, before TRL asks it anything
    install(generation, options) -> handles            its layers on the finished `VLLMGeneration`, in both modes
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

from grpo_autotune.rollout.colocate.image_sizes import image_sizes
from grpo_autotune.rollout.options import EngineOptions, SleepLevel, WeightSync
from grpo_autotune.seams import mixed_image_rows
from grpo_autotune.seams.import_hooks import ENGINE_MODULE, TRAINER_MODULE
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, wrap

PARTS: tuple[str, ...] = (
    "grpo_autotune.rollout.colocate.dtype",
    "grpo_autotune.rollout.sync.sync",
    "grpo_autotune.rollout.colocate.processors",
    "grpo_autotune.rollout.colocate.placeholders",
    "grpo_autotune.rollout.colocate.requests",
    "grpo_autotune.rollout.server.client",
    "grpo_autotune.rollout.fidelity.training_log",
)
"""In the order of installation: of equal order, a later part's layers lie outside an earlier one's on the same seam."""

ARGUMENTS = {
    "tensor_parallel_size": "tensor_parallel_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_model_len": "max_model_length",
    "max_num_seqs": "max_num_seqs",
    "enable_sleep_mode": "enable_sleep_mode",
    "model_impl": "model_impl",
}
"""Engine keys that `VLLMGeneration` itself goes by -> its argument (TRL 1.16)."""

_MARK = "grpo_autotune_engine"


class Engine:
    """One unlocked `VLLMGeneration`; `engine_of` finds it.

    Attributes:
        options: What was asked for.
        llm_keys: What `LLM` was given in the end; empty for a server.
        start_s: Seconds that `LLM(...)` took; null for a server.
        parts: What a part wants others to find, by a name that it chooses.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.llm_keys: dict[str, Any] = {}
        self.start_s: float | None = None
        self.parts: dict[str, Any] = {}
        self.handles: list[Handle] = []

    def take_off(self) -> None:
        """Remove every layer."""
        for handle in reversed(self.handles):
            handle.remove()
        self.handles = []


def engine_of(generation: Any) -> Engine | None:
    """What was done to a trainer's `vllm_generation`; None where it is TRL's plain one."""
    found: Engine | None = vars(generation).get(_MARK)
    return found


class Unlocked:
    """The unlocking, in force until `close` for trainers to come, and on those built meanwhile until `remove`."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._entrances: list[Handle] = []
        self._engines: list[tuple[Any, Engine]] = []
        self._building: list[Any] = []
        self._data: list[tuple[Any, ...]] = []
        self._signature = self._trainer_signature = inspect.Signature()

    def __enter__(self) -> Unlocked:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Trainers built from here on get TRL's plain engine."""
        for handle in self._entrances:
            handle.remove()
        self._entrances = []

    def remove(self) -> None:
        """`close`, and take every layer off the engines there are; an engine keeps the arguments it was built with."""
        self.close()
        for generation, engine in self._engines:
            engine.take_off()
            vars(generation).pop(_MARK, None)
        self._engines = []

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

    def _trainer_built(self, call_next: Callable[..., Any], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
        self._data.append(data_of(self._trainer_signature.bind(trainer, *args, **kwargs).arguments))
        try:
            call_next(trainer, *args, **kwargs)
        finally:
            self._data.pop()
        for generation, engine in self._engines:
            if generation is getattr(trainer, "vllm_generation", None):
                engine.handles += mixed_image_rows.mend(trainer)

    def _built(self, call_next: Callable[..., Any], generation: Any, /, *args: Any, **kwargs: Any) -> None:
        if engine_of(generation) is not None:  # unlocked twice: the newer one is further out
            call_next(generation, *args, **kwargs)
            return
        given = self._signature.bind(generation, *args, **kwargs).arguments
        del given[next(iter(given))]  # the object itself
        data = self._data[-1] if self._data and given.get("mode") == "colocate" else ()
        engine = Engine(replace(self.options, image_sizes=image_sizes(data)))
        setattr(generation, _MARK, engine)
        self._building.append(generation)
        try:
            call_next(generation, **(given | _arguments(self.options)))
        finally:
            self._building.pop()
        self._engines.append((generation, engine))
        for install in _defined("install"):
            engine.handles += install(generation, engine.options)

    def _started(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not self._building:
            return call_next(*args, **kwargs)
        generation = self._building[-1]
        engine = cast(Engine, engine_of(generation))
        needed = (keys(generation, engine.options) for keys in _defined("llm_keys"))
        engine.llm_keys = functools.reduce(operator.or_, [kwargs, *needed, dict(engine.options.keys)])
        begun = time.monotonic()
        llm = call_next(*args, **engine.llm_keys)
        engine.start_s = time.monotonic() - begun
        former = vars(llm).get(_MARK)
        if former is not None:  # a worker gives the engine of its last trial again
            former.take_off()
        setattr(llm, _MARK, engine)
        for started in _defined("started"):
            engine.handles += started(generation, llm, engine.options)
        return llm

    def _connected(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        client = call_next(*args, **kwargs)
        if self._building:
            generation = self._building[-1]
            engine = cast(Engine, engine_of(generation))
            for connected in _defined("connected"):
                engine.handles += connected(generation, client, engine.options)
        return client


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
        weight_sync: How trained weights reach the engine: `merged` is TRL's push of every merged tensor, `batched` the
            same in batches, `adapter` sends the adapter alone; `auto` takes the cheapest that the model allows.
        sleep_level: What the engine gives back while weights are trained: 0, 1 or 2; by default as the trainer's
            `vllm_enable_sleep_mode` says, whose level is 2.
        **llm_keys: Arguments of `vllm.LLM`; they win over what TRL gives.

    Returns:
        The unlocking; `close()` ends it for trainers to come, `remove()` takes it off those built meanwhile too.

    Raises:
        ConfigError: A key is unknown or decided elsewhere, or a value is not accepted.
    """
    return unlock(EngineOptions.of_keys(weight_sync, sleep_level, llm_keys))


def unlock(options: EngineOptions) -> Unlocked:
    """`unlock_vllm` for whoever has the options."""
    unlocked = Unlocked(options)
    unlocked.enter(importlib.import_module(ENGINE_MODULE))
    unlocked.enter_trainers(importlib.import_module(TRAINER_MODULE))
    return unlocked


def _arguments(options: EngineOptions) -> dict[str, Any]:
    """The keys that `VLLMGeneration` itself goes by."""
    found = {ARGUMENTS[key]: value for key, value in options.keys.items() if key in ARGUMENTS}
    if options.sleep_level is not None:
        found["enable_sleep_mode"] = options.sleep_level > 0
    return found


def _defined(name: str) -> Iterator[Callable[..., Any]]:
    """This function of every part that defines it."""
    for part in PARTS:
        function = getattr(importlib.import_module(part), name, None)
        if function is not None:
            yield function
