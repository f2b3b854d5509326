"""Commands that run something: a trial, a search, a training, a script, a server."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_autotune.cli.app import (
    Checked,
    Config,
    Json,
    Only,
    Out,
    ResumesAuto,
    Set,
    Steps,
    command,
    load,
    print_reports,
)
from grpo_autotune.console import as_warning, is_first_rank, output_aside, say, show


@command()
def probe(
    config: Config = None, steps: Steps = 5, out: Out = None, set_: Set = None, json_: Json = False, only: Only = False
) -> int:
    """Run a short real trial and print where its seconds went."""
    loaded = load(config, set_, "trial")
    if only:
        from grpo_autotune.commands.sweep import show_sweep

        return show_sweep(loaded, as_json=json_)
    from grpo_autotune.commands.page import keep_page
    from grpo_autotune.commands.probe import probe_config
    from grpo_autotune.report.files import save_report

    folder = out or loaded.run_dir / "probe"
    output = output_aside() if json_ else nullcontext()

    def finish(measured: Any) -> None:
        print_reports([measured], json_)
        if is_first_rank():
            save_report(measured, folder)
        say(f"Saved: {folder / 'report.json'}; print it again with `grpo-autotune report {folder}`.")
        keep_page(folder)

    probe_config(loaded, steps=steps, out_dir=folder, output=output, show=finish)
    return 0


@command(cls=ResumesAuto)
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
    workers: Annotated[
        str, typer.Option(metavar="N|auto", help="Trials at a time, each on a GPU (or cores) of its own.")
    ] = "1",
    script: Annotated[str | None, typer.Option(metavar="SCRIPT", help="Search the GRPOConfig of a TRL script.")] = None,
    set_: Set = None,
    json_: Json = False,
) -> int:
    """Find a faster configuration that learns the same, within a budget."""
    from grpo_autotune.search.budget import parse_budget

    budget_s = parse_budget(budget)
    from grpo_autotune.commands.early import load_script

    loaded, words = load_script(config, script, set_) if script else (load(config, set_, "trial"), None)
    from grpo_autotune.commands.search import search_config
    from grpo_autotune.render.search import render_search

    folder = run_dir or loaded.run_dir / "search"
    with output_aside() if json_ else nullcontext():
        result, code = search_config(
            loaded, workers, budget_s=budget_s, out=out, run_dir=folder, resume=resume, storage=storage, script=words
        )
    show(json.dumps(result.model_dump(mode="json"), indent=2) if json_ else render_search(result))
    return code


@command(cls=ResumesAuto)
def train(
    config: Config = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint; begin where there is none (auto).")
    ] = False,
    out: Out = None,
    set_: Set = None,
) -> int:
    """Train a configuration."""
    loaded = load(config, set_, "train")
    from grpo_autotune.commands.train import train_config

    return train_config(loaded, out_dir=out or loaded.run_dir, resume=resume)


@command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
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
) -> None:
    """Run an unchanged TRL script and print where its seconds went."""
    from grpo_autotune.commands.run import ScriptProbes, run_script, values_for_script

    def finish(probes: ScriptProbes) -> None:
        with as_warning("no report"):
            print_reports(probes.reports(), json_)
            say(probes.closing_line())

    output = output_aside() if json_ else nullcontext()
    values, receipt = values_for_script(with_, speedups)
    how: Any = {"steps": steps, "out_dir": out, "values": values, "receipt": receipt}
    run_script(script, arguments or [], finish=finish, output=output, **how)


@command()
def serve(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[RUN_DIR|CONFIG]", help="What was trained, or a configuration to train against."),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="LIST", help="GPUs of the server, with commas: 0,1; the others train.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Hold an answer of a RUN_DIR's weights against the trainer's.")
    ] = True,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the server's log.")] = None,
    set_: Set = None,
) -> int:
    """Start a vLLM server of a run's trained weights, or one that a configuration can be trained against."""
    from grpo_autotune.commands.serve import is_trained, numbers, serve_config

    if what is not None and is_trained(what):
        from grpo_autotune.commands.serve import serve_trained

        how: Any = {"gpus": numbers(gpus), "dry_run": dry_run, "check": check, "settings": set_ or []}
        return serve_trained(what, out_dir=out, **how)
    loaded = load(what, set_, "serve")
    return serve_config(loaded, out_dir=out or loaded.run_dir, gpus=numbers(gpus), dry_run=dry_run)


@command()
def doctor(config: Checked = None, set_: Set = None, json_: Json = False) -> int:
    """Check this machine, its packages and a configuration, with a remedy for each finding."""
    from grpo_autotune.commands.doctor import show_findings

    has_config = config is not None or set_ or Path("grpo.yaml").is_file()  # else the machine alone: no demo
    return show_findings((lambda: load(config, set_, "doctor")) if has_config else None, as_json=json_)
