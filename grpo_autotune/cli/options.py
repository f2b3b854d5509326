"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
