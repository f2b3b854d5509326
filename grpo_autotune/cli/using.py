"""Commands that use what was trained: merged, asked, served."""

from __future__ import annotations

import json
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from grpo_autotune.cli.app import Action, app
from grpo_autotune.commands.options import Json
from grpo_autotune.console import output_aside, show

Trained = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="A run folder, its best, last or checkpoint-N, or a folder of weights.")
]


class Dtype(StrEnum):
    """Types that merged weights can have."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def merge(
    run_dir: Trained,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of the merged model.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the merged weights; by default the base's own.")] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts that prove the merge.")] = 8,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="The adapter, where the folder holds several.")
    ] = None,
    json_: Json = False,
) -> Action:
    """Merge a trained adapter into its base, and prove that the result is the trained model."""

    def action() -> int:
        from grpo_autotune.commands.merge import merge_trained
        from grpo_autotune.render.merged import render_merged

        with output_aside() if json_ else nullcontext():
            merged = merge_trained(run_dir, out, adapter=adapter, dtype=dtype, rows=rows)
        show(json.dumps(merged.model_dump(mode="json"), indent=2) if json_ else render_merged(merged, str(out)))
        return 0

    return action
