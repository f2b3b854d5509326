"""A configuration on its way from another framework to a `RunConfig`: no setting is dropped without a word.

A framework's module reads settings with `value`, and gives each one its verdict. What the user's file sets and no
verdict was given is `no equivalent` in the end, so that a key nobody thought of shows up by its line. Batch sizes are
six numbers that do not depend on a framework. TRL's keys follow from them by

    per_device_train_batch_size = m                  gradient_accumulation_steps = C / (D m)
    steps_per_generation        = P G / (D m)        num_iterations              = E

and a rollout is followed by P G E / C optimizer steps. `C` and `P` decide what is learned, so another number of ranks
leaves them alone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.records.imported import STRICT, Imported, ImportedRow, Verdict


@dataclass(frozen=True)
class SixNumbers:
    """The batch of a GRPO run."""

    num_generations: int  # G: completions of a prompt
    prompts: int  # P: prompts of a rollout, over all ranks
    completions: int  # C: completions of an optimizer step, over all ranks
    passes: int  # E: times a rollout is trained on
    ranks: int  # D: data-parallel processes of the source
    micro_batch: int  # m: completions of a forward pass, on one device

    @property
    def rollout(self) -> int:
        return self.prompts * self.num_generations

    @property
    def steps_per_rollout(self) -> float:
        """Optimizer steps for each rollout; below 1 where several rollouts go into one step."""
        return self.rollout * self.passes / self.completions

    def on(self, ranks: int, where: str) -> "TrlBatch":
        """TRL's keys on so many ranks. The micro batch is the largest divisor of a rank's completions, of a step and of
        a rollout, that is not above the source's. ConfigError, `where` named, if no such keys exist."""
        if self.num_generations < 2:
            what = "one completion a prompt has no group to be compared with, and TRL refuses it"
            raise ConfigError(what, where=where, fix="Sample at least 2 completions of each prompt.")
        if min(self.prompts, self.completions, self.passes, ranks, self.micro_batch) < 1:
            raise ConfigError("a batch size that is not positive", where=where)
        for count, name in ((self.completions, "an optimizer step"), (self.rollout, "a rollout")):
            if count % ranks:
                what = f"the {count} completions of {name} cannot be divided among {ranks} processes"
                fix = f"Choose a number of processes that divides {count} (--world-size)."
                raise ConfigError(what, where=where, fix=fix)
        step, rollout = self.completions // ranks, self.rollout // ranks
        micro = next(m for m in range(min(self.micro_batch, step), 0, -1) if step % m == 0 and rollout % m == 0)
        return TrlBatch(self.num_generations, micro, step // micro, rollout // micro, self.passes)


@dataclass(frozen=True)
class TrlBatch:
    """TRL's names for the batch."""

    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int


UNKNOWN = "not a key that is known of this framework: dropped"


class Translation:
    """Rows and values that gather while a framework's module reads a `source` with the `defaults` of its `version`
    (taken for the reason `version_from`), for `world_size` training processes; None for the source's own."""

    def __init__(
        self, source: Source, defaults: Mapping[str, Any], version: str, version_from: str, world_size: int | None
    ) -> None:
        self.source, self.defaults = source, defaults
        self.version, self.version_from, self.world_size = version, version_from, world_size
        self.warnings = list(source.warnings)
        self.rows: dict[str, ImportedRow] = {}
        self.values: dict[str, Any] = {}  # key path of a `RunConfig` -> value
        self.comments: dict[str, str] = {}  # key path -> what stands behind it in the YAML
        self.files: dict[str, str] = {}  # files to write beside the configuration, name -> text
        self.batch: SixNumbers | None = None

    def given(self, key: str) -> bool:
        return key in self.source.settings

    def value(self, key: str, fallback: Any = None) -> Any:
        """The setting as the framework sees it: the file's, else the version's default."""
        setting = self.source.settings.get(key)
        return self.defaults.get(key, fallback) if setting is None else setting.value

    def number(self, key: str, fallback: Any = None) -> Any:
        value = self.value(key, fallback)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)):
            return value
        fix = "Give the variable behind it with --env NAME=VALUE, or write the number."
        raise ConfigError(f"a number is needed, and the file says {value!r}", where=self.where(key), fix=fix)

    def where(self, key: str) -> str:
        setting = self.source.settings.get(key, Setting(None))
        file = setting.file or self.source.path.name
        return f"{file}: {key}" if setting.line is None else f"{file}, line {setting.line}: {key}"

    def same(self, key: str, target: str, value: Any = None, note: str = "", comment: str = "") -> None:
        """The setting under another name with the same meaning; `value` where its spelling differs."""
        self.verdict("same", key, {target: self.value(key) if value is None else value}, note, comment)

    def converted(
        self, key: str | Iterable[str], targets: Mapping[str, Any], note: str = "", comment: str = ""
    ) -> None:
        """The same meaning, by arithmetic or in several keys."""
        self.verdict("converted", key, targets, note, comment)

    def changes(self, key: str | Iterable[str], targets: Mapping[str, Any], note: str, comment: str = "") -> None:
        """The nearest there is: what differs, and how much."""
        self.verdict("changes", key, targets, note, comment)

    def dropped(self, key: str, note: str) -> None:
        """No equivalent: what would be needed."""
        self.verdict("none", key, {}, note)

    def speed(self, key: str, note: str, targets: Mapping[str, Any] | None = None) -> None:
        """Changes seconds and memory alone."""
        self.verdict("speed", key, targets or {}, note)

    def inert(self, key: str | Iterable[str], note: str) -> None:
        """Without effect in the source as it stands, so leaving it out is the same."""
        self.verdict("same", key, {}, note)

    def verdict(
        self, verdict: Verdict, keys: str | Iterable[str], targets: Mapping[str, Any], note: str = "", comment: str = ""
    ) -> None:
        """Record what becomes of settings, and set the target keys. A default that TRL shares leaves no trace."""
        known = [(grpo_keys().get(path.removeprefix("grpo.")) if path[:5] == "grpo." else None) for path in targets]
        shared = all(k and k.default_value() == value for k, value in zip(known, targets.values(), strict=True))
        for key in [keys] if isinstance(keys, str) else keys:
            if not self.given(key) and shared and verdict not in STRICT:
                continue
            for path, value in targets.items():
                self.set(path, value, comment)
            setting = self.source.settings.get(key) or Setting(self.defaults.get(key))
            place: dict[str, Any] = {"line": setting.line, "file": setting.file, "key": key, "value": setting.value}
            self.rows[key] = ImportedRow(kind=verdict, to=dict(targets), why=note, **place)

    def set(self, path: str, value: Any, comment: str = "") -> None:
        self.values[path] = value
        if comment:
            self.comments[path] = comment

    def set_batch(self, batch: SixNumbers, keys: Iterable[str], note: str = "") -> None:
        """Write the batch in TRL's keys for the wanted processes; `keys` are the settings that it was read from, as a
        mapping with the names of TRL's that each one decides."""
        decides = keys if isinstance(keys, Mapping) else {}
        keys = list(keys)
        ranks = self.world_size or batch.ranks
        trl = vars(batch.on(ranks, self.where(next((key for key in keys if self.given(key)), keys[0]))))
        self.batch, self.world_size = batch, ranks
        made = f"{batch.prompts} prompts x {batch.num_generations} = {batch.rollout} completions per rollout"
        arithmetic = f"{made}, {batch.completions} per optimizer step"
        share = f"{ranks} process{'es' * (ranks > 1)} / {trl['per_device_train_batch_size']}"
        comments = {
            "per_device_train_batch_size": f"completions; the source has {batch.micro_batch} per micro batch",
            "gradient_accumulation_steps": f"{batch.completions} completions per step / {share}",
            "steps_per_generation": f"{batch.rollout} completions per rollout / {share}",
        }
        for name, value in trl.items():
            self.set(f"grpo.{name}", value, comments.get(name, ""))
        for key in keys:
            targets = {f"grpo.{name}": trl[name] for name in decides.get(key, trl)}
            self.converted(key, targets, "; ".join(part for part in (arithmetic, note) if part))

    def steps(self, count: float) -> int | float:
        """Rollouts of the source as optimizer steps, which TRL counts; a share below 1 and -1 stay."""
        per_rollout = 1.0 if self.batch is None else self.batch.steps_per_rollout
        return count if count < 1 else max(1, round(count * per_rollout))

    def finished(self) -> Imported:
        """The record of it all; ConfigError where no batch was set."""
        for key in self.source.settings.keys() - self.rows.keys():
            self.dropped(key, UNKNOWN)
        if self.batch is None:
            raise ConfigError("no batch size", where=self.source.path.name)
        for row in self.rows.values():  # what stands in no file
            place = next((path for path in ("model.name_or_path", "data.path") if path in row.to), None)
            if place and row.value in ("", None):
                fix = "Give the variable behind it with --env NAME=VALUE, or write it into the file."
                raise ConfigError("it is empty", where=self.where(row.key), fix=fix)
            if place and "$(" in str(row.value):
                self.warnings.append(f"{self.where(row.key)} is known only where the script runs: correct {place}")
        rows = sorted(self.rows.values(), key=lambda row: (row.line is None, row.file or "", row.line or 0, row.key))
        numbers = {letter: int(value) for letter, value in zip("GPCEDm", vars(self.batch).values(), strict=True)}
        return Imported(
            file=str(self.source.path), source=self.source.framework, version=self.version,
            version_from=self.version_from, world_size=self.world_size or self.batch.ranks, numbers=numbers,
            steps_per_rollout=self.batch.steps_per_rollout, rows=rows, warnings=self.warnings,
            config=nested(self.values), files=self.files,
        )  # fmt: skip


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key paths as mappings inside each other."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, key = path.split(".")
        here = tree
        for name in sections:
            here = here.setdefault(name, {})
        here[key] = value
    return tree
