"""The held-out loss and what is logged beside it, against their formulas computed anew from the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from grpo_autotune.records.evaluations import half_interval
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.train.runs.measures import Measures
from grpo_autotune.train.trainer import build_trainer
from tests.support.training import text_config

Tiny = Callable[[str], Path]
BETA = 0.3
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")


def built(model: Path, folder: Path, changes: dict[str, Any], speedups: str) -> tuple[Any, list[Any]]:
    """A trainer whose policy is not its reference any more, and the batches that it will evaluate."""
    held_out = {"eval_strategy": "steps", "per_device_eval_batch_size": 8, "beta": BETA, "learning_rate": 0.0}
    trainer = build_trainer(text_config(model, folder, {"speedups": speedups, **changes}, **held_out))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    Measures(trainer)
    batches: list[Any] = []

    def kept(call_next: Callable[..., Any], /, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not trainer.model.training:
            batches.append(dict(inputs))
        return call_next(model, inputs, *args, **kwargs)

    wrap(AttributeSlot(trainer, "compute_loss"), kept, -9)
    return trainer, batches


def terms(trainer: Any, batch: Any, loss_type: str) -> tuple[float, float]:
    """The policy's part and the KL term's of a batch's loss, from the logits; ratios are 1 before an update."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    logps = (logits / trainer.temperature).log_softmax(-1).gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
    away = batch["ref_per_token_logps"] - logps
    mask, advantages = batch["completion_mask"].double(), batch["advantages"][:, None].double()
    clipped = min(1.0, trainer.epsilon_high)  # of a ratio of 1
    policy = -advantages * (clipped * logps if loss_type == "cispo" else torch.ones_like(logps))
    if loss_type == "sapo":  # 4 / t * sigmoid(0)
        temperature = torch.where(advantages > 0, trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg)
        policy = -advantages * 2.0 / temperature
    sums = [(values * mask).sum(dim=1) for values in (policy, BETA * (away.exp() - away - 1))]
    divisors = {
        "bnpo": mask.sum(),
        "dr_grpo": len(mask) * trainer.max_completion_length,
        "dapo": batch["num_items_in_batch"],
        "cispo": batch["num_items_in_batch"],
        "luspo": len(mask),
    }
    divisor = divisors.get(loss_type, len(mask) * mask.sum(dim=1))
    return tuple(float((of_rows / divisor).sum()) for of_rows in sums)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("speedups", ["none", "auto"])
def test_the_held_out_loss_and_its_policy_part(speedups: str, tiny: Tiny, tmp_path: Path) -> None:
    trainer, batches = built(tiny("qwen3"), tmp_path, {"data": {"eval_split": "train[:6]"}}, speedups)
    for loss_type in LOSSES:
        trainer.loss_type = loss_type
        batches.clear()
        logged = trainer.evaluate()
        parts = [terms(trainer, batch, loss_type) for batch in batches]
        weights = [8, 8, 6]  # transformers weighs the last batch by the prompts that a batch has left
        policy, kl = (float(np.average(values, weights=weights)) for values in zip(*parts, strict=True))
        assert logged["eval_loss"] == pytest.approx(policy + kl, abs=2e-6), loss_type
        assert logged["eval_ppo_loss"] == pytest.approx(policy, abs=2e-6), loss_type
        assert kl > 1e-3
        advantages = [batch["advantages"].numpy() for batch in batches]
        assert logged["eval_adv_std"] == pytest.approx(np.mean([values.std() for values in advantages]), rel=1e-5)
        assert logged["eval_adv_max"] == pytest.approx(np.mean([values.max() for values in advantages]), rel=1e-5)
        assert logged["eval_beta"] == pytest.approx(BETA)


@pytest.mark.slow
def test_branches_that_are_greedy_and_weighted(tiny: Tiny, tmp_path: Path) -> None:
    """The KL term has each row's weight, and a branch of one completion a prompt has no policy part."""
    branches = {"column": "answer", **{str(n): {"beta": 0.1 * (n + 1)} for n in range(8)}}
    branches["0"] = {"beta": 0.1, "eval": {"greedy": True}}
    changes = {"data": {"eval_split": "train"}, "branches": branches}
    trainer, batches = built(tiny("qwen3"), tmp_path, changes, "none")
    trainer.loss_type = "bnpo"
    logged = trainer.evaluate()
    assert [len(batch["branch"]) for batch in batches] == [1, *7 * [4]]
    parts = [terms(trainer, batch, "bnpo") for batch in batches]
    weights = [0.1 * (int(batch["branch"][0]) + 1) / BETA for batch in batches]
    policy = np.mean([policy for policy, _ in parts])
    kl = np.mean([weight * kl for weight, (_, kl) in zip(weights, parts, strict=True)])
    assert parts[0][0] == 0.0 and kl > 1e-3
    assert logged["eval_ppo_loss"] == pytest.approx(policy, abs=2e-6)
    assert logged["eval_loss"] == pytest.approx(policy + kl, abs=2e-6)


def test_an_interval_is_that_of_the_means_of_prompts() -> None:
    means = [0.1, 0.5, 0.7, float("nan"), 0.9]
    known = np.array([0.1, 0.5, 0.7, 0.9])
    low, high = stats.t.interval(0.95, 3, known.mean(), stats.sem(known))
    assert half_interval(means) == pytest.approx((high - low) / 2)
    assert np.isnan([half_interval(few) for few in ([0.5], [1.0, float("inf")])]).all()
