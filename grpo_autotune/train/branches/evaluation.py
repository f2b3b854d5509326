"""Evaluation of branches: held-out rows of each by themselves, sampled or greedy, in one evaluation of TRL's."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from grpo_autotune.config.sections.branches import Branches
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.train.branches.control import BranchControl
from grpo_autotune.train.branches.rows import branch_of_rows
from grpo_autotune.train.eval_sampling import greedy_generation


def evaluate_by_branch(trainer: Any, branches: Branches, control: BranchControl) -> None:
    """Let a trainer's evaluation go branch by branch where one is greedy, and log KL by branch."""
    greedy = {name for name, branch in branches.by_name.items() if branch.eval and branch.eval.greedy}
    given = {"batch_size": trainer.args.eval_batch_size, "sampler_fn": trainer._get_eval_sampler}

    def loop(call_next: Callable[..., Any], /, whole: Any, *args: Any, **kwargs: Any) -> Any:
        outputs, names = [], branch_of_rows(branches, whole.dataset, "held-out data")
        for name in sorted({*names}, key=[*branches.by_name].index) if greedy else ():
            rows = whole.dataset.select([row for row, of_row in enumerate(names) if of_row == name])
            with greedy_generation(trainer) if name in greedy else nullcontext():
                part = trainer._get_dataloader(dataset=rows, description="Evaluation", **given)
                outputs.append(call_next(part, *args, **kwargs))
        outputs = outputs or [call_next(whole, *args, **kwargs)]
        control.flush()
        count, metrics = sum(output.num_samples for output in outputs), dict(outputs[0].metrics)
        for key in metrics:
            if key.endswith("_loss"):
                metrics[key] = sum(output.metrics[key] * output.num_samples for output in outputs) / count
        return outputs[0]._replace(metrics=metrics, num_samples=count)

    wrap(AttributeSlot(trainer, "evaluation_loop"), loop)
