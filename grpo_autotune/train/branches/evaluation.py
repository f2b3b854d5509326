"""Evaluation of branches: the held-out rows of each by themselves, as many as asked for, sampled or greedy.

All are one evaluation of TRL's: one set of metrics, with those by branch, and one line in the log.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from grpo_autotune.config.branches import Branches, BranchEval
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.train.branches.control import BranchControl
from grpo_autotune.train.branches.rows import branch_of_rows

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
"""Of `generate`; the last four are defaults, of which transformers does not warn that they mean nothing."""


class BranchEvaluation:
    """Layers on a trainer's evaluation."""

    def __init__(self, trainer: Any, branches: Branches, control: BranchControl) -> None:
        self._trainer, self._branches, self._control = trainer, branches, control
        self._rows: Any = None
        layers = {"get_eval_dataloader": self._loader, "evaluation_loop": self._loop}
        self.handles = [wrap(AttributeSlot(trainer, name), layer) for name, layer in layers.items()]

    def _loader(self, call_next: Callable[..., Any], /, rows: Any = None) -> Any:
        held_out = self._trainer.eval_dataset
        self._rows = held_out if rows is None else held_out[rows] if isinstance(rows, str) else rows
        return call_next(rows)

    def _loop(self, call_next: Callable[..., Any], /, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = [call_next(loader, *args, **kwargs) for loader in self._loaders(dataloader)]
        self._control.flush()
        count, metrics = sum(output.num_samples for output in outputs), dict(outputs[0].metrics)
        for key in metrics:
            if key.endswith("_loss"):
                metrics[key] = sum(output.metrics[key] * output.num_samples for output in outputs) / count
        return outputs[0]._replace(metrics=metrics, num_samples=count)

    def _loaders(self, whole: Any) -> Iterator[Any]:
        """A loader of each branch's rows, its sampling on while they are evaluated; that of all where none asks."""
        trainer, branches = self._trainer, self._branches.by_name
        if not any(branch.eval for branch in branches.values()):
            yield whole
            return
        names = branch_of_rows(self._branches, self._rows, "held-out data")
        for name, branch in branches.items():
            asked = branch.eval or BranchEval()
            numbers = [row for row, of_row in enumerate(names) if of_row == name][: asked.samples]
            with _greedy(trainer) if asked.greedy else nullcontext():
                if numbers:
                    yield trainer._get_dataloader(
                        dataset=self._rows.select(numbers),
                        description="Evaluation",
                        batch_size=trainer.args.eval_batch_size,
                        sampler_fn=trainer._get_eval_sampler,
                    )


@contextmanager
def _greedy(trainer: Any) -> Iterator[None]:
    """One completion of each prompt inside, of the most likely tokens: further ones would be alike."""
    changed = [(trainer, "num_generations_eval", 1)]
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
