"""A run before it starts, as its checks see it: each part is read once, when the first check asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.places import FILE_BUILDERS, HUB_ID
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import as_warning, say
from grpo_autotune.doctor.finding import Finding, Findings, ok
from grpo_autotune.errors import AutotuneError
from grpo_autotune.files import is_folder
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import cached_file, model_config, stored_json
from grpo_autotune.registry import is_reference, names


@dataclass
class Run:
    """A configuration on this machine."""

    config: RunConfig
    machine: Machine

    def value(self, key: str) -> Any:  # of `grpo`, or TRL's default
        return self.config.grpo[key] if key in self.config.grpo else grpo_keys()[key].default_value()

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

    @cached_property
    def splits(self) -> Any:  # rows to train on and held-out ones, as the run makes them; None twice if not here yet
        from huggingface_hub.constants import HF_HUB_CACHE

        from grpo_autotune.train.data.datasets import load_data
        from grpo_autotune.train.runs.quiet import quieten

        quieten(bars=False)
        path = self.config.data.path
        cached = (Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}").is_dir()
        on_hub = "/" in path and HUB_ID.fullmatch(path) and Path(path).suffix not in FILE_BUILDERS
        return (None, None) if on_hub and not cached and not is_folder(path) else load_data(self.config, say)

    @property
    def rows(self) -> Any:
        return self.splits[0]

    @cached_property
    def processor(self) -> Any:  # or tokenizer; None where `folder` is
        from grpo_autotune.train.models.load import load_processor

        return None if self.folder is None else load_processor(self.config, str(self.folder))


def examine(run: Run, checks: Iterable[Callable[[Run], Findings]]) -> Findings:
    """Make checks, each named as its function. One that breaks is told in a line; what several stumble over is told by
    the first, and that all is well where nothing else is."""
    told = set[str]()
    for check in checks:
        findings: list[Finding] = []
        name = check.__name__.replace("_", " ")
        with as_warning(f"the check `{name}` was not made"):
            try:
                findings += check(run)
            except AutotuneError as error:
                detail = f"{error.where}: {error.what}" if error.where else error.what
                findings.append(Finding("", "fail", detail, error.fix or "see docs/troubleshooting.md", error))
            findings = [one for one in findings if one.status != "ok"] or findings or [ok("nothing to tell")]
        yield from (replace(one, check=one.check or name) for one in findings if one.detail not in told)
        told |= {one.detail for one in findings if one.error is not None}
