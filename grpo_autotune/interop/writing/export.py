"""Tuned values put into the file that a run was imported from.

Only what the search changed is written. Batch sizes go through the six numbers: completions per optimizer step and per
rollout are kept as they were tuned, in the units and for the processes of the source. Each edit is judged by reading
the edited text again: the key has to have its value, and no other key may have another one than before.
"""

import difflib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.messages import from_validation
from grpo_autotune.errors import ConfigError, printable
from grpo_autotune.interop.importing import import_file, read_source
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import SixNumbers, Translation
from grpo_autotune.interop.writing.edits import edits
from grpo_autotune.interop.writing.tuned_keys import TRL_BATCH, WHY, Framework, framework_of, values_of
from grpo_autotune.records.imported import Exported, ExportedKey, LostKey, titled
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.units import seconds

PROMPTS = "prompts_per_step"  # distinct prompts per optimizer step: the one thing that is tuned and no key
OTHER = "Export into the file that was imported, or say with --world-size how many processes it was tuned on."


@dataclass(frozen=True)
class Original:
    """The file that the run was imported from, and how it is read."""

    path: Path
    framework: str | None = None
    version: str | None = None
    environment: Mapping[str, str] | None = None

    def read(self) -> Source:
        return read_source(self.path, self.framework, self.environment)

    def translated(self, ranks: int | None) -> Translation:
        how: Any = {"framework": self.framework, "version": self.version, "environment": self.environment}
        return import_file(self.path, world_size=ranks, **how)

    @contextmanager
    def holding(self, text: str) -> Iterator["Original"]:
        draft = self.path.with_name(f".{self.path.stem}.{os.urandom(4).hex()}{self.path.suffix}")
        try:
            draft.touch(0o600)  # the text may hold secrets
            draft.write_text(text, encoding="utf-8")
        except OSError as error:
            what = f"the result cannot be read again there ({error.strerror})"
            raise ConfigError(what, where=str(self.path.parent), fix="Copy ORIGINAL to a folder of yours.") from error
        try:
            yield replace(self, path=draft)
        finally:
            draft.unlink(missing_ok=True)


def export(tuned: Mapping[str, Any], original: Original, ranks: int | None = None) -> Exported:
    """The original's text with the tuned values of a configuration with a receipt, tuned on `ranks` processes (None: by
    the completions per step). ConfigError where the file cannot be imported, or the tuned batch not be said in it."""
    try:
        receipt = Receipt.model_validate(tuned["receipt"])
    except ValidationError as error:
        wrong = from_validation(error, ())
        raise ConfigError(wrong.what, where=f"receipt.{wrong.where}", fix="Export what a search wrote.") from error
    before, raw = original.translated(ranks), original.read()
    side, framework, path = framework_of(raw), raw.framework, original.path
    numbers = tuned_numbers(tuned, receipt, before, ranks)
    draft = _Draft(original, before, raw, ranks)
    for key, value in _batch_values(side, before, numbers).items():
        if not draft.set(key, value):
            tied = f": {draft.tied} would change with it" if draft.tied else ""
            raise ConfigError(f"{key} cannot be set to {value} here{tied}", where=str(path), fix="Set it by hand.")
    draft.check(numbers)
    lost = []
    for change in receipt.changed:
        if change.key == PROMPTS or change.key.removeprefix("grpo.") in TRL_BATCH:
            continue
        values = values_of(side, change.key, change.after)
        none = WHY.get(change.key, f"{titled(framework)} has no key for it")
        if why := draft.set_all(values) if values else none:
            lost.append(LostKey(key=change.key, value=change.after, why=why))
    measured = measured_line(receipt, framework)
    theirs, ours = before.values.get("model.name_or_path"), (tuned.get("model") or {}).get("name_or_path")
    other = f"these values were tuned for {ours}, and the file trains {theirs}"
    return Exported(
        original=str(path), framework=framework, kind="patch" if is_patch(path) else "file", keys=draft.keys,
        lost=lost, measured=measured, warnings=[other] if ours and ours != theirs else [],
        text=finished(path, draft.text, draft.keys, measured),
    )  # fmt: skip


class _Draft:
    """The user's text on its way. An edit is taken if the text reads with the key set and all others as before."""

    def __init__(self, original: Original, before: Translation, raw: Source, ranks: int | None) -> None:
        self.original, self.before, self.raw, self.ranks = original, before, raw, ranks
        self.text = plain_text(original.path)
        self.keys: list[ExportedKey] = []
        self.tied = ""  # a key that the last one which could not be set shares its place with (an anchor, a variable)
        self.values = before.values

    def settings(self, text: str) -> dict[str, Any] | None:
        with suppress(ConfigError), self.original.holding(text) as draft:
            return {key: setting.value for key, setting in draft.read().settings.items()}
        return None

    def imported(self) -> Translation:
        with self.original.holding(self.text) as draft:
            return draft.translated(self.ranks)

    def set(self, key: str, value: Any) -> bool:
        name, says = key.lstrip("+"), self.raw.settings
        old = says[name].value if name in says else self.before.value(name)
        if old == value:
            return True
        wanted = (self.settings(self.text) or {}) | {name: value}
        self.tied = ""
        for text in edits(self.original.path, self.text, key, value, self.raw.framework):
            read = self.settings(text)
            if read == wanted:
                self.text, self.keys = text, [*self.keys, ExportedKey(key=name, before=old, after=value)]
                return True
            tied = [other for other in wanted if read and other in read and read[other] != wanted[other]]
            self.tied = self.tied or (tied[0] if read and read.get(name) == value and tied else "")
        return False

    def set_all(self, values: Mapping[str, Any]) -> str:
        """Set the keys of one tuned value, or none of them; the reason for that."""
        kept = self.text, self.keys, self.values
        why = ""
        failed = [key.lstrip("+") for key, value in values.items() if not self.set(key, value)]
        if failed:
            reason = f"{self.tied} would change with it" if self.tied else "this file does not show where"
            why = f"{reason}: set {failed[0]} by hand"
        elif self.text != kept[0]:
            try:
                self.values = self.imported().values
            except ConfigError as error:
                why = error.what
            if self.values == kept[2]:
                why = why or f"{', '.join(key.lstrip('+') for key in values)} has no effect in this file"
        if why:
            self.text, self.keys, self.values = kept
        return why

    def check(self, numbers: SixNumbers) -> None:
        """ConfigError where the text's batch, imported, is not the tuned one. The micro batch changes seconds alone."""
        where, fix = str(self.original.path), "This version of the framework cannot be told: nothing was written."
        try:
            after = self.imported()
        except ConfigError as error:
            what = f"with the tuned batch it cannot be imported: {error.what}"
            raise ConfigError(what, where=where, fix=fix) from error
        read, self.values = _numbers(after), after.values
        if replace(read, ranks=1, micro_batch=1) != replace(numbers, ranks=1, micro_batch=1):
            words = (
                f"{six.prompts} prompts x {six.num_generations}, steps of {six.completions} and {six.passes} passes"
                for six in (read, numbers)
            )
            raise ConfigError("imported again it has {}; tuned were {}".format(*words), where=where, fix=fix)


def tuned_numbers(tuned: Mapping[str, Any], receipt: Receipt, before: Translation, ranks: int | None) -> SixNumbers:
    """The tuned batch, for the source's processes; ConfigError where it is no part of the source's."""
    source = _numbers(before)
    given: dict[str, Any] = {name: grpo_keys()[name].default_value() for name in (*TRL_BATCH, "generation_batch_size")}
    given |= tuned.get("grpo") or {}
    for name in (name for name, value in given.items() if name in TRL_BATCH and value is not None):
        if not isinstance(given[name], int) or given[name] < 1:
            raise ConfigError("a whole number of at least 1 is needed", where=f"grpo.{name} of the tuned file")
    group, micro, accumulation, *_ = (given[name] for name in TRL_BATCH)
    prompts = next((change.after for change in receipt.changed if change.key == PROMPTS), None)
    completions = source.completions if prompts is None else prompts * group
    process = micro * accumulation
    if ranks is None and completions % process:
        step = f"the {completions} of an optimizer step of {before.source.path.name}"
        what = f"its {process} completions per process are no part of {step}"
        raise ConfigError(what, where="the tuned file", fix=OTHER)
    ranks = ranks or completions // process
    rollout = given["generation_batch_size"] or micro * ranks * (given["steps_per_generation"] or accumulation)
    if rollout % group:
        what = f"its rollout of {rollout} completions is no whole number of groups of {group}"
        raise ConfigError(what, where="the tuned file", fix=OTHER)
    return SixNumbers(group, rollout // group, process * ranks, given["num_iterations"], source.ranks, micro)


def _numbers(translation: Translation) -> SixNumbers:
    if translation.batch is None:
        raise ConfigError("no batch size", where=translation.source.path.name)
    return translation.batch


def _batch_values(side: Framework, before: Translation, numbers: SixNumbers) -> dict[str, Any]:
    """Batch keys that have other values than before, and what counts in rollouts where these have other steps."""
    old, where = _numbers(before), before.source.path.name
    ranks = old.ranks * (before.number("sequence_parallel_size") or 1)
    trl, trl_before = numbers.on(ranks, where), old.on(ranks, where)
    values: dict[str, Any] = {}
    for key, number in side.batch.items():
        if (value := number(numbers, trl)) != number(old, trl_before):
            values[key] = int(value)
            if value != values[key]:
                what = f"the tuned batch makes it {value:g}, and it counts whole ones"
                raise ConfigError(what, where=f"{where}: {key}")
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


def is_patch(path: Path) -> bool:
    """True of programs, which nobody edits but their author."""
    return path.suffix.lower() == ".py"


def measured_line(receipt: Receipt, framework: str) -> str:
    """The place where the tuned values were measured, and the one where they were not."""
    trl = receipt.versions.get("trl", "")
    interval = f"{receipt.speedup_low:.2f} to {receipt.speedup_high:.2f}"
    return (
        f"Measured with TRL{f' {trl}' if trl else ''} on {printable(receipt.hardware)}: x {receipt.speedup:.2f} "
        f"({interval}) useful completions per second, {seconds(receipt.baseline_step_s)} -> {seconds(receipt.step_s)} "
        f"per optimizer step. Whether it is faster in {titled(framework)} was not measured."
    )


def plain_text(path: Path) -> str:
    """A file's text without a byte order mark, its lines ended as here."""
    raw = path.read_bytes().decode("utf-8-sig")
    return raw.replace("\r\n", "\n") if _is_crlf(raw) else raw


def _is_crlf(text: str) -> bool:
    return text.count("\r\n") == text.count("\n") > 0


def finished(path: Path, text: str, keys: Sequence[ExportedKey], measured: str) -> str:
    """Text to write: of a program a unified diff, else the text below a comment (JSON has none), its line ends kept."""
    if is_patch(path):
        before, after = plain_text(path).splitlines(), text.splitlines()
        return "\n".join(difflib.unified_diff(before, after, f"a/{path.name}", f"b/{path.name}", lineterm="")) + "\n"
    raw = path.read_bytes().decode()
    if keys and path.suffix.lower() != ".json":
        words = f"Tuned by grpo-autotune: {', '.join(map(str, keys))}. {measured}"
        wrapped = textwrap.wrap(words, 108, break_long_words=False, break_on_hyphens=False)
        first, newline, rest = text.partition("\n") if text.startswith("#!") else ("", "", text)
        text = f"{first}{newline}{''.join(f'# {line}{chr(10)}' for line in wrapped)}{rest}"
    return "\ufeff" * raw.startswith("\ufeff") + (text.replace("\n", "\r\n") if _is_crlf(raw) else text)
