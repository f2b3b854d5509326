"""`grpo-autotune checkpoints`: the checkpoints of a run, ranked by what its log says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_autotune.config.batch import of_other_processes
from grpo_autotune.config.schema import load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import refusal_told
from grpo_autotune.records.alerts import Log
from grpo_autotune.records.evaluations import CheckpointList, Evaluation, EvaluationLog, SavedRow
from grpo_autotune.report.files import load_log
from grpo_autotune.runs.checkpoints import WEIGHTS_ONLY, Checkpoint, links_to, survey
from grpo_autotune.runs.choose import own_choice, rank_kept
from grpo_autotune.runs.folder import RunFolder

STATES = {None: "whole", WEIGHTS_ONLY: "weights only"}
GONE = "not kept"


@refusal_told()
def list_checkpoints(run: Path, strategy: str | None, mode: str = "auto", *, show_all: bool = False) -> CheckpointList:
    """The checkpoints of a run folder: those ranked first, the best at the top, then the others, the newest first.

    Args:
        strategy: By default what the run itself chooses by.
        show_all: Evaluated steps whose checkpoint is gone as well.

    Raises:
        ConfigError: There is no run, no checkpoint, no log, or no such strategy.
    """
    folder = RunFolder(run)
    if not run.is_dir():
        raise ConfigError("there is no such folder", where=str(run), fix="Give a run folder of `train`.")
    saved = survey(folder.checkpoints)
    if not saved:
        fix = "grpo.save_strategy and grpo.save_steps say when `train` saves one."
        raise ConfigError("there is no checkpoint here", where=str(run), fix=fix)
    with of_other_processes():
        config = load_config(folder.config) if folder.config.is_file() else None
    log, usable = load_log(run), {one.step: one.path.name for one in saved if one.flaw in STATES}
    evaluated = any(line["kind"] == "eval" for line in log)
    evaluations = EvaluationLog(log if evaluated else _marked(log, [one.step for one in saved]))
    rows, ranking, why = evaluations.by_step(), None, "nothing was evaluated; --strategy ranks by what training logged"
    if not rows.keys() & usable.keys():
        why = "no checkpoint was saved at an evaluated step" if usable else "no checkpoint is whole"
        if strategy is not None:
            raise ConfigError(why, where=str(run), fix="Without --strategy they are listed.")
    elif strategy is not None or evaluated:
        ranking = rank_kept(rows, usable, config, strategy, mode)
        why = ranking.why
    notes = [*ranking.notes] if ranking else []
    if ranking and (first := rank_kept(rows, rows, config, strategy, mode).best) is not None and first not in usable:
        what = f"step {first}, whose checkpoint was not kept," if first else "the model before training"
        notes.append(f"{what} would be first ({ranking.metric} {rows[first][ranking.metric]:.4g})")
    table = {row.step: row for row in reversed(evaluations.table(usable, ranking.best if ranking else None))}
    steps = table.keys() - {one.step for one in saved} if show_all else ()
    gone = [Checkpoint(folder.checkpoints / f"checkpoint-{step}", step, GONE) for step in steps]
    return CheckpointList(
        run=str(run),
        strategy=strategy or (own_choice(config)[0] if ranking else None),
        metric=ranking.metric if ranking else None,
        mode=ranking.mode if ranking else None,
        best=usable[ranking.best] if ranking and ranking.best is not None else None,
        why=why,
        notes=notes,
        rows=_rows(run, [*saved, *gone], log, table, ranking.values if ranking else {}),
    )


def _marked(log: Log, steps: Sequence[int]) -> Log:
    """The log of a run without evaluations, with an empty one at each checkpoint."""
    marks = [{"kind": "eval", "step": step} for step in steps]
    return sorted([*log, *marks], key=lambda line: (line["step"], line["kind"] == "eval"))


def _rows(
    run: Path, listed: Sequence[Checkpoint], log: Log, table: Mapping[int, Evaluation], ranked: Mapping[int, float]
) -> list[SavedRow]:
    places = {step: place for place, step in enumerate(ranked, start=1)}
    epochs = {line["step"]: line["epoch"] for line in log if isinstance(line.get("epoch"), int | float)}
    rows = [
        SavedRow(
            name=one.path.name,
            step=one.step,
            epoch=epochs.get(one.step),
            state=STATES.get(one.flaw, GONE if one.flaw == GONE else "torn"),
            flaw=one.flaw,
            bytes=sum(file.stat().st_size for file in one.path.rglob("*") if file.is_file()) or None,
            links=links_to(one.path, run),
            place=places.get(one.step),
            value=ranked.get(one.step),
            evaluation=table.get(one.step),
        )
        for one in listed
    ]
    return sorted(rows, key=lambda row: (row.place is None, row.place or 0, row.state == GONE, -row.step))
