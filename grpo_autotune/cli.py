"""The table of commands, and the one place that catches this package's errors."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_autotune.commands.options import Checked, Config, Json, Only, Out, Set, Steps
from grpo_autotune.console import accept_any_text, as_warning, complain, is_first_rank, output_aside, say, show
from grpo_autotune.errors import LONGEST, AutotuneError, ConfigError, EnvironmentProblem, printable, shortened
from grpo_autotune.processes.ending import Stopped, raising

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""`UsageError` of the Click that Typer holds; Typer exports only its subclasses."""

Action = Callable[[], int]
"""The work of a command whose arguments were parsed; returns the exit code."""

app = typer.Typer(
    name="grpo-autotune",
    help="Where each second of a GRPO step goes, and what to do about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; stands before the command.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def probe(
    config: Config = None, steps: Steps = 5, out: Out = None, set_: Set = None, json_: Json = False, only: Only = False
) -> Action:
    """Run a short real trial and print where its seconds went."""

    def action() -> int:
        loaded = _load(config, set_, "trial")
        if only:
            from grpo_autotune.commands.sweep import show_sweep

            return show_sweep(loaded, as_json=json_)
        from grpo_autotune.commands.page import keep_page
        from grpo_autotune.commands.probe import probe_config
        from grpo_autotune.report.files import save_report

        folder = out or loaded.run_dir / "probe"
        output = output_aside() if json_ else nullcontext()

        def finish(measured: Any) -> None:
            _print([measured], json_)
            if is_first_rank():
                save_report(measured, folder)
            say(f"Saved: {folder / 'report.json'}; print it again with `grpo-autotune report {folder}`.")
            keep_page(folder)

        probe_config(loaded, steps=steps, out_dir=folder, output=output, show=finish)
        return 0

    return action


@app.command()
def train(
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    out: Out = None,
    set_: Set = None,
) -> Action:
    """Train a configuration."""

    def action() -> int:
        loaded = _load(config, set_, "train")
        from grpo_autotune.commands.train import train_config

        return train_config(loaded, out_dir=out or loaded.run_dir, resume=resume)

    return action


@app.command()
def search(
    config: Config = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for everything: 90s, 30m, 1h30m; 0 predicts.")
    ] = "30m",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Copy tuned.yaml there.")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Folder of the search.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder.")] = False,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database that several machines search with.")
    ] = None,
    script: Annotated[str | None, typer.Option(metavar="SCRIPT", help="Search the GRPOConfig of a TRL script.")] = None,
    set_: Set = None,
    json_: Json = False,
) -> Action:
    """Find a faster configuration that learns the same, within a budget."""

    def action() -> int:
        from grpo_autotune.search.budget import parse_budget

        budget_s = parse_budget(budget)
        from grpo_autotune.commands.early import load_script

        loaded, words = load_script(config, script, set_) if script else (_load(config, set_, "trial"), None)
        from grpo_autotune.commands.search import search_config
        from grpo_autotune.render.search import render_search

        folder = run_dir or loaded.run_dir / "search"
        with output_aside() if json_ else nullcontext():
            result, code = search_config(
                loaded, budget_s=budget_s, out=out, run_dir=folder, resume=resume, storage=storage, script=words
            )
        show(json.dumps(result.model_dump(mode="json"), indent=2) if json_ else render_search(result))
        return code

    return action


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="With --html: the page's file.")] = None,
    json_: Json = False,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page instead: report.html in the folder, or --html FILE.")
    ] = False,
    interactive: Annotated[bool, typer.Option("--interactive", help="With tooltips and zoom, 0.9 MB more.")] = False,
    with_samples: Annotated[
        int, typer.Option(metavar="N", min=0, max=100, help="A page with N answers, where the run stored any.")
    ] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Write the page and show it in a browser.")] = False,
) -> Action:
    """Print a stored report again, or make a page of it."""

    def action() -> int:
        if file is not None and not html:
            raise ConfigError("a file is only written as a page", where=str(file), fix="Put --html in front of it.")
        if html or interactive or with_samples or open_:
            if json_:
                raise ConfigError("a page is no JSON", where="--html", fix="Give --html or --json.")
            from grpo_autotune.commands.page import write_page

            path = write_page(run_dir, file, interactive=interactive, samples=with_samples)
            say(f"Saved: {path}")
            if open_:
                import webbrowser

                webbrowser.open(path.absolute().as_uri())
            return 0
        from grpo_autotune.files import refusal_told
        from grpo_autotune.report.files import REPORT_FILE, load_report

        with refusal_told():
            if run_dir.name == REPORT_FILE or (run_dir / REPORT_FILE).is_file():
                _print([load_report(run_dir)], json_)
                return 0
        from grpo_autotune.commands.page import load_run  # a probe's report is printed without it

        stored = load_run(run_dir)
        show(json.dumps(stored.to_dict(), indent=2) if json_ else str(stored))
        return 0

    return action


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder, or one with run folders in it.")],
    interval: Annotated[
        float | None, typer.Option(metavar="S", min=0.1, help="Seconds between looks: 1, without a terminal 15.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> Action:
    """Show what a running probe, search or training is at, until it is over."""

    def action() -> int:
        from grpo_autotune.commands.watch import watch as watch_runs

        watch_runs(run_dir, interval, once=once)
        return 0

    return action


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names of runs in ./runs.")],
    baseline: Annotated[str | None, typer.Option(metavar="RUN", help="Held against this run, not the first.")] = None,
    fail_if_slower: Annotated[
        float | None, typer.Option(metavar="PCT", min=0.0, help="Exit with 1 where a run is slower by more percent.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, too.")] = None,
    json_: Json = False,
) -> Action:
    """Hold stored runs against one of them: stage by stage, and faster, slower or within noise."""

    def action() -> int:
        from grpo_autotune.commands.compare import check_slower, compare_runs
        from grpo_autotune.render.comparison import render_comparison

        result = compare_runs(runs, baseline)
        show(json.dumps(result.model_dump(mode="json"), indent=2) if json_ else render_comparison(result))
        if html is not None:
            from grpo_autotune.commands.page import save_page
            from grpo_autotune.render.comparison import comparison_page

            say(f"Saved: {save_page(html, comparison_page(result))}")
        slower = check_slower(result, fail_if_slower) if fail_if_slower is not None else []
        if slower:
            say(f"slower than {result.baseline} by more than {fail_if_slower:g}%: {', '.join(slower)}")
        return int(bool(slower))

    return action


@app.command()
def plan(
    source: Annotated[
        str | None, typer.Argument(metavar="[CONFIG | RUN_DIR]", help="A configuration, or a folder with a report.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, max=10**9, help="Prompts (default: as configured).")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, max=1e6, metavar="GB", help="A memory, too.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, too.")] = None,
    phases: Annotated[
        Path | None, typer.Option("--write-phases", metavar="DIR", help="Write quick.yaml, full.yaml and final.yaml.")
    ] = None,
    with_eval: Annotated[bool, typer.Option("--with-eval", help="Time an evaluation and a checkpoint, too.")] = False,
    set_: Set = None,
    json_: Json = False,
) -> Action:
    """Say how long a run will take, and what would change that, before it is paid for."""

    def action() -> int:
        stored = Path(source or "grpo.yaml")
        loaded = None if stored.is_dir() or stored.suffix == ".json" else _load(source, set_, "trial")
        if loaded is None and (with_eval or set_):
            raise ConfigError("a stored run is not measured again", where=str(stored), fix="Plan its CONFIG.")
        from grpo_autotune.commands.plan import plan_run
        from grpo_autotune.render.plan import render_plan

        output = output_aside() if json_ else nullcontext()
        result = plan_run(loaded or stored, samples, memory, output, with_eval=with_eval, html=html, phases=phases)
        show(json.dumps(result.model_dump(mode="json"), indent=2) if json_ else render_plan(result))
        return 0

    return action


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
def run(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="A Python script that builds a GRPOTrainer.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Arguments of the script.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End the script after so many measured optimizer steps.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the report.")] = Path("runs/run"),
    speedups: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Exact speed-ups: auto, none, names with commas, or a list in YAML."),
    ] = None,
    with_: Annotated[
        Path | None,
        typer.Option("--with", metavar="FILE", help="What `search --script` found: given to the script's trainers."),
    ] = None,
    json_: Json = False,
) -> Action:
    """Run an unchanged TRL script and print where its seconds went."""

    def action() -> int:
        from grpo_autotune.commands.run import ScriptProbes, run_script, values_for_script

        def finish(probes: ScriptProbes) -> None:
            with as_warning("no report"):
                _print(probes.reports(), json_)
                say(probes.closing_line())

        output = output_aside() if json_ else nullcontext()
        values, receipt = values_for_script(with_, speedups)
        how: Any = {"steps": steps, "out_dir": out, "values": values, "receipt": receipt}
        run_script(script, arguments or [], finish=finish, output=output, **how)
        return 0

    return action


@app.command()
def serve(
    config: Config = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="LIST", help="GPUs of the server, with commas: 0,1; the others train.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the server's log.")] = None,
    set_: Set = None,
) -> Action:
    """Start a vLLM server that the configuration can be trained against (vllm.mode server)."""

    def action() -> int:
        loaded = _load(config, set_, "serve")
        from grpo_autotune.commands.serve import numbers, serve_config

        return serve_config(loaded, out_dir=out or loaded.run_dir, gpus=numbers(gpus), dry_run=dry_run)

    return action


@app.command()
def doctor(config: Checked = None, set_: Set = None, json_: Json = False) -> Action:
    """Check this machine, its packages and a configuration, with a remedy for each finding."""

    def action() -> int:
        from grpo_autotune.commands.doctor import show_findings

        has_config = config is not None or set_ or Path("grpo.yaml").is_file()  # else the machine alone: no demo
        return show_findings(_load(config, set_, "doctor") if has_config else None, as_json=json_)

    return action


def _load(source: str | None, overrides: list[str] | None, purpose: str) -> Any:
    """A configuration whose mistakes are said before the command's own imports, which take seconds."""
    from grpo_autotune.commands.doctor import preflight
    from grpo_autotune.commands.early import check_model
    from grpo_autotune.config.schema import load_config, resolve_source
    from grpo_autotune.records.trial import TRIAL_ARGUMENTS

    label, _ = resolve_source(source)
    say(f"Configuration: {label}")
    config = load_config(source, overrides or [])
    if purpose == "serve":  # it needs neither data nor rewards
        check_model(config)
    elif purpose != "doctor":  # which tells all of it
        preflight(config, {} if purpose == "train" else TRIAL_ARGUMENTS)
    return config


def _print(reports: Sequence[Any], as_json: bool) -> None:
    """Reports as text, or as one JSON document: an object, or a list where a script built several trainers."""
    if as_json:
        documents = [report.model_dump(mode="json") for report in reports]
        show(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    from grpo_autotune.render.terminal import render

    for report in reports:
        show(render(report))


def _usage(error: Any) -> str:
    """A mistake on the command line, the option or argument named, and the command that lists what there is."""
    message = error.format_message()
    command = f"{error.ctx.info_name} " if error.ctx is not None and error.ctx.parent is not None else ""
    line = shortened(printable(message), LONGEST // 2)
    return f"{line if line.endswith(('.', '?')) else f'{line}.'} See `grpo-autotune {command}--help`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (1 error, 2 configuration, 3 environment, 4 nothing succeeded).

    Typer only parses: run by Typer, a script's Ctrl-C or end of input would end with another exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = words[:1] == ["--debug"]
    accept_any_text()
    try:
        with raising():
            action = app(words, standalone_mode=False)
            return action() if callable(action) else int(action or 0)
    except AutotuneError as error:
        if debug:
            raise
        complain(f"grpo-autotune: {error}", everywhere=not isinstance(error, ConfigError | EnvironmentProblem))
        return error.exit_code
    except USAGE_ERROR as error:
        complain(f"grpo-autotune: {_usage(error)}", everywhere=False)
        return ConfigError.exit_code
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        complain(f"grpo-autotune: stopped by {name}", everywhere=False)
        return 128 + signum
