"""A run before it starts, as its checks see it: each part is read once, when the first check asks for it."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.files import is_file, is_folder
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import cached_file, model_config, stored_json
from grpo_autotune.registry import is_reference, names

SAMPLE = 50
"""Rows of each data set that are looked at, beside the first and the last."""


@dataclass
class Run:
    """A configuration on this machine. `overrides` are `GRPOConfig` keys that the command puts in place of its own, and
    `begun` is a look at others' work (`probe.sampler.others_s`)."""

    config: RunConfig
    machine: Machine
    overrides: Mapping[str, Any]
    begun: tuple[float, float]
    numbers: list[int] = field(default_factory=list)  # of the rows looked at

    def value(self, key: str) -> Any:  # of `grpo`, or TRL's default
        grpo = {**self.config.grpo, **self.overrides}
        return grpo[key] if key in grpo else grpo_keys()[key].default_value()

    @property
    def ranks(self) -> int:  # training processes on this machine
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.config.batch.processes))

    @property
    def disk(self) -> Path:  # the run's folder, or the nearest above it that is there
        folder = self.config.run_dir.expanduser().absolute()
        return next(path for path in (folder, *folder.parents) if path.exists())

    @cached_property
    def folder(self) -> Path | None:  # with the model, perhaps in the hub's cache; None if it is made or not here yet
        name, section = str(self.config.model.name_or_path), self.config.model
        if section.random_init is not None or name in names("model") or is_reference(name):
            return None
        file = None if is_folder(name) else cached_file(name, section.revision, "config.json")
        return Path(name).expanduser() if is_folder(name) else file and file.parent

    @cached_property
    def model(self) -> Mapping[str, Any]:  # its config.json; empty where nobody has it yet
        return model_config(self.config)

    def stored(self, file: str) -> Mapping[str, Any]:  # a JSON file beside it
        return {} if self.folder is None else stored_json(str(self.folder), None, file)

    @property
    def has_data(self) -> bool:  # on this machine
        from huggingface_hub.constants import HF_HUB_CACHE

        path = self.config.data.path
        cache = Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
        return is_file(path) or is_folder(path) or path in names("dataset") or is_reference(path) or cache.is_dir()

    @cached_property
    def sample(self) -> Any:  # training rows as the run makes them, held-out ones made as well; None without data
        from grpo_autotune.train.data.datasets import load_data

        picked: list[list[int]] = []

        def pick(rows: Any) -> Any:
            some = random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows)))
            picked.append(sorted({0, len(rows) - 1, *some}))
            self.numbers = picked[-1]
            return rows.select(picked[-1])

        sample = load_data(self.config, lambda line: None, pick)[0] if self.has_data else None
        self.numbers = (picked or [[]])[0]
        return sample

    def renumbered(self, text: str) -> str:  # a row of the sample by its number in the data
        known = dict(enumerate(self.numbers))
        return re.sub(r"\brow (\d+)", lambda row: f"row {known.get(int(row[1]), row[1])}", text)

    @cached_property
    def processor(self) -> Any:  # or tokenizer; None where `folder` is
        from grpo_autotune.train.models.load import load_processor

        return None if self.folder is None else load_processor(self.config, str(self.folder))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)
