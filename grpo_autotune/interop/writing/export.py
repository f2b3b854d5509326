"""Tuned values put into the file that a run was imported from.

Only what the search changed is written. Batch sizes go through the six numbers: completions per optimizer step and per
rollout are kept as they were tuned, in the units and for the processes of the source. Each edit is judged by reading
the edited text again: the key has to have its value, and no other key may have another one than before.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.batch import SixNumbers
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.recognise import read_source
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation
from grpo_autotune.interop.writing.edits import edits
from grpo_autotune.interop.writing.finish import headed, is_patch, measured_line, patch
from grpo_autotune.interop.writing.tuned_keys import TRL_BATCH, WHY, Framework, framework_of, values_of
from grpo_autotune.records.imported import Exported, ExportedKey, LostKey, titled
from grpo_autotune.records.receipt import Receipt

PROMPTS = "prompts_per_step"
"""The one thing that a search tunes and that is no key: distinct prompts per optimizer step."""
BY_HAND = "this file does not show where: set {} by hand"


@dataclass(frozen=True)
class Original:
    """The file that the run was imported from, and how it is read."""

    path: Path
    framework: str | None = None
    version: str | None = None
    environment: Mapping[str, str] | None = None

    def read(self) -> Source:
        return read_source(self.path, self.framework, self.environment)

    def translated(self) -> Translation:
        """The file for its own processes."""
        return import_file(self.path, framework=self.framework, version=self.version, environment=self.environment)

    @contextmanager
    def holding(self, text: str) -> Iterator["Original"]:
        """The same with another text, for a while in a file beside it, where what it names is found."""
        draft = self.path.with_name(f".{self.path.stem}.{os.urandom(4).hex()}{self.path.suffix}")
        try:
            draft.write_text(text, encoding="utf-8")
        except OSError as error:
            what = f"the result cannot be read again there ({error.strerror})"
            raise ConfigError(what, where=str(self.path.parent), fix="Copy ORIGINAL to a folder of yours.") from error
        try:
            yield replace(self, path=draft)
        finally:
            draft.unlink(missing_ok=True)


def export(tuned: Mapping[str, Any], original: Original, ranks: int | None = None) -> Exported:
    """The original's text with the tuned values.

    Args:
        tuned: Plain values of a configuration with a receipt.
        original: The file that it was imported from.
        ranks: Processes that it was tuned on; None to take them from the completions per optimizer step, which a search
            keeps.

    Raises:
        ConfigError: Where the file cannot be imported, or the tuned batch not be said in it.
    """
    receipt = Receipt.model_validate(tuned["receipt"])
    before = original.translated()
    raw = original.read()
    side, framework = framework_of(raw), raw.framework
    numbers = tuned_numbers(tuned, receipt, before, ranks)
    batch = _batch_values(side, before, numbers)
    wanted = {key: (value, key) for key, value in batch.items()}
    lost: dict[str, LostKey] = {}
    for change in receipt.changed:
        values = values_of(side, change.key, change.after)
        wanted |= {key: (value, change.key) for key, value in values.items()}
        if not values and change.key != PROMPTS and change.key.removeprefix("grpo.") not in TRL_BATCH:
            why = WHY.get(change.key, f"{titled(framework)} has no key for it")
            lost[change.key] = LostKey(key=change.key, value=change.after, why=why)
    text = edited = original.path.read_text(encoding="utf-8")
    keys = []
    for key, (value, reason) in wanted.items():
        name = key.lstrip("+")
        old = raw.settings[name].value if name in raw.settings else before.value(name)
        if old == value:
            continue
        changed = _with(original, edited, key, value, framework)
        if changed is not None:
            edited = changed
            keys.append(ExportedKey(key=name, before=old, after=value))
        elif key in batch:
            raise ConfigError(f"{name} cannot be set to {value} here", where=str(original.path), fix="Set it by hand.")
        else:
            lost[reason] = LostKey(key=reason, value=value, why=BY_HAND.format(name))
    _check(original, edited, numbers)
    measured = measured_line(receipt, framework)
    whole = patch(original.path, text, edited) if is_patch(original.path) else edited
    return Exported(
        original=str(original.path), framework=framework, kind="patch" if is_patch(original.path) else "file",
        keys=keys, lost=[*lost.values()], measured=measured, text=headed(whole, keys, measured, original.path),
    )  # fmt: skip


def tuned_numbers(tuned: Mapping[str, Any], receipt: Receipt, before: Translation, ranks: int | None) -> SixNumbers:
    """The tuned batch, for the source's processes; ConfigError where it is no part of the source's."""
    source = _numbers(before)
    given: dict[str, Any] = {name: grpo_keys()[name].default_value() for name in (*TRL_BATCH, "generation_batch_size")}
    given |= tuned.get("grpo") or {}
    group, micro, accumulation = (
        given[name] for name in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    prompts = next((change.after for change in receipt.changed if change.key == PROMPTS), None)
    completions = source.completions if prompts is None else prompts * group
    if ranks is None and completions % (micro * accumulation):
        what = (
            f"its {micro * accumulation} completions per process are no part of the {completions} of an optimizer step "
            f"of {before.source.path.name}"
        )
        fix = "Export into the file that was imported, or say with --world-size how many processes it was tuned on."
        raise ConfigError(what, where="the tuned file", fix=fix)
    ranks = ranks or completions // (micro * accumulation)
    rollout = given["generation_batch_size"] or micro * ranks * (given["steps_per_generation"] or accumulation)
    return SixNumbers(
        group, rollout // group, micro * accumulation * ranks, given["num_iterations"], source.ranks, micro
    )


def _numbers(translation: Translation) -> SixNumbers:
    if translation.batch is None:
        raise ConfigError("no batch size", where=translation.source.path.name)
    return translation.batch


def _batch_values(side: Framework, before: Translation, numbers: SixNumbers) -> dict[str, Any]:
    """The framework's batch keys that have other values than before, and what counts in rollouts where a rollout has
    another number of optimizer steps."""
    old, where = _numbers(before), before.source.path.name
    trl, trl_before = numbers.on(numbers.ranks, where), old.on(old.ranks, where)
    values = {
        key: value(numbers, trl) for key, value in side.batch.items() if value(numbers, trl) != value(old, trl_before)
    }
    for key in (key for key, value in values.items() if value != int(value)):
        what = f"an optimizer step of {numbers.completions} completions is no whole number of what it counts"
        raise ConfigError(what, where=f"{where}: {key}")
    values = {key: int(value) for key, value in values.items()}
    if "steps_per_generation" in values and before.given("generation_batch_size"):
        values["generation_batch_size"] = numbers.rollout
        del values["steps_per_generation"]
    if side.micro in values:
        values |= side.fixed
    ratio = old.steps_per_rollout / numbers.steps_per_rollout
    counts = {key: before.value(key) for key in side.rollouts if before.given(key)} if ratio != 1 else {}
    return values | {
        key: max(1, round(count * ratio)) for key, count in counts.items() if isinstance(count, int) and count > 0
    }


def _with(original: Original, text: str, key: str, value: Any, framework: str) -> str | None:
    """The text with one key set; None where no edit makes it read so, and all others as before."""
    name = key.lstrip("+")
    with original.holding(text) as draft:
        wanted = _plain(draft.read()) | {name: value}
    for candidate in edits(original.path, text, key, value, framework):
        with original.holding(candidate) as draft:
            try:
                if _plain(draft.read()) == wanted:
                    return candidate
            except ConfigError:  # an edit in the wrong place
                continue
    return None


def _plain(source: Source) -> dict[str, Any]:
    return {key: setting.value for key, setting in source.settings.items()}


def _check(original: Original, text: str, numbers: SixNumbers) -> None:
    """Import the result; ConfigError where its batch is not the tuned one."""
    with original.holding(text) as draft:
        read = _numbers(draft.translated())
    where = str(original.path)
    if (read.on(read.ranks, where), read.prompts) != (numbers.on(numbers.ranks, where), numbers.prompts):
        what = (
            f"imported again it has {read.prompts} prompts x {read.num_generations} and steps of {read.completions}, "
            f"tuned were {numbers.prompts} x {numbers.num_generations} and {numbers.completions}"
        )
        raise ConfigError(what, where=where, fix="This version of the framework cannot be told: nothing was written.")
