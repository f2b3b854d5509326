"""The program that commands are added to, and what several of them share."""

import json
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from grpo_autotune.console import say, show

Work = TypeVar("Work", bound=Callable[..., int | None])

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


def command(**settings: Any) -> Callable[[Work], Work]:
    """Add a command to the program; its function, which returns an exit code or None for 0, is called by `main`."""

    def added(function: Work) -> Work:
        app.command(**settings)(wraps(function)(lambda **values: partial(function, **values)))
        return function

    return added


def load(source: str | None, overrides: list[str] | None, purpose: str) -> Any:
    """A configuration whose mistakes are said before the command's own imports, which take seconds."""
    from grpo_autotune.commands.doctor import preflight
    from grpo_autotune.commands.early import check_inputs, check_model
    from grpo_autotune.config.schema import load_config
    from grpo_autotune.config.sources import resolve_source
    from grpo_autotune.records.trial import TRIAL_ARGUMENTS

    label, _ = resolve_source(source)
    say(f"Configuration: {label}")
    config = load_config(source, overrides or [])
    if config.model.adapter is not None:
        from grpo_autotune.trained.adapter import settled

        config = settled(config, say)
    if purpose == "serve":  # it needs neither data nor rewards
        check_model(config)
    elif purpose == "data":
        check_inputs(config)
    elif purpose != "doctor":  # which tells all of it
        preflight(config, {} if purpose == "train" else TRIAL_ARGUMENTS)
    return config


def print_reports(reports: Sequence[Any], as_json: bool) -> None:
    """Reports as text, or as one JSON document: an object, or a list where a script built several trainers."""
    if as_json:
        documents = [report.model_dump(mode="json") for report in reports]
        show(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    from grpo_autotune.render.terminal import render

    for report in reports:
        show(render(report))


Config = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG]", help="A YAML file or a shipped profile; by default ./grpo.yaml, else the profile `demo`."
    ),
]
Checked = Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file or profile; else ./grpo.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Override a key: --set grpo.beta=0.02")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder (default: the one `output` names).")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON alone; progress goes to standard error.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps to measure, after a warm-up.")]
Only = Annotated[bool, typer.Option("--rewards-only", help="Only rewards over a network, without a model.")]


class ResumesAuto(TyperCommand):
    """A command whose `--resume` may be written `--resume auto`: it begins where there is nothing to go on with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = [word for at, word in enumerate(args) if word != "auto" or args[at - 1 : at] != ["--resume"]]
        return super().parse_args(ctx, ["--resume" if word == "--resume=auto" else word for word in words])
