"""`grpo-autotune export`: values that a search tuned, in the file that the run was imported from."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo_autotune.config.sources import read_source
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.console import say, show, warn
from grpo_autotune.errors import ConfigError, printable
from grpo_autotune.files import write_whole
from grpo_autotune.interop.redact import hidden_text
from grpo_autotune.interop.writing.export import Original, export
from grpo_autotune.records.imported import Exported


def export_tuned(
    tuned: Path, to: Path, *, out: Path | None, framework: str | None, version: str | None,
    environment: Mapping[str, str], world_size: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Write the original's text with the tuned values to `out`, else to standard output; only where `out` is the
    original is it written over. ConfigError where the tuned file has no receipt, or the values cannot be said there."""
    values = parse_yaml(read_source(tuned), str(tuned))
    sections = [values.get(name, {}) for name in ("grpo", "model", "receipt")] if isinstance(values, dict) else [None]
    if not all(isinstance(section, dict) for section in sections) or not sections[-1]:
        fix = "Export a tuned.yaml that `grpo-autotune search` wrote."
        raise ConfigError("no receipt says which keys were tuned", where=str(tuned), fix=fix)
    exported = export(values, Original(to, framework, version, environment), world_size)
    if out is not None:
        if exported.kind == "patch" and out.exists() and out.samefile(to):
            fix = "Name another file with --out."
            raise ConfigError("the patch would replace the program", where=str(out), fix=fix)
        try:
            write_whole(out, exported.text)
            if exported.kind == "file":
                shutil.copymode(to, out)
        except OSError as error:
            raise ConfigError(f"cannot be written ({error.strerror})", where=str(out)) from error
    shown = hidden_text(exported.text)
    if as_json:
        show(exported.model_copy(update={"text": shown}).model_dump_json(indent=2))
    elif out is None:
        show(shown.removesuffix("\n"))
    if shown != exported.text and (as_json or out is None):
        say("Secrets of the file are shown as ***: --out writes them as they are.")
    for line in exported.warnings:
        warn(printable(line))
    for line in _summary(exported, out):
        say(line)
    return 0


def _summary(exported: Exported, out: Path | None) -> Iterator[str]:
    yield from map(str, exported.keys)
    for lost in exported.lost:
        yield f"left out: {lost.key} {lost.value} ({lost.why})"
    if not exported.keys:
        yield f"Nothing that {exported.framework} can be told was tuned: the text is as it was."
    elif exported.kind == "patch":
        yield "This is a patch: the program itself was not changed."
    yield exported.measured
    if out is not None:
        yield f"Wrote {out}"
