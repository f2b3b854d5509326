"""Commands that use what was trained: its checkpoints ranked, its weights merged, completions of data."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grpo_autotune.cli.app import Json, Set, command
from grpo_autotune.console import output_aside, show

Trained = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="A run folder, its best, last or checkpoint-N, or a folder of weights.")
]


@command()
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
) -> None:
    """List the checkpoints of a training, and rank them by what was logged."""
    from grpo_autotune.commands.checkpoints import list_checkpoints
    from grpo_autotune.render.trained import render_checkpoints

    listed = list_checkpoints(run_dir, strategy, mode, show_all=show_all)
    show(listed.model_dump_json(indent=2) if json_ else render_checkpoints(listed, show_all=show_all))


@command()
def merge(
    run_dir: Trained,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of the merged model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the merged weights; by default the base's own."),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts that prove the merge.")] = 8,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="The adapter, where the folder holds several.")
    ] = None,
    json_: Json = False,
) -> None:
    """Merge a trained adapter into its base, and prove that the result is the trained model."""
    from grpo_autotune.commands.merge import merge_trained
    from grpo_autotune.render.trained import render_merged

    with output_aside() if json_ else nullcontext():
        merged = merge_trained(run_dir, out, adapter=adapter, dtype=dtype, rows=rows)
    show(json.dumps(merged.model_dump(mode="json"), indent=2) if json_ else render_merged(merged, str(out)))


@command()
def infer(
    place: Trained,
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
) -> None:
    """Write completions of data with trained weights, and their rewards; the same command goes on."""
    from grpo_autotune.commands.infer import Request, infer
    from grpo_autotune.render.trained import render_inference

    how: Any = {"n": n, "greedy": greedy, "in_vllm": vllm, "longest": max_new_tokens, "batch_size": batch_size}
    asked = Request(Path(place), out, data, split, limit, config=config, scored=rewards, overrides=set_ or (), **how)
    with output_aside():
        summary = infer(asked)
    show(summary.model_dump_json(indent=2) if json_ else render_inference(summary))
