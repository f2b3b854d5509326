"""Commands that show what was measured: reports, comparisons, plans, what a run is at."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from grpo_autotune.cli.app import Checked, Json, Set, command, load, print_reports
from grpo_autotune.console import output_aside, say, show
from grpo_autotune.errors import ConfigError


@command()
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
) -> None:
    """Print a stored report again, or make a page of it."""
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
        return
    from grpo_autotune.files import refusal_told
    from grpo_autotune.report.files import REPORT_FILE, load_report

    with refusal_told():
        if run_dir.name == REPORT_FILE or (run_dir / REPORT_FILE).is_file():
            print_reports([load_report(run_dir)], json_)
            return
    from grpo_autotune.commands.page import load_run  # a probe's report is printed without it

    stored = load_run(run_dir)
    show(json.dumps(stored.to_dict(), indent=2) if json_ else str(stored))


@command()
def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder, or one with run folders in it.")],
    interval: Annotated[
        float | None, typer.Option(metavar="S", min=0.1, help="Seconds between looks: 1, without a terminal 15.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Show what a running probe, search or training is at, until it is over."""
    from grpo_autotune.commands.watch import watch as watch_runs

    watch_runs(run_dir, interval, once=once)


@command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names of runs in ./runs.")],
    baseline: Annotated[str | None, typer.Option(metavar="RUN", help="Held against this run, not the first.")] = None,
    fail_if_slower: Annotated[
        float | None, typer.Option(metavar="PCT", min=0.0, help="Exit with 1 where a run is slower by more percent.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page, too.")] = None,
    json_: Json = False,
) -> int:
    """Hold stored runs against one of them: stage by stage, and faster, slower or within noise."""
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


@command()
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
) -> None:
    """Say how long a run will take, and what would change that, before it is paid for."""
    stored = Path(source or "grpo.yaml")
    loaded = None if stored.is_dir() or stored.suffix == ".json" else load(source, set_, "trial")
    if loaded is None and (with_eval or set_):
        raise ConfigError("a stored run is not measured again", where=str(stored), fix="Plan its CONFIG.")
    from grpo_autotune.commands.plan import plan_run
    from grpo_autotune.render.plan import render_plan

    output = output_aside() if json_ else nullcontext()
    result = plan_run(loaded or stored, samples, memory, output, with_eval=with_eval, html=html, phases=phases)
    show(json.dumps(result.model_dump(mode="json"), indent=2) if json_ else render_plan(result))


@command()
def data(
    config: Checked = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show: the first, the last and random ones.")] = 3,
    row: Annotated[list[int] | None, typer.Option(metavar="N", min=0, help="Show this row, counted from 0.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    set_: Set = None,
    json_: Json = False,
) -> int:
    """Show what the model will see of the data, and what rewards say of the reference answers."""
    loaded = load(config, set_, "data")
    from grpo_autotune.commands.data import show_data

    return show_data(loaded, count=rows, asked=row or [], full=full, as_json=json_)
