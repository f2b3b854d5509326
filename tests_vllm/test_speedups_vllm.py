"""Speed-ups on batches of a real engine, whose log-probs TRL corrects for: every mode, as plain TRL does it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.speedups.install import speed_up
from tests.support.exactness import apart, generation, loss_and_gradients, set_to_train

EXACT = 1e-5
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CLIP = (0.8, 1.25)
OLDER = (0.0, 0.3, -0.3, 0.0)
"""Added to every log-prob of the engine, for two neighbouring rows each, as if its weights were older: without it every
ratio is near 1, and no mode does anything."""
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


class Engine:
    """A layer on the turn of a real engine, which is given again until `turn` is None.

    Every other completion ends with a stop token, which the engine did not draw and has no log-prob for: TRL takes its
    ratio as 1.
    """

    def __init__(self, trainer: Any) -> None:
        self.stop = trainer.eos_token_ids[0]
        self.turn: tuple[list[list[int]], list[list[float | None]]] | None = None
        self.handles = wrap_rows(trainer, [(find("turn"), self.layer)])

    def layer(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self.turn is None:
            completions, logps = call_next(*args, **kwargs)
            ids = [[*row[:-1], self.stop] if index % 2 else row for index, row in enumerate(completions)]
            older = [[logp + OLDER[index // 2] for logp in row] for index, row in enumerate(logps)]
            self.turn = ids, [[*row[:-1], None] if index % 2 else row for index, row in enumerate(older)]
        return self.turn


def computed(trainer: Any) -> tuple[dict[str, Any], torch.Tensor, dict[str, torch.Tensor]]:
    """A batch with a group of no advantage, its loss and its gradients."""
    batch = generation(trainer)
    batch["advantages"][:4] = 0.0
    return batch, *loss_and_gradients(trainer, batch)


def share_at_the_clip(mode: str, ratios: torch.Tensor) -> float:
    return float(torch.isin(ratios, torch.tensor([0.0] if mode.endswith("mask") else CLIP)).float().mean())


def test_importance_sampling_of_every_mode(colocated: Callable[..., Any], text_rows: list[dict[str, Any]]) -> None:
    trainer = set_to_train(colocated("qwen3", text_rows, beta=0.05, max_completion_length=8, **GROUPS))
    trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = CLIP
    engine = Engine(trainer)
    cases = itertools.product(MODES, [(0.05, False), (0.0, True)])
    for trainer.vllm_importance_sampling_mode, (trainer.beta, trainer.mask_truncated_completions) in cases:
        mode = trainer.vllm_importance_sampling_mode
        case = f"{mode}, beta {trainer.beta}, mask_truncated_completions {trainer.mask_truncated_completions}"
        engine.turn = None
        batch, wanted, wanted_gradients = computed(trainer)
        assert 0.0 < share_at_the_clip(mode, batch["importance_sampling_ratio"]) < 1.0, case
        speedups = speed_up(trainer)
        on = {row.name for row in speedups.table() if row.on}
        dead = {"skip_dead"} if trainer.beta == 0.0 else set()
        assert on == {"shared_prefix", "length_sort", "fused_lora"} | dead, case
        fast, loss, gradients = computed(trainer)
        assert {row.name for row in speedups.table() if row.on} == on, f"{case}: a speed-up fell back"
        assert speedups.facts()["shared_prefix"]["shared_passes"] == 2 + (trainer.beta > 0.0), case
        speedups.remove()
        assert torch.equal(fast["completion_ids"], batch["completion_ids"])
        for key in ("old_per_token_logps", "importance_sampling_ratio"):
            assert apart(fast[key], batch[key]) <= EXACT, f"{case}: {key}"
        assert apart(loss, wanted) <= EXACT and float(wanted) != 0.0, case
        assert gradients.keys() == wanted_gradients.keys() and gradients, case
        assert max(apart(gradients[name], wanted_gradients[name]) for name in gradients) <= EXACT, case
    for handle in engine.handles:
        handle.remove()
