"""Dynamic sampling: the groups that are trained on, the order of the data, what rewards log, ranks and resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.processes.fresh import free_port
from grpo_autotune.train.trainer import run_training
from tests.support.resample_ranks import GROUP
from tests.support.training import log_lines, picture_config, text_config

ROOT = Path(__file__).parents[2]
Tiny = Callable[[str], Path]


class Watched:
    """What a trainer's scoring is given and hands over, from outside of all layers."""

    def __init__(self, trainer: Any) -> None:
        self.rollouts: list[tuple[list[str], list[float], dict[str, Any]]] = []
        self._trainer, self._score = trainer, trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.score

    def score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = self._score(inputs)
        if self._trainer.model.training:
            self.rollouts.append(([row["answer"] for row in inputs], output["advantages"].tolist(), output))
        return output


def stream(trainer: Any, count: int) -> list[str]:
    """Answers of the data in the order of its epochs, as TRL's sampler draws them."""
    import torch

    generator, rows = torch.Generator().manual_seed(trainer.args.seed), trainer.train_dataset
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [rows[row]["answer"] for row in order[:count]]


def chosen_by_hand(answers: list[str], groups: int, rollouts: int, most: int) -> list[list[str]]:
    """The answers of each rollout's groups: places of equal ones filled in the order of the stream."""
    coming, chosen = iter(answers), []
    for _ in range(rollouts):
        places = [next(coming) for _ in range(groups)]
        for _ in range(most - 1):
            if all(int(answer) % 2 == 0 for answer in places):
                break
            further = iter([answer for answer in [next(coming) for _ in range(groups)] if int(answer) % 2 == 0])
            places = [answer if int(answer) % 2 == 0 else next(further, answer) for answer in places]
        chosen.append(places)
    return chosen


@pytest.mark.parametrize("most", [2, 10])
def test_places_of_equal_groups_are_filled_in_the_order_of_the_data(most: int, tiny: Tiny, tmp_path: Path) -> None:
    """Rewards of odd answers are all 1: two of four prompts are left over without rounds enough."""
    changes = {
        "resample": {"max_rounds": most},
        "rewards": [{"name": "tests.support.resample_ranks:lively"}],
    }
    config = text_config(tiny("qwen3"), tmp_path, changes, max_steps=3, beta=0.0, seed=2)
    watched: list[Watched] = []
    folder = tmp_path / "run"
    run_training(config, folder, prepare=lambda trainer: watched.append(Watched(trainer)))
    trainer, rollouts = watched[0]._trainer, watched[0].rollouts
    assert len(rollouts) == 3
    by_hand = chosen_by_hand(stream(trainer, 200), 2, 3, most)
    assert [answers[::GROUP] for answers, _, _ in rollouts] == by_hand
    dead = [sum(int(answer) % 2 for answer in answers) / 2 for answers in by_hand]
    assert any(dead) == (most == 2)
    for answers, advantages, output in rollouts:
        assert len(answers) == len(output["completion_ids"]) == 2 * GROUP
        alike = [len(set(advantages[row : row + GROUP])) == 1 for row in range(0, 2 * GROUP, GROUP)]
        assert alike == [bool(int(answer) % 2) for answer in answers[::GROUP]]
    lines = [line for line in log_lines(folder) if line["kind"] == "train"]
    assert [line["resample/dead"] for line in lines] == dead
    assert [line["frac_reward_zero_std"] for line in lines] == dead
    facts = trainer.resampling.facts
    assert (facts.rollouts, facts.groups, facts.dead_groups) == (3, 2, sum(dead) * 2)
    assert facts.rounds == sum(line["resample/rounds"] for line in lines)


def test_pictures_and_what_rewards_log_stay_with_their_rows(tiny: Tiny, tmp_path: Path) -> None:
    """With all speed-ups; one reward alone decides, the other always differs."""
    import pandas

    rewards = [{"name": "tests.support.resample_ranks:lively"}, {"name": "tests.support.training:uneven"}]
    changes = {"resample": {"reward": "lively"}, "rewards": rewards, "speedups": "auto"}
    config = picture_config(tiny("qwen3_vl"), tmp_path, changes, max_steps=2, log_completions=True, logging_steps=2)
    watched: list[Watched] = []
    run_training(config, tmp_path / "run", prepare=lambda trainer: watched.append(Watched(trainer)))
    answers = [answer for some, _, _ in watched[0].rollouts for answer in some]
    assert {int(answer) % 2 for answer in answers} == {0}
    for _, _, output in watched[0].rollouts:  # even pictures are all of one size
        assert output["num_images"] == [1] * 2 * GROUP
        assert len(set(output["image_grid_thw"][:, 2].tolist())) == 1
    (table,) = (tmp_path / "run" / "checkpoints" / "completions").iterdir()
    assert pandas.read_parquet(table)["seen_answer"].tolist() == watched[0].rollouts[-1][0]


@pytest.mark.parametrize("with_picture", [0, 1])
def test_chosen_rows_may_have_no_picture_and_those_they_replace_one(
    with_picture: int, tiny: Tiny, tmp_path: Path
) -> None:
    """Odd answers never live; rows of one kind have a picture."""
    changes = {"resample": {}, "rewards": [{"name": "tests.support.resample_ranks:lively"}]}
    config = picture_config(tiny("qwen3_vl"), tmp_path, changes, max_steps=2, gradient_accumulation_steps=1)
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    kept = [row if int(row["answer"]) % 2 == with_picture else {**row, "image": None} for row in rows]
    Path(config.data.path).write_text("\n".join(map(json.dumps, kept)))
    watched: list[Watched] = []
    run_training(config, tmp_path / "run", prepare=lambda trainer: watched.append(Watched(trainer)))
    assert len(watched[0].rollouts) == 2
    for answers, _, output in watched[0].rollouts:
        assert {int(answer) % 2 for answer in answers} == {0}
        assert output["num_images"] == [1 - with_picture] * GROUP


@pytest.mark.slow
def test_two_processes_move_whole_rows_and_go_on_after_a_stop(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups lie across both; every process checks its rows against their rewards (`tests.support.resample_ranks`)."""
    changes = {"resample": {"max_rounds": 4}, "rewards": [{"name": "tests.support.resample_ranks:lively"}]}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 4, "save_steps": 2}
    model = tiny("qwen3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = text_config(model, tmp_path, changes, **sizes)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, "-m", "tests.support.resample_ranks", str(path), str(tmp_path / "whole"), str(tmp_path / "cut")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows checked: 24") == 2, done.stdout
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
