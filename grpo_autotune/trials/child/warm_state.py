"""Caches of a warm worker, kept from trial to trial: data sets that were read, and a vLLM engine that runs.

An engine is given again where TRL asks for one with equal arguments; the weights are pushed into it before it first
generates, as always. Two engines do not fit into one process, so a different one needs another worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.seams.import_hooks import ENGINE_MODULE, after_import, hook_imports
from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.trials.exit_codes import OTHER_ENGINE

if TYPE_CHECKING:
    from grpo_autotune.train.data.datasets import Splits

MOST_DATA_SETS = 4
"""Trials differ in their data by image size."""

INNERMOST = INNER + 1
"""Inside the layer that fills in the engine's keys: what counts is what the engine is built with in the end."""

SET_BY_TRL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Put into the environment when TRL starts an engine; the next trainer would take itself for one of several."""


class NeedsFreshWorker(SystemExit):
    """The engine of this process is another one than the trial asks for."""

    def __init__(self) -> None:
        super().__init__(OTHER_ENGINE)


class DataCache:
    """Data sets by their section of the configuration; each is read once. `load` is given to `build_trainer`."""

    def __init__(self) -> None:
        self._read: LRUCache[str, Splits] = LRUCache(MOST_DATA_SETS)

    def load(self, config: RunConfig, progress: Callable[[str], None]) -> Splits:
        """As `train.data.datasets.load_data`, from memory where the section `data` is one that was read before."""
        from grpo_autotune.train.data.datasets import check_rows, load_data

        key = config.data.model_dump_json()
        if key in self._read:
            check_rows(config, len(self._read[key][0]))
        else:
            self._read[key] = load_data(config, progress)
        return self._read[key]


class EngineCache:
    """The vLLM engine of this process, given again where TRL starts one with equal arguments; a layer on `LLM(...)`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._arguments: dict[str, Any] = {}
        hook_imports({ENGINE_MODULE: after_import(self._imported)})

    def forget_ranks(self) -> None:
        """Take out of the environment what TRL put there for the engine."""
        if self._engine is not None:
            for name in SET_BY_TRL:
                os.environ.pop(name, None)

    def _imported(self, module: ModuleType) -> None:
        if hasattr(module, "LLM"):  # without vLLM TRL's module has no such name
            wrap(AttributeSlot(module, "LLM"), self._start, INNERMOST)

    def _start(self, call_next: Next, /, **arguments: Any) -> Any:
        if self._engine is None:
            self._engine, self._arguments = call_next(**arguments), arguments
            return self._engine
        if arguments != self._arguments:
            raise NeedsFreshWorker
        if arguments.get("enable_sleep_mode"):
            self._engine.wake_up()  # TRL puts a new engine to sleep, and takes it for awake
        self._engine.reset_prefix_cache()
        return self._engine
