"""Dynamic sampling on several processes: `torchrun -m tests.support.resample_ranks CONFIG WHOLE CUT` trains in `WHOLE`,
and in `CUT` to a stop after two steps and on; each process checks every row it trains on against its reward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_autotune.config.schema import RunConfig
from tests.support.training import uneven

GROUP = 4


def lively(
    completion_ids: list[list[int]], answer: list[str], log_extra: Callable[..., None], **columns: Any
) -> list[float]:
    """1 for odd answers, and for even ones something else for most completions."""
    log_extra("seen_answer", list(answer))
    rewards = uneven(completion_ids)
    return [
        1.0 if int(of) % 2 else reward + row / 1000
        for row, (of, reward) in enumerate(zip(answer, rewards, strict=True))
    ]


class Checked:
    """Advantages of a process's rows, computed again from their completions and the rewards of all processes."""

    def __init__(self, trainer: Any) -> None:
        self.rows = 0
        self._trainer, self._score = trainer, trainer._generate_and_score_completions
        trainer._generate_and_score_completions = self.score

    def score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        output: dict[str, Any] = self._score(inputs)
        trainer, answers = self._trainer, [int(row["answer"]) for row in inputs]
        prompts, ids = (_ids(output[f"{part}_ids"], output[f"{part}_mask"]) for part in ("prompt", "completion"))
        texts = trainer.processing_class.batch_decode(prompts)
        assert all(f"What is {answer} plus" in text for answer, text in zip(answers, texts, strict=True)), texts
        groups = trainer.accelerator.gather(torch.tensor(answers)).view(-1, GROUP)
        assert (groups == groups[:, :1]).all(), groups
        mine = torch.tensor([1.0 if of % 2 else of_row for of, of_row in zip(answers, uneven(ids), strict=True)])
        rewards = trainer.accelerator.gather(mine).view(-1, GROUP)
        advantages = trainer.accelerator.gather(output["advantages"]).view(-1, GROUP)
        for of, reward, advantage in zip(groups[:, 0].tolist(), rewards, advantages, strict=True):
            if of % 2:
                assert (advantage == 0).all()
            else:  # in the order of their rewards, which differ by thousandths from these
                assert (advantage * (reward - reward.mean()) > -1e-2).all(), (reward, advantage)
        self.rows += len(inputs)
        return output


def _ids(ids: Any, mask: Any) -> list[list[int]]:
    return [row[of_row.bool()].tolist() for row, of_row in zip(ids, mask, strict=True)]


def main(path: str, whole: str, cut: str) -> None:
    from grpo_autotune.train.runs.callbacks import StopAfter
    from grpo_autotune.train.trainer import run_training

    config = RunConfig.from_yaml(Path(path).read_text(encoding="utf-8"))
    checked: list[Checked] = []
    run_training(config, whole, prepare=lambda trainer: checked.append(Checked(trainer)))
    sys.stdout.write(f"rows checked: {checked[0].rows}\n")
    run_training(config, cut, callbacks=[StopAfter(2)])
    run_training(config, cut, resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
