"""`grpo-autotune checkpoints`: the checkpoints of a run, ranked by what its log says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import refusal_told
from grpo_autotune.records.evaluations import CheckpointList, EvaluationLog, SavedRow
from grpo_autotune.report.files import load_log
from grpo_autotune.train.runs.checkpoints import WEIGHTS_ONLY, Checkpoint, survey
from grpo_autotune.train.runs.choose import Ranking, default_strategy, rank_kept
from grpo_autotune.train.runs.folder import RunFolder
from grpo_autotune.train.runs.links import links_to

STATES = {None: "whole", WEIGHTS_ONLY: "weights only"}


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
    config = load_config(folder.config) if folder.config.is_file() else None
    log = load_log(run)
    evaluated = any(line["kind"] == "eval" for line in log)
    lines = log if evaluated else _marked(log, [one.step for one in saved])
    evaluations = EvaluationLog(lines)
    usable = {one.step: one.path.name for one in saved if one.flaw in STATES}
    unranked = "nothing was evaluated; --strategy ranks by what training logged"
    if evaluated and not {row["step"] for row in evaluations.rows} & usable.keys():
        unranked = "no checkpoint was saved at an evaluated step" if usable else "no checkpoint is whole"
        evaluated = False
    if strategy is not None and not usable:
        raise ConfigError("no checkpoint is whole", where=str(run), fix="Without --strategy they are listed.")
    ranking = rank_kept(evaluations.by_step(), usable, config, strategy, mode) if strategy or evaluated else None
    rows = _rows(run, saved, log, evaluations, ranking, usable, show_all=show_all)
    named = strategy or (default_strategy(config) if ranking else None)
    return CheckpointList(
        run=str(run),
        strategy=named,
        metric=ranking.metric if ranking else None,
        mode=ranking.mode if ranking else None,
        best=usable[ranking.best] if ranking and ranking.best is not None else None,
        why=ranking.why if ranking else unranked,
        notes=[*ranking.notes, *_gone(evaluations, usable, config, named, mode, ranking)] if ranking else [],
        rows=rows,
    )


def _marked(log: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[Mapping[str, Any]]:
    """The log of a run without evaluations, with an empty one at each checkpoint."""
    marks = [{"kind": "eval", "step": step} for step in steps]
    return sorted([*log, *marks], key=lambda line: (line["step"], line["kind"] == "eval"))


def _gone(
    log: EvaluationLog,
    usable: Mapping[int, str],
    config: RunConfig | None,
    strategy: str | None,
    mode: str,
    kept: Ranking,
) -> list[str]:
    """A sentence where a step would come first whose checkpoint is gone."""
    rows = log.by_step()
    best = rank_kept(rows, rows, config, strategy, mode).best
    if best is None or best in usable:
        return []
    value = rows[best][kept.metric]
    return [f"step {best} would be first ({kept.metric} {value:.4g}), and its checkpoint was not kept"]


def _rows(
    run: Path,
    saved: Sequence[Checkpoint],
    log: Sequence[Mapping[str, Any]],
    evaluations: EvaluationLog,
    ranking: Ranking | None,
    usable: Mapping[int, str],
    *,
    show_all: bool,
) -> list[SavedRow]:
    values = ranking.values if ranking else {}
    places = {step: place for place, step in enumerate(values, start=1)}
    table = {row.step: row for row in reversed(evaluations.table(usable, ranking.best if ranking else None))}
    epochs = {line["step"]: line["epoch"] for line in log if isinstance(line.get("epoch"), int | float)}
    rows = [
        SavedRow(
            name=one.path.name,
            step=one.step,
            epoch=epochs.get(one.step),
            state=STATES.get(one.flaw, "torn"),
            flaw=one.flaw,
            bytes=sum(file.stat().st_size for file in one.path.rglob("*") if file.is_file()),
            links=links_to(one.path, run),
            place=places.get(one.step),
            value=values.get(one.step),
            evaluation=table.get(one.step),
        )
        for one in saved
    ]
    for step in sorted(table.keys() - {one.step for one in saved}, reverse=True) if show_all else ():
        name, epoch = f"checkpoint-{step}", epochs.get(step)
        rows.append(SavedRow(name=name, step=step, epoch=epoch, state="not kept", evaluation=table[step]))
    return sorted(rows, key=lambda row: (row.place is None, row.place or 0, row.state == "not kept", -row.step))
