"""Branches on real trainers: numbers of plain TRL where their weights are equal, and each branch's own where not."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import Branches
from grpo_autotune.errors import AutotuneError
from grpo_autotune.speedups.batches.rows import take
from grpo_autotune.train.advantages import put_ranks_on, rank_advantages
from grpo_autotune.train.branches.control import BranchControl, adapted
from grpo_autotune.train.branches.rows import in_shares, judging
from grpo_autotune.train.rewards.failures import attend
from grpo_autotune.train.rewards.guard import FAILED
from grpo_autotune.train.trainer import build_trainer, run_training
from tests.support.branch_ranks import with_branches
from tests.support.exactness import apart, generation, loss_and_gradients, ready
from tests.support.pairs import gap, rewards_of, trained, weights_of
from tests.support.trainers import EXACT, SAME, rising_reward, spread_reward
from tests.support.training import log_lines, text_config
from tests.train.test_resume import killed

Tiny = Callable[[str], Path]
TWO = {"column": "answer", "even": {"beta": 0.05}, "odd": {"beta": 0.05}}
STEPS = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2,
         "max_steps": 4, "beta": 0.05, "max_completion_length": 8}  # fmt: skip


def test_an_epoch_has_its_shares_and_every_row() -> None:
    names = ["a"] * 30 + ["b"] * 10
    order = in_shares(names, {"a": 0.5, "b": 0.5}, seed=3)
    times = Counter(order)
    assert Counter(names[row] for row in order) == {"a": 30, "b": 30}
    assert all(times[row] == 1 for row in range(30)) and all(times[row] == 3 for row in range(30, 40))
    assert order == in_shares(names, {"a": 0.5, "b": 0.5}, seed=3) != in_shares(names, {"a": 0.5, "b": 0.5}, seed=4)
    uneven = Counter(names[row] for row in in_shares(names, {"a": 0.7, "b": 0.3}, seed=0))
    assert uneven == {"a": 30, "b": 13}


@pytest.mark.parametrize("awaited", [False, True])
def test_a_reward_sees_the_rows_of_its_branches_alone(awaited: bool) -> None:
    """No call where there are none: a judge's costs money. Settings pass; what it logs is of all rows again."""
    calls: list[dict[str, Any]] = []
    logged: dict[str, list[Any]] = {}

    def score(**batch: Any) -> list[float]:
        calls.append(batch)
        if "log_extra" in batch:
            batch["log_extra"]("verdict", batch["completions"])
        return [float(text) for text in batch["completions"]]

    async def later(**batch: Any) -> list[float]:
        return score(**batch)

    score.mark = later.mark = "kept"  # type: ignore[attr-defined]
    function = judging(later if awaited else score, "task", {"a"})
    assert function.mark == "kept" and asyncio.iscoroutinefunction(function) is awaited  # type: ignore[attr-defined]

    def call(**batch: Any) -> Any:
        return asyncio.run(function(**batch)) if awaited else function(**batch)

    given = {"completions": ["1", "2", "3"], "task": ["a", "b", "a"], "limits": [1, 2], "log_extra": logged.__setitem__}
    assert call(**given) == [1.0, None, 3.0]
    assert calls[0]["completions"] == ["1", "3"] and calls[0]["limits"] == [1, 2]
    assert logged == {"verdict": ["1", None, "3"]}
    assert call(**{**given, "task": ["b"] * 3}) == [None] * 3 and len(calls) == 1


def test_the_controller_moves_a_weight_towards_the_band_and_stops_at_its_bounds() -> None:
    assert adapted(0.1, 0.1, 0.07, [0.02, 0.06], 0.8) == 0.1 / 0.8
    assert adapted(0.1, 0.1, 0.01, [0.02, 0.06], 0.8) == 0.1 * 0.8
    assert [adapted(0.1, 0.1, kl, [0.02, 0.06], 0.8) for kl in (0.02, 0.04, 0.06)] == [0.1] * 3
    assert adapted(0.99, 0.1, 1.0, [0.02, 0.06], 0.8) == pytest.approx(1.0)
    assert adapted(0.0101, 0.1, 0.0, [0.02, 0.06], 0.8) == pytest.approx(0.01)


def test_ranks_are_those_of_scipy_scaled_as_trl_scales() -> None:
    rewards = torch.tensor([[0.0], [5.0], [5.0], [9.0], [1.0], [1.0], [1.0], [1.0], [3.0], [torch.nan], [2.0], [8.0]])
    got = rank_advantages(rewards, torch.tensor([2.0]), 4).numpy()
    for rows in ([0, 1, 2, 3], [8, 10, 11]):
        ranks = rankdata(rewards[rows, 0].numpy())  # ties share the mean of their ranks
        centred = ranks - ranks.mean()
        np.testing.assert_allclose(got[rows], centred / (centred.std(ddof=1) + 1e-4), rtol=1e-6)
    assert (got[4:8] == 0).all() and got[9] == 0


def test_rewards_apart_by_the_rounding_of_their_sum_are_ties() -> None:
    pairs = torch.tensor([[0.1, 0.7], [0.3, 0.5], [0.2, 0.6], [0.45, 0.35]])
    assert len(set(pairs.sum(dim=1).tolist())) > 1
    assert (rank_advantages(pairs, torch.ones(2), 4) == 0).all()


def rows() -> list[dict[str, Any]]:
    texts = ["What is shown?", "How many are there?", "What is two plus three?", "Which digit is shown? Which?"]
    return [
        {"prompt": [{"role": "user", "content": text}], "answer": "odd" if row % 2 else "even"}
        for row, text in enumerate(texts)
    ]


def control(branches: dict[str, Any]) -> Callable[[Any], None]:
    section = Branches.model_validate(branches)
    return lambda trainer: setattr(trainer, "branches", BranchControl(trainer, section, {}, print))


def test_equal_weights_are_plain_trl_to_the_last_bit(tiny: Tiny, tmp_path: Path) -> None:
    """And the branches' KL, by their tokens, is TRL's."""
    plain, _ = trained("none", tiny("qwen3"), rows(), tmp_path, **STEPS)
    branched, _ = trained("none", tiny("qwen3"), rows(), tmp_path, change=control(TWO), **STEPS)
    assert gap(weights_of(plain), weights_of(branched)) == 0.0
    pairs = list(zip(plain.state.log_history, branched.state.log_history, strict=True))[:-1]
    for line, same in pairs:
        assert {**line, "step_time": 0} == {**{key: same[key] for key in line}, "step_time": 0}
        kls = [same[key] for key in same if key.startswith("branch/") and key.endswith("/kl")]
        assert kls and min(kls) - 1e-7 <= line["kl"] <= max(kls) + 1e-7
    assert {key.split("/")[2] for line, same in pairs for key in same if "branch/" in key} == {
        "kl", "beta", "reward", "length", "truncated"
    }  # fmt: skip


def test_each_row_has_the_weight_of_its_branch(tiny: Tiny, tmp_path: Path) -> None:
    """A loss by tokens is the sum of plain TRL's on each branch's rows, with that branch's weight."""
    sides: dict[str, Any] = {**STEPS, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    trainer = ready(tiny("qwen3"), rows(), tmp_path, loss_type="dapo", **sides)
    control({"column": "answer", "even": {"beta": 3.0}, "odd": {"beta": 0.02}})(trainer)
    batch = generation(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)
    plain = ready(tiny("qwen3"), rows(), tmp_path, loss_type="dapo", **sides)
    total, summed = torch.zeros(()), {name: torch.zeros_like(value) for name, value in gradients.items()}
    for number, beta in enumerate((3.0, 0.02)):
        plain.beta = beta
        part, more = loss_and_gradients(plain, take(batch, (batch["branch"] == number).nonzero().flatten().tolist()))
        total += part
        for name in summed:
            summed[name] += more[name]
    assert Counter(batch["branch"].tolist()) == {0: 8, 1: 8}
    assert apart(loss, total) < EXACT and max(apart(gradients[name], summed[name]) for name in summed) < EXACT


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_unequal_weights_are_the_same_with_all_speed_ups(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """With each micro step compared besides, which leaves no trace in the sums of KL."""
    unequal = control({"column": "answer", "even": {"beta": 0.4}, "odd": {"beta": 0.01}})
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    kept: dict[str, Any] = {"rewards": [spread_reward, rising_reward], **STEPS, **halves}
    plain, _ = trained("none", tiny(kind), rows(), tmp_path, change=unequal, **kept)
    fast, speedups = trained("auto", tiny(kind), rows(), tmp_path, change=unequal, check="always", **kept)
    assert {"shared_prefix", "merge_passes", "length_sort"} <= {row.name for row in speedups.table() if row.on}
    assert rewards_of(plain) == rewards_of(fast)
    assert gap(weights_of(plain), weights_of(fast)) < SAME
    for line, same in zip(plain.state.log_history, fast.state.log_history, strict=True):
        for key in line:
            if key.startswith("branch/"):
                assert same[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6)


def half_dead(completions: list[Any], **columns: Any) -> list[float]:
    """Every other group without a spread, and the rest with an outlier."""
    return [float([0, 0, 0, 0, 0, 1, 2, 9][row % 8]) for row in range(len(completions))]


def test_ranks_are_the_same_with_speed_ups(tiny: Tiny, tmp_path: Path) -> None:
    """Dead rows are left out by the advantages that are trained on."""
    kept: dict[str, Any] = {
        **STEPS,
        "beta": 0.0,
        "rewards": [half_dead],
    }
    plain, _ = trained("none", tiny("qwen3"), rows(), tmp_path, change=put_ranks_on, **kept)
    fast, speedups = trained("auto", tiny("qwen3"), rows(), tmp_path, change=put_ranks_on, **kept)
    by_group, _ = trained("none", tiny("qwen3"), rows(), tmp_path, **kept)
    assert "skip_dead" in {row.name for row in speedups.table() if row.on}
    assert speedups.facts()["skip_dead"]["skipped_rows"] > 0
    assert gap(weights_of(plain), weights_of(fast)) < SAME
    assert gap(weights_of(plain), weights_of(by_group)) > 10 * SAME
    assert set(plain._logs["advantages"]) != set(by_group._logs["advantages"])


def a_failed_one(completions: list[Any], **columns: Any) -> list[float]:
    return [FAILED if row % 4 == 3 else float(row % 4) for row in range(len(completions))]


a_failed_one.on_failure = "group_mean"  # type: ignore[attr-defined]


def test_a_failed_score_is_settled_before_ranks_and_branches(tiny: Tiny, tmp_path: Path) -> None:
    """Whoever comes first: ranks and sums see the mean of the group, 1, and never minus infinity."""
    sides = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "beta": 0.05}
    for parts in ([attend, control(TWO), put_ranks_on], [put_ranks_on, control(TWO), attend]):
        trainer = ready(tiny("qwen3"), rows(), tmp_path, rewards=[a_failed_one], **sides)
        for part in parts:
            part(trainer)
        batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        assert batch["advantages"].view(-1, 4).tolist() == [pytest.approx([-1.2246, 0, 1.2246, 0], abs=1e-3)] * 2
        metrics = trainer._metrics["train"]
        assert metrics["branch/even/reward"] == metrics["branch/odd/reward"] == [1.0]
        assert metrics["rewards/a_failed_one/failed"] == [0.25]


def test_an_evaluation_that_fails_leaves_training_its_sampling(tiny: Tiny, tmp_path: Path) -> None:
    trainer = build_trainer(branched(tiny("qwen3"), tmp_path), say=[].append)
    assert Counter(trainer.eval_dataset["task"]) == {"plain": 4, "wild": 2}
    settings, seen = trainer.generation_config, []

    def fails(completions: list[Any], task: list[str], **columns: Any) -> list[float]:
        seen.append((len(completions), set(task), trainer.generation_config.do_sample))
        if "wild" in task:
            raise ZeroDivisionError
        return [0.0] * len(completions)

    trainer.reward_funcs[0] = fails
    with pytest.raises(ZeroDivisionError) as error:
        trainer.evaluate()
    assert seen == [(4, {"plain"}, True)] * 4 + [(2, {"wild"}, False)] and error
    assert trainer.generation_config is settings and trainer.num_generations_eval == trainer.num_generations == 4


BRANCHES: dict[str, Any] = {
    "column": "task",
    "plain": {"beta": 0.1, "kl_band": [0.5, 0.9]},
    "wild": {"beta": 0.2, "kl_band": [0.0, 1e-9], "eval": {"greedy": True, "samples": 2}},
    "control": {"every": 2, "factor": 0.5},
}


def branched(model: Path, folder: Path, **changes: Any) -> RunConfig:
    """Eight questions, every other one of each branch."""
    data = folder / "rows.jsonl"
    asked = [{"prompt": f"What is {n}?", "answer": str(n), "task": "wild" if n % 2 else "plain"} for n in range(8)]
    data.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    held_out = {"path": str(data), "eval_path": str(data)}
    grpo = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4, "save_steps": 2}
    return text_config(model, folder, {"data": held_out, "branches": BRANCHES, **changes}, beta=0.1, **grpo)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_have_the_kl_and_weights_of_one(tiny: Tiny, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.support.branch_ranks", str(tiny("qwen3")), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    one = with_branches(tiny("qwen3"), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["betas"] == one["betas"] == {"even": 1.6, "odd": 0.0025}
    assert one["said"] == first["said"] and len(one["said"]) == 4
    for line, same in zip(one["branch"], first["branch"], strict=True):
        assert same == pytest.approx(line, rel=1e-3)


@pytest.mark.long
def test_killed_and_resumed_the_controller_goes_on(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log, weights and sums are those of a run that was left alone; the evaluation is greedy, on two of wild's rows."""
    config = branched(tiny("qwen3"), tmp_path)
    run_training(config, tmp_path / "whole")
    told = capsys.readouterr().err
    assert "step 2: KL of branch wild is " in told and "above 0 to 1e-09: beta 0.2 -> 0.4" in told
    assert "below 0.5 to 0.9: beta 0.1 -> 0.05" in told
    lines = log_lines(tmp_path / "whole")
    betas = [line["branch/wild/beta"] for line in lines if line["kind"] == "train"]
    assert betas == [0.2, 0.2, 0.4, 0.4, 0.8, 0.8]
    held_out = [line for line in lines if line["kind"] == "eval"]
    assert len(held_out) == 2 and {"eval_branch/plain/reward", "eval_branch/wild/kl"} <= held_out[0].keys()
    killed(config, tmp_path / "cut", tmp_path, 8)
    assert run_training(config, tmp_path / "cut", resume=True).resumed_from
    assert log_lines(tmp_path / "cut") == lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branches": {**BRANCHES, "column": "tusk"}}, "has no column tusk. Nearest: task."),
        ({"branches": {"column": "task", "plain": {"beta": 1}}}, "row 1: task is 'wild', which is no branch"),
        ({"branches": {**BRANCHES, "third": {"beta": 1}}}, "branches.third: "),
        ({"grpo": {"metric_for_best_model": "branch/wilt/reward"}}, "Nearest: branch/wild/reward."),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = branched(tmp_path, tmp_path, **changes)
    with pytest.raises(AutotuneError) as error:
        build_trainer(config)
    assert words in str(error.value) and "\n" not in str(error.value)
