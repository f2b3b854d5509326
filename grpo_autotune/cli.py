"""The table of commands, and the one place that catches our errors."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_autotune.commands.console import say, show
from grpo_autotune.errors import AutotuneError, ConfigError

INTERRUPTED_EXIT = 128 + signal.SIGINT
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""`UsageError` of the Click that Typer holds; Typer exports only its subclasses."""

app = typer.Typer(
    name="grpo-autotune",
    help="Where each second of a GRPO step goes, and what to do about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG]", help="A YAML file or a shipped profile; ./grpo.yaml or the profile `demo` without."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Override a key: --set grpo.beta=0.02")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder (default: the one `output` names).")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON alone; progress goes to standard error.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to measure, after a warm-up.")]


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; stands before the command.")
    ] = False,
) -> None:
    """Where each second of a GRPO step goes, and what to do about it."""


@app.command()
def probe(config: Config = None, steps: Steps = 5, out: Out = None, set_: Set = None, json_: Json = False) -> None:
    """Run a short real trial and print where its seconds went."""
    from grpo_autotune.commands.probe import probe_config

    loaded = _load(config, set_)
    folder = out or loaded.run_dir / "probe"
    report = probe_config(loaded, steps=steps, out_dir=folder)
    _print([report], json_)
    say(f"Saved: {folder / 'report.json'}; print it again with `grpo-autotune report {folder}`.")


@app.command()
def train(
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    out: Out = None,
    set_: Set = None,
) -> int:
    """Train a configuration."""
    from grpo_autotune.commands.train import train_config

    loaded = _load(config, set_)
    return train_config(loaded, out_dir=out or loaded.run_dir, resume=resume)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], json_: Json = False) -> None:
    """Print a stored report again."""
    from grpo_autotune.report import load_report

    _print([load_report(run_dir)], json_)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def run(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script that builds a GRPOTrainer.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Arguments of the script.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="End the script after so many measured optimizer steps.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the report.")] = Path("runs/run"),
    json_: Json = False,
) -> None:
    """Run an unchanged TRL script and print where its seconds went."""
    from grpo_autotune.commands.run import ScriptProbes, run_script

    def finish(probes: ScriptProbes) -> None:
        _print(probes.reports(), json_)
        say(probes.closing_line())

    script_output = sys.stderr if json_ else sys.stdout
    run_script(script, arguments or [], steps=steps, out_dir=out, finish=finish, script_output=script_output)


@app.command()
def doctor(json_: Json = False) -> int:
    """Check this machine and the installed packages, with a remedy for each finding."""
    from grpo_autotune.commands.doctor import show_findings

    return show_findings(as_json=json_)


def _load(source: str | None, overrides: list[str] | None) -> Any:
    from grpo_autotune.config import load_config, resolve_source

    label, _ = resolve_source(source)
    say(f"Configuration: {label}")
    return load_config(source, overrides or [])


def _print(reports: Sequence[Any], as_json: bool) -> None:
    """Reports as text, or as one JSON document: an object, or a list where a script built several trainers."""
    if as_json:
        found = [report.model_dump(mode="json") for report in reports]
        show(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    from grpo_autotune.render.terminal import render

    for report in reports:
        show(render(report))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (1 error, 2 configuration, 3 environment, 4 nothing succeeded)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = words[:1] == ["--debug"]
    try:
        outcome = app(words, standalone_mode=False)
    except AutotuneError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except USAGE_ERROR as error:
        return _fail(str(error), ConfigError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped by Ctrl-C", INTERRUPTED_EXIT)
    return outcome if isinstance(outcome, int) else 0


def _fail(line: str, code: int) -> int:
    say(f"grpo-autotune: {line}")
    return code
