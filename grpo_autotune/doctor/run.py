"""A run before it starts, as its checks see it: each part is read once, when the first check asks for it."""

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_autotune.config.places import FILE_BUILDERS, HUB_ID
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import as_warning, say
from grpo_autotune.doctor.finding import Finding, Findings, ok, told
from grpo_autotune.errors import AutotuneError, with_row_numbers
from grpo_autotune.files import is_folder
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs.context import cached_file, model_config, stored_json
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.registry import is_reference, names
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.units import duration

WHOLE, RANDOM = 10_000, 50
"""Rows without pictures that are all looked at; of more, beside the first and the last, so many at random."""


@dataclass
class Run:
    """A configuration on this machine."""

    config: RunConfig
    machine: Machine
    looked_at: list[Sequence[int]] = field(default_factory=list)  # numbers of the training rows, after `rows`
    check: tuple[str, float] = ("", 0.0)  # the one under way, and when it began
    threads: int | None = None  # of torch beside other processes; None: as many as it takes by itself

    def now(self) -> str | None:
        return f"checking {self.check[0]}, {duration(time.monotonic() - self.check[1])}" if self.check[0] else None

    def value(self, key: str) -> Any:  # of `grpo`, or TRL's default
        return grpo_value(key, self.config)

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
        return model_config(self.config.model)

    def stored(self, file: str) -> Mapping[str, Any]:  # a JSON file beside it
        return {} if self.folder is None else stored_json(str(self.folder), None, file)

    @cached_property
    def rows(self) -> Any:  # training rows as the run makes them, held-out ones made as well; None if not here yet
        from huggingface_hub.constants import HF_HUB_CACHE

        from grpo_autotune.train.data.datasets import load_data
        from grpo_autotune.train.runs.quiet import quieten

        quieten(bars=False)
        for path in (one.path for one in self.config.data.sources.values()):
            cached = (Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}").is_dir()
            on_hub = "/" in path and HUB_ID.fullmatch(path) and Path(path).suffix not in FILE_BUILDERS
            if on_hub and not cached and not is_folder(path):
                return None
        rows = load_data(self.config, lambda line: say(self.numbered(line)), self._choose)[0]
        self.looked_at[:] = [range(len(rows))] if self.config.data.mix else self.looked_at[:1]
        return rows

    def _choose(self, rows: Any) -> Any:
        """Those that are looked at, of one set: all of them where that is soon done."""
        pictured = image_columns([*rows.column_names, *self.config.data.columns])
        few = max(RANDOM, self.config.batch.prompts_per_generation)  # no fewer, or that would be a finding
        numbers: Sequence[int] = range(len(rows))
        if len(rows) > (few + 2 if pictured else WHOLE):
            numbers = [0, *sorted(random.Random(0).sample(numbers[1:-1], few)), len(rows) - 1]
        self.looked_at.append(numbers)
        return rows.select(numbers)

    def numbered(self, text: str) -> str:
        """A text of rows by their numbers in the set that was looked at last, the training rows once all are read."""
        return with_row_numbers(text, dict(enumerate(self.looked_at[-1])) if self.looked_at else {})

    @cached_property
    def processor(self) -> Any:  # or tokenizer; None where `folder` is
        from grpo_autotune.train.models.load import load_processor

        return None if self.folder is None else load_processor(self.config.model, str(self.folder))


def examine(run: Run, checks: Iterable[Callable[[Run], Findings]]) -> Findings:
    """Make checks, each named as its function. One that breaks is told in a line; what several stumble over is told by
    the first, and that all is well where nothing else is."""
    heard = set[str]()
    for check in checks:
        findings: list[Finding] = []
        name = check.__name__.replace("_", " ")
        run.check = name, time.monotonic()
        with as_warning(f"the check `{name}` was not made"):
            try:
                findings += check(run)
            except AutotuneError as error:
                findings.append(told(error))
            findings = [one for one in findings if one.status != "ok"] or findings or [ok("nothing to tell")]
        findings = [replace(one, check=one.check or name, detail=run.numbered(one.detail)) for one in findings]
        yield from (one for one in findings if one.detail not in heard)
        heard |= {one.detail for one in findings if one.error is not None}
