"""Commands that use what was trained: its checkpoints, merged weights, completions of data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_autotune.cli.app import Action, app
from grpo_autotune.commands.options import Json, Set
from grpo_autotune.console import output_aside, show


@app.command()
def infer(
    place: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run folder, RUN_DIR/best, RUN_DIR/checkpoint-N, or weights.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File of completions, a JSON line each.")],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="As data.path; by default the run's held-out data.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SPLIT", help="As data.split.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N rows.")] = None,
    n: Annotated[int, typer.Option("--n", metavar="N", min=1, help="Completions of each row.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="The most likely tokens; else as the run samples.")] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="By vLLM, in place of transformers' generate.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="By default grpo.max_completion_length.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Completions at once: 32, with vLLM 256.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="CONFIG", help="In place of the run's config.yaml, for weights outside a run.")
    ] = None,
    rewards: Annotated[bool, typer.Option("--rewards/--no-rewards", help="Score the completions.")] = True,
    set_: Set = None,
    json_: Json = False,
) -> Action:
    """Write completions of data with trained weights, and their rewards; the same command goes on."""

    def action() -> int:
        from grpo_autotune.commands.infer import Request, infer
        from grpo_autotune.render.inference import render_inference

        how: dict[str, Any] = {
            "n": n,
            "greedy": greedy,
            "in_vllm": vllm,
            "longest": max_new_tokens,
            "batch_size": batch_size,
        }
        asked = Request(place, out, data, split, limit, config=config, scored=rewards, overrides=set_ or (), **how)
        with output_aside():
            summary = infer(asked)
        show(summary.model_dump_json(indent=2) if json_ else render_inference(summary))
        return 0

    return action
