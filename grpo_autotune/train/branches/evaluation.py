"""Evaluation of branches: held-out rows of each by themselves, sampled or greedy, in one evaluation of TRL's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from grpo_autotune.config.branches import Branches, BranchEval
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.train.branches.control import BranchControl
from grpo_autotune.train.branches.rows import branch_of_rows

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}  # without its warnings


def evaluate_by_branch(trainer: Any, branches: Branches, control: BranchControl) -> None:
    """Let a trainer's evaluation go branch by branch where one asks for it, and log KL by branch."""
    held_out: list[Any] = []

    def loader(call_next: Callable[..., Any], /, rows: Any = None) -> Any:
        sets = trainer.eval_dataset
        held_out[:] = [sets if rows is None else sets[rows] if isinstance(rows, str) else rows]
        return call_next(rows)

    def loop(call_next: Callable[..., Any], /, whole: Any, *args: Any, **kwargs: Any) -> Any:
        apart = any(branch.eval for branch in branches.by_name.values())
        loaders = _loaders(trainer, branches, *held_out) if apart else [whole]
        outputs = [call_next(loader, *args, **kwargs) for loader in loaders]
        control.flush()
        count, metrics = sum(output.num_samples for output in outputs), dict(outputs[0].metrics)
        for key in metrics:
            if key.endswith("_loss"):
                metrics[key] = sum(output.metrics[key] * output.num_samples for output in outputs) / count
        return outputs[0]._replace(metrics=metrics, num_samples=count)

    wrap(AttributeSlot(trainer, "get_eval_dataloader"), loader)
    wrap(AttributeSlot(trainer, "evaluation_loop"), loop)


def _loaders(trainer: Any, branches: Branches, rows: Any) -> Iterator[Any]:
    """A loader of each branch's held-out rows, with its sampling on until the next one is asked for."""
    names = branch_of_rows(branches, rows, "held-out data")
    for name, branch in branches.by_name.items():
        asked = branch.eval or BranchEval()
        numbers = [row for row, of_row in enumerate(names) if of_row == name][: asked.samples]
        with _greedy(trainer) if asked.greedy else nullcontext():
            if numbers:
                given = {"batch_size": trainer.args.eval_batch_size, "sampler_fn": trainer._get_eval_sampler}
                yield trainer._get_dataloader(dataset=rows.select(numbers), description="Evaluation", **given)


@contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """One completion of each prompt inside, of the most likely tokens: further ones would be alike."""
    changed: list[tuple[Any, str, Any]] = [(trainer, "num_generations_eval", 1)]
    if trainer.use_vllm:
        changed.append((trainer.vllm_generation, "temperature", 0.0))
    else:
        settings = copy.deepcopy(trainer.generation_config)
        settings.update(**GREEDY)
        changed.append((trainer, "generation_config", settings))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changed]
    try:
        for place in changed:
            setattr(*place)
        yield
    finally:
        for place in before:
            setattr(*place)
