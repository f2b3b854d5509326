"""Commands that use what was trained: its checkpoints ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from grpo_autotune.cli.app import Action, app
from grpo_autotune.commands.options import Json
from grpo_autotune.console import show


@app.command()
def checkpoints(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder of `train`.")],
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="val_loss, ppo_loss, kl, adv_std, reward, or any name that was logged."),
    ] = None,
    mode: Annotated[
        Literal["auto", "min", "max"], typer.Option(help="Whether the lowest or the highest is the best.")
    ] = "auto",
    show_all: Annotated[
        bool, typer.Option("--show-all", help="All of them, and evaluated steps whose checkpoint is gone.")
    ] = False,
    json_: Json = False,
) -> Action:
    """List the checkpoints of a training, and rank them by what was logged."""

    def action() -> int:
        from grpo_autotune.commands.checkpoints import list_checkpoints
        from grpo_autotune.render.checkpoints import render_checkpoints

        listed = list_checkpoints(run_dir, strategy, mode, show_all=show_all)
        show(listed.model_dump_json(indent=2) if json_ else render_checkpoints(listed, show_all=show_all))
        return 0

    return action
