"""`grpo-autotune import` and `export`: files of other frameworks into ours, and tuned values back into them."""

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sources import DEFAULT_FILE, read_source
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.console import complain, say, show, warn
from grpo_autotune.errors import ConfigError, printable
from grpo_autotune.files import refusal_told, write_whole
from grpo_autotune.interop.importing import import_file
from grpo_autotune.interop.source import hidden_text
from grpo_autotune.interop.writing.export import Original, export
from grpo_autotune.interop.writing.yaml_text import yaml_text
from grpo_autotune.records.imported import STRICT, Exported, Imported
from grpo_autotune.render.imported import named, render_imported
from grpo_autotune.units import plural

NARROWEST = 60


def import_config(
    path: Path, *, framework: str | None, version: str | None, world_size: int | None, environment: Mapping[str, str],
    out: Path | None, strict: bool, as_json: bool,
) -> Imported | None:  # fmt: skip
    """Import a file, print its table or its record, and write the YAML to `out`, else to a new `grpo.yaml`. None where
    `strict` is asked for and a setting loses its meaning. ConfigError where it cannot be imported or written."""
    target = out or Path(DEFAULT_FILE)
    if out is None and target.exists():
        raise ConfigError("it is there already", where=str(target), fix="Name the file to write with --out.")
    translation = import_file(
        path, framework=framework, version=version, world_size=world_size, environment=environment
    )
    imported = translation.finished()
    text = yaml_text(imported, translation.comments)
    check(imported, text, str(target))
    lost = [row for row in imported.rows if row.kind in STRICT] if strict else []
    if not lost:
        _write(target, text, imported.files)
    width = max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)
    show(imported.model_dump_json(indent=2) if as_json else render_imported(imported, width))
    if lost:
        place = "a default" if lost[0].line is None else named(lost[0])
        first = f"{lost[0].key} ({place}) is the first of {plural(len(lost), 'setting')} whose meaning is lost"
        complain(f"grpo-autotune: --strict: {first}; nothing was written", everywhere=False)
        return None
    for line in _next(imported, target):
        say(line)
    return imported


def check(imported: Imported, text: str, where: str) -> None:
    """Judge the result for its processes; ConfigError by the source's line where it is refused: our fault."""
    kept = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(imported.world_size)
    try:
        RunConfig.from_dict(parse_yaml(text, where))
    except ConfigError as error:
        row = next((row for row in imported.rows if error.where in row.to), None)
        source = f", {named(row)}: {row.key}" if row else ""
        fix = f"Report this file: the importer wrote what {error.where} refuses."
        raise ConfigError(error.what, where=f"{imported.file}{source}", fix=fix) from error
    finally:
        os.environ.pop("WORLD_SIZE")
        os.environ.update({} if kept is None else {"WORLD_SIZE": kept})


def _write(target: Path, text: str, beside: Mapping[str, str]) -> None:
    """All files or none; a file beside the configuration that is there with another text is left alone."""
    contents = {**{target.parent / name: content for name, content in beside.items()}, target: text}
    for path in contents.keys() - {target}:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != contents[path]:
            raise ConfigError("another file of this name is there", where=str(path), fix="Move it, or choose --out.")
    made = [path for path in contents if not path.exists()]
    try:
        for path, content in contents.items():
            write_whole(path, content)
    except OSError as error:
        for path in made:
            path.unlink(missing_ok=True)
        raise ConfigError(f"cannot be written ({error.strerror})", where=str(path)) from error


def _next(imported: Imported, target: Path) -> Iterator[str]:
    ranks = imported.world_size
    beside = f", with {', '.join(imported.files)} beside it" if imported.files else ""
    apart = imported.files and target.parent.resolve() != Path.cwd()
    modules = f"PYTHONPATH={shlex.quote(str(target.parent))} " if apart else ""
    alone = f"WORLD_SIZE={ranks} " if ranks > 1 else ""
    train = f"torchrun --nproc-per-node {ranks} -m grpo_autotune" if ranks > 1 else "grpo-autotune"
    yield f"Wrote {target}{beside}. Next:"
    yield f"  {modules}{alone}grpo-autotune doctor {target}"
    yield f"  {modules}{train} probe {target}"
    if apart:
        yield "Modules are looked for in the folder that a command is started in, and in PYTHONPATH."
    if ranks > 1:
        yield "It is for that many processes: import with --world-size 1 to run the same batch on one GPU."


def export_tuned(
    tuned: Path, to: Path, *, out: Path | None, framework: str | None, version: str | None,
    environment: Mapping[str, str], world_size: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Write the original's text with the tuned values to `out`, else to standard output. ConfigError where the tuned
    file has no receipt, or the values cannot be said there."""
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


@refusal_told()
def import_log(
    path: Path, *, out: Path | None = None, config: Path | None = None, as_json: bool = False, **how: Any
) -> int:
    """Print the report of the log, or its JSON, and write it to `out`: a page where that ends in `.html`, else JSON;
    `config`, read as `how` says (`import_file`), is held against it. Returns the exit code; ConfigError for a file
    without steps or seconds."""
    if not path.is_file():
        raise ConfigError("a folder is no log" if path.exists() else "there is no such file", where=str(path))
    from grpo_autotune.commands.page import save_page
    from grpo_autotune.render.imported import log_page, render_log
    from grpo_autotune.report.logged import read_log

    report = read_log(path, None if config is None else import_file(config, **how).finished().numbers)
    text = json.dumps(report.model_dump(mode="json"), indent=2)
    show(text if as_json else render_log(report))
    if out is not None and out.suffix == ".html":
        say(f"Saved: {save_page(out, log_page(report))}")
    elif out is not None:
        write_whole(out, text + "\n")
        say(f"Saved: {out}")
    return 0
