"""Losses of verl, EasyR1 and ms-swift in NumPy, from the formulas of papers and sources, against TRL's own loss with
the keys that their files become: loss and gradient of an optimizer step, on random batches.

Gradients of the references are central differences, of TRL's loss autograd's, both by the log-probs of the policy. What
a formula holds fixed (sg) is an argument of its own. Legend: B rows of a rollout, T tokens, m rows of a micro batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from tests.support.trainers import make_trainer

pytestmark = pytest.mark.slow

Array = np.ndarray[Any, np.dtype[np.float64]]
Reference = Callable[[Array, Array, "Step"], float]
"""Loss by the policy's log-probs (B, T), the same held fixed, and the rest."""

B, T, G, M = 16, 12, 4, 2
LOW, HIGH, DUAL, BETA = 0.2, 0.28, 3.0, 0.04
EXACT = 1e-6


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step; all arrays (rows, T), advantages (rows, 1)."""

    old: Array
    ref: Array
    advantages: Array
    mask: Array

    @property
    def micro_batches(self) -> list[slice]:
        return [slice(row, row + M) for row in range(0, len(self.mask), M)]


def rollout(seed: int, *, apart: float = 0.6, ragged: bool = True) -> tuple[Array, Step]:
    """Log-probs of the policy and a rollout: the old policy is `apart` (nats, a standard deviation) from it."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B) if ragged else np.full(B, T)
    mask = (np.arange(T) < lengths[:, None]).astype(float)
    new = -rng.exponential(1.5, (B, T))
    rewards = rng.random((B // G, G)) ** 2
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, ddof=1, keepdims=True)).reshape(B, 1)
    step = Step(new + apart * rng.standard_normal((B, T)), new + 0.3 * rng.standard_normal((B, T)), advantages, mask)
    return new, step


# what a token is worth


def clipped(ratio: Array, advantages: Array, dual: float | None = DUAL) -> Array:
    """PPO with its own upper bound (DAPO, arXiv:2503.14476, eq. 10) and dual clip (Ye et al., arXiv:1912.09729)."""
    worth: Array = np.minimum(ratio * advantages, np.clip(ratio, 1 - LOW, 1 + HIGH) * advantages)
    return worth if dual is None else np.where(advantages < 0, np.maximum(worth, dual * advantages), worth)


def k3(new: Array, ref: Array) -> Array:
    """Schulman's third estimator of KL; verl, EasyR1 and ms-swift cut it off at 10."""
    kl: Array = np.minimum(np.exp(ref - new) - (ref - new) - 1, 10.0)
    return kl


def tokens_ppo(new: Array, fixed: Array, step: Step) -> Array:
    return -clipped(np.exp(new - step.old), step.advantages)


def tokens_gspo(new: Array, fixed: Array, step: Step) -> Array:
    """verl's and ms-swift's token form: sg[s_i] pi / sg[pi], where s_i is the geometric mean of a row's ratios."""
    mean = ((fixed - step.old) * step.mask).sum(1, keepdims=True) / step.mask.sum(1, keepdims=True)
    return -clipped(np.exp(mean + new - fixed), step.advantages, dual=None)


def tokens_gspo_of_easyr1(new: Array, fixed: Array, step: Step) -> Array:
    """The sequence's ratio at each token, with a gradient through the mean, and dual clip."""
    mean = ((new - step.old) * step.mask).sum(1, keepdims=True) / step.mask.sum(1, keepdims=True)
    return -clipped(np.exp(mean) * np.ones_like(new), step.advantages)


def tokens_cispo(new: Array, fixed: Array, step: Step, low: float = LOW) -> Array:
    """MiniMax-M1, arXiv:2506.13585, eq. 4: sg[clip(ratio)] A log pi."""
    weight: Array = np.clip(np.exp(fixed - step.old), 1 - low, 1 + HIGH)
    return -weight * step.advantages * new


def tokens_sapo(new: Array, fixed: Array, step: Step) -> Array:
    """Soft gate, arXiv:2511.20347: 4/tau sigmoid(tau (ratio - 1)), tau by the advantage's sign."""
    tau = np.where(step.advantages > 0, 1.0, 1.05)
    gate: Array = 4 / tau / (1 + np.exp(-tau * (np.exp(new - step.old) - 1)))
    return -gate * step.advantages


# what becomes of the tokens


def token_mean(tokens: Array, step: Step) -> float:
    return float((tokens * step.mask).sum() / step.mask.sum())


def token_mean_by_micro_batch(tokens: Array, step: Step) -> float:
    """verl's workers of before 2026."""
    parts = [(tokens[rows] * step.mask[rows]).sum() / step.mask[rows].sum() for rows in step.micro_batches]
    return float(np.mean(parts))


def sequence_mean(tokens: Array, step: Step) -> float:
    return float(((tokens * step.mask).sum(1) / step.mask.sum(1)).mean())


def sequence_mean_of_easyr1(tokens: Array, step: Step, size: int = B) -> float:
    """Micro batches of `size` rows, each weighted by its tokens."""
    means, counts = (tokens * step.mask).sum(1) / step.mask.sum(1), step.mask.sum(1)
    parts = [slice(row, row + size) for row in range(0, len(counts), size)]
    return float(sum(means[rows].mean() * counts[rows].sum() for rows in parts) / counts.sum())


def token_sum(tokens: Array, step: Step) -> float:
    return float((tokens * step.mask).sum(1).mean())


def token_sum_norm(tokens: Array, step: Step) -> float:
    return token_sum(tokens, step) / T


def of(tokens: Callable[..., Array], total: Callable[[Array, Step], float], beta: float = BETA) -> Reference:
    def loss(new: Array, fixed: Array, step: Step) -> float:
        return total(tokens(new, fixed, step) + beta * k3(new, step.ref), step)

    return loss


PPO = {"epsilon": LOW, "epsilon_high": HIGH, "delta": DUAL, "beta": BETA, "use_bias_correction_kl": False}
SEQUENCE = {**PPO, "delta": None, "importance_sampling_level": "sequence"}
CISPO = {**PPO, "loss_type": "cispo", "epsilon_high": 1 + HIGH}

EQUAL: dict[str, tuple[Reference, dict[str, Any]]] = {
    "verl token-mean, EasyR1 token, swift dapo": (of(tokens_ppo, token_mean), {**PPO, "loss_type": "dapo"}),
    "verl token-mean, workers of 2025; swift bnpo": (
        of(tokens_ppo, token_mean_by_micro_batch), {**PPO, "loss_type": "bnpo"},
    ),
    "verl seq-mean-token-mean, swift grpo": (of(tokens_ppo, sequence_mean), {**PPO, "loss_type": "grpo"}),
    "verl seq-mean-token-sum": (of(tokens_ppo, token_sum), {**PPO, "loss_type": "luspo"}),
    "verl seq-mean-token-sum-norm, swift dr_grpo": (of(tokens_ppo, token_sum_norm), {**PPO, "loss_type": "dr_grpo"}),
    "EasyR1 seq, micro batches of one row": (
        of(tokens_ppo, lambda tokens, step: sequence_mean_of_easyr1(tokens, step, 1)), {**PPO, "loss_type": "dapo"},
    ),
    "EasyR1 seq, one micro batch": (of(tokens_ppo, sequence_mean_of_easyr1), {**PPO, "loss_type": "grpo"}),
    "verl gspo, swift sequence and sequence_token": (
        of(tokens_gspo, sequence_mean), {**SEQUENCE, "loss_type": "grpo"},
    ),
    "EasyR1 gspo, token": (
        of(tokens_gspo_of_easyr1, token_mean), {**SEQUENCE, "loss_type": "dapo", "delta": DUAL},
    ),
    "verl sapo, swift sapo": (
        of(tokens_sapo, sequence_mean),
        {**PPO, "loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    ),
    "swift cispo": (of(lambda *given: tokens_cispo(*given, low=1.0), token_mean), CISPO),
    "no KL": (of(tokens_ppo, token_mean, beta=0.0), {**PPO, "loss_type": "dapo", "beta": 0.0}),
}  # fmt: skip
"""What a source computes, and TRL's keys for it; one optimizer step per rollout."""


@pytest.fixture(scope="module")
def trainer(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "answer": ""} for n in range(B)]
    trainer = make_trainer(tiny("qwen3"), rows, tmp_path_factory.mktemp("losses"), max_completion_length=T, beta=BETA)
    trainer.model.train()
    return trainer


def set_keys(trainer: GRPOTrainer, keys: dict[str, Any], steps: int) -> None:
    """Give a trainer keys as `GRPOTrainer.__init__` does."""
    for name, value in keys.items():
        setattr(trainer.args, name, value)
    trainer.loss_type, trainer.beta = keys["loss_type"], keys["beta"]
    trainer.epsilon_low, trainer.epsilon_high = keys["epsilon"], keys["epsilon_high"]
    trainer.importance_sampling_level = keys.get("importance_sampling_level", "token")
    trainer.args.steps_per_generation = B // M
    trainer.current_gradient_accumulation_steps = B // M // steps


def of_trl(trainer: GRPOTrainer, keys: dict[str, Any], new: Array, step: Step, steps: int = 1) -> tuple[float, Array]:
    """TRL's loss of the first of `steps` optimizer steps of a rollout, summed over its micro batches, and its gradient
    by the log-probs of the step's rows."""
    set_keys(trainer, keys, steps)
    logps = torch.tensor(new, requires_grad=True)
    tensors = {name: torch.tensor(value) for name, value in vars(step).items()}
    total = torch.zeros((), dtype=torch.float64)
    for rows in step.micro_batches[: B // M // steps]:
        mask = tensors["mask"][rows].long()
        batch = {
            "prompt_ids": torch.ones(M, 2, dtype=torch.long), "prompt_mask": torch.ones(M, 2, dtype=torch.long),
            "completion_ids": torch.ones(M, T, dtype=torch.long), "completion_mask": mask,
            "advantages": tensors["advantages"][rows, 0], "num_items_in_batch": tensors["mask"].sum(),
            "old_per_token_logps": tensors["old"][rows], "ref_per_token_logps": tensors["ref"][rows],
        }  # fmt: skip

        def given(self: Any, *args: Any, rows: slice = rows, **kwargs: Any) -> Any:
            return logps[rows], torch.zeros(M, T), None

        trainer._get_per_token_logps_and_entropies = MethodType(given, trainer)
        total = total + trainer._compute_loss(trainer.model, batch)
    total.backward()
    assert logps.grad is not None
    return total.item(), logps.grad.numpy()


def of_reference(loss: Reference, new: Array, step: Step, size: float = 1e-6) -> tuple[float, Array]:
    gradient = np.zeros_like(new)
    for place in np.argwhere(step.mask > 0):
        moved = [new.copy(), new.copy()]
        for values, sign in zip(moved, (1, -1), strict=True):
            values[tuple(place)] += sign * size
        up, down = (loss(values, new, step) for values in moved)
        gradient[tuple(place)] = (up - down) / (2 * size)
    return loss(new, new, step), gradient


def apart(left: Array, right: Array) -> float:
    """Norm of the difference of two gradients, against the second's."""
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("source", EQUAL)
def test_loss_and_gradient_are_the_sources(source: str, seed: int, trainer: GRPOTrainer) -> None:
    reference, keys = EQUAL[source]
    new, step = rollout(seed)
    ratios = np.exp(new - step.old)[step.mask > 0]
    assert (ratios > DUAL).any() and (ratios < 1 - LOW).any() and (abs(ratios - 1) < LOW).any()
    loss, gradient = of_reference(reference, new, step)
    of_keys, by_keys = of_trl(trainer, keys, new, step)
    assert of_keys == pytest.approx(loss, abs=EXACT)
    assert abs(by_keys - gradient).max() < EXACT


def test_several_steps_per_rollout_are_weighed_by_their_share_of_its_tokens(trainer: GRPOTrainer) -> None:
    """TRL's dapo divides by the mean tokens of a rollout's steps, verl by the step's own."""
    for ragged in (True, False):
        new, whole = rollout(2, ragged=ragged)
        first = Step(**{name: value[: B // 2] for name, value in vars(whole).items()})
        keys = {**PPO, "loss_type": "dapo"}
        _, gradient = of_reference(of(tokens_ppo, token_mean), new[: B // 2], first)
        _, by_keys = of_trl(trainer, keys, new, whole, steps=2)
        share = first.mask.sum() / (whole.mask.sum() / 2)
        assert (abs(share - 1) > 0.05) == ragged
        assert by_keys[: B // 2] == pytest.approx(gradient * share, abs=EXACT)


FACTORS: dict[str, tuple[Callable[[Array, Step], float], str, float]] = {
    "swift's dapo is divided twice": (lambda x, step: token_mean(x, step) / (B // M), "dapo", B // M),
    "verl's token sums of 2025 are not divided by rows": (
        lambda x, step: token_sum_norm(x, step) * M,
        "dr_grpo",
        1 / M,
    ),
}
"""A source's total, TRL's loss type, and TRL's loss over the source's."""


@pytest.mark.parametrize("source", FACTORS)
def test_a_constant_factor_is_left(source: str, trainer: GRPOTrainer) -> None:
    """AdamW does not feel it, `max_grad_norm` does."""
    total, loss_type, factor = FACTORS[source]
    new, step = rollout(3)
    _, gradient = of_reference(of(tokens_ppo, total), new, step)
    _, by_keys = of_trl(trainer, {**PPO, "loss_type": loss_type}, new, step)
    assert by_keys == pytest.approx(gradient * factor, abs=EXACT)


def test_kl_is_cut_off_where_a_token_fell_fourteenfold_below_the_reference(trainer: GRPOTrainer) -> None:
    new, step = rollout(4)
    far = np.zeros((B, T), dtype=bool)
    far[::3, 0] = True
    step = Step(step.old, np.where(far, new + 2.65, step.ref), step.advantages, step.mask)
    _, gradient = of_reference(of(tokens_ppo, token_mean), new, step)
    _, by_keys = of_trl(trainer, {**PPO, "loss_type": "dapo"}, new, step)
    assert np.exp(2.61) - 2.61 - 1 < 10 < np.exp(2.65) - 2.65 - 1
    only_in_trl = np.where(far, BETA * (1 - np.exp(2.65)), 0.0) / step.mask.sum()
    assert by_keys - gradient == pytest.approx(only_in_trl, abs=EXACT)


def test_kl_times_the_ratio_is_another_gradient(trainer: GRPOTrainer) -> None:
    """TRL's default since 1.12 differs on the first step already, by beta times each token's KL."""
    new, step = rollout(5, apart=0.0)
    keys = {**PPO, "loss_type": "dapo"}
    _, by_keys = of_trl(trainer, keys, new, step)
    _, by_default = of_trl(trainer, {**keys, "use_bias_correction_kl": True}, new, step)
    assert by_default - by_keys == pytest.approx(BETA * k3(new, step.ref) * step.mask / step.mask.sum(), abs=EXACT)


def test_cispo_has_no_lower_bound_here(trainer: GRPOTrainer) -> None:
    """verl and EasyR1 bound the ratio on both sides: alike on the first step, and above 1 - low."""
    for spread in (0.0, 0.6):
        new, step = rollout(6, apart=spread)
        _, gradient = of_reference(of(tokens_cispo, token_mean), new, step)
        _, by_keys = of_trl(trainer, CISPO, new, step)
        below = np.maximum(1 - LOW - np.exp(new - step.old), 0) * step.mask
        assert (below > 0).any() == (spread > 0)
        assert by_keys - gradient == pytest.approx(below * step.advantages / step.mask.sum(), abs=EXACT)


APART: dict[str, tuple[Reference, dict[str, Any], float]] = {
    "EasyR1 seq, micro batches of two rows": (
        of(tokens_ppo, lambda tokens, step: sequence_mean_of_easyr1(tokens, step, 2)),
        {**PPO, "loss_type": "grpo"}, 0.495,
    ),
    "EasyR1 sapo, token": (
        of(tokens_sapo, token_mean),
        {**PPO, "loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}, 0.991,
    ),
    "verl gspo with KL by token-mean": (
        lambda new, fixed, step: sequence_mean(tokens_gspo(new, fixed, step), step)
        + BETA * token_mean(k3(new, step.ref), step),
        {**SEQUENCE, "loss_type": "grpo"}, 0.00667,
    ),
}  # fmt: skip
"""Sources that no key expresses: the nearest keys, and how far the gradient is, against its norm."""


@pytest.mark.parametrize("source", APART)
def test_the_size_of_a_difference(source: str, trainer: GRPOTrainer) -> None:
    reference, keys, size = APART[source]
    new, step = rollout(7)
    _, gradient = of_reference(reference, new, step)
    _, by_keys = of_trl(trainer, keys, new, step)
    assert apart(by_keys, gradient) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_differ_by_what_is_added_to_the_deviation(scale: str, trainer: GRPOTrainer) -> None:
    """verl and EasyR1 add 1e-6, TRL and ms-swift 1e-4; without the deviation they are the same."""
    rewards = np.random.default_rng(8).integers(0, 2, (B // G, G)).astype(float)
    rewards[0] = [0.0, 0.0, 0.0, 1.0]
    trainer.reward_funcs[0] = lambda completions, **columns: rewards.flatten().tolist()
    trainer.scale_rewards, trainer.num_generations, trainer.args.steps_per_generation = scale, G, B // M
    rows = [trainer.train_dataset[row // G] for row in range(B)]
    by_trl = trainer._generate_and_score_completions(rows)["advantages"].double().numpy().reshape(B // G, G)
    centred, deviation = rewards - rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    if scale == "none":
        assert by_trl == pytest.approx(centred, abs=EXACT)
        return
    assert by_trl == pytest.approx(centred / (deviation + 1e-4), abs=EXACT)
    by_verl = (centred / (deviation + 1e-6))[0]
    assert abs(by_trl[0] - by_verl).max() / abs(by_verl).max() == pytest.approx(1e-4 / 0.5, rel=0.02)
