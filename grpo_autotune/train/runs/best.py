"""The table of evaluations while training, and the best checkpoint by it: saved, kept and linked.

All of it follows from `train_log.jsonl` and the checkpoints on the disk, so that a resumed run goes on with the same.
"""

from collections.abc import Collection
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import as_warning
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import write_whole
from grpo_autotune.records.evaluation_lines import RowPrinter
from grpo_autotune.records.evaluations import EVALUATIONS_FILE, Evaluation, EvaluationLog
from grpo_autotune.runs.checkpoints import kept_checkpoints, link, link_epoch
from grpo_autotune.runs.choose import REWARD, rank_kept
from grpo_autotune.runs.folder import RunFolder
from grpo_autotune.train.runs.callbacks import TrainLog


class EvaluationTable(TrainerCallback):  # type: ignore[misc]
    """Prints each evaluation of a trainer as a row, writes `evaluations.jsonl`, and keeps the best checkpoint."""

    def __init__(self, trainer: Any, config: RunConfig, folder: RunFolder, log: TrainLog, printer: RowPrinter) -> None:
        self._trainer, self._config, self._folder, self._log, self._printer = trainer, config, folder, log, printer
        self._evaluations, self._told = EvaluationLog(log.earlier), set[str]()

    def table(self) -> list[Evaluation]:
        """The rows so far, with what is kept on the disk."""
        kept = kept_checkpoints(self._folder.checkpoints)
        return self._evaluations.table({step: path.name for step, path in kept.items()}, self._best(kept))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._refresh(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log.row is not None:
            self._evaluations.add(self._log.row)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wish = 0.0
        if state.is_world_process_zero and self._evaluations.rows:
            step = state.global_step
            best = self._best({*kept_checkpoints(self._folder.checkpoints), step})
            self._printer.print(self._evaluations.table({}, best)[-1])
            wish = float(best == step and self._config.checkpoints.choose is not None)
        if self._trainer.largest(wish)[0] and state.global_step:
            control.should_save = True
            self._trainer.best_checkpoint = str(self._folder.checkpoints / f"checkpoint-{state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and args.save_strategy == "epoch":
            link_epoch(self._folder.checkpoints / f"checkpoint-{state.global_step}", state.epoch)
        self._refresh(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._refresh(state)

    def _refresh(self, state: Any) -> None:
        """Write links and table anew from what is on the disk."""
        if not state.is_world_process_zero:
            return
        kept = kept_checkpoints(self._folder.checkpoints)
        best = self._best(kept)
        if self._config.checkpoints.choose is not None and best is not None:
            self._trainer.best_checkpoint = str(kept[best])
        elif self._trainer.args.metric_for_best_model and state.best_global_step in kept:
            best = state.best_global_step
        link(self._folder.path / "last", next(iter(kept.values()), None))
        link(self._folder.path / "best", None if best is None else kept[best])
        rows = self._evaluations.table({step: path.name for step, path in kept.items()}, best)
        if rows:
            with as_warning("the table of evaluations was not written"):
                write_whole(self._folder.path / EVALUATIONS_FILE, "".join(f"{row.model_dump_json()}\n" for row in rows))

    def _best(self, kept: Collection[int]) -> int | None:
        """The best step of those kept, after the start; None where none was evaluated, or reports what is asked for."""
        chooses, rows = self._config.checkpoints.choose is not None, self._evaluations.by_step()
        if not any(step in kept and step and (chooses or row.get(REWARD) is not None) for step, row in rows.items()):
            return None
        try:
            ranking = rank_kept(rows, {*kept} - {0}, self._config)
        except ConfigError as error:
            notes, best = [str(error)], None
        else:
            notes, best = [*ranking.notes], ranking.best
        for note in notes if chooses else ():
            if note not in self._told:
                self._told.add(note)
                self._printer.say(f"checkpoints.choose: {note}")
        return best
