"""The same batch scored and trained on twice, by plain TRL and with speed-ups, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.trainers import GRPOTrainer, make_trainer

from grpo_autotune.speedups.install import speed_up  # isort: skip
import torch  # isort: skip


def ready(*args: Any, spread: float = 0.05, **kwargs: Any) -> GRPOTrainer:
    """As `make_trainer`, set to train, with adapters that are not zero (a fresh adapter's gradients half are)."""
    trainer = make_trainer(*args, **kwargs)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def generation(trainer: GRPOTrainer, seed: int = 0) -> dict[str, Any]:
    """One generation batch as TRL scores it, with noise where equal numbers would hide a mistake."""
    torch.manual_seed(seed)
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    generator = torch.Generator().manual_seed(seed)
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        if key in batch:
            batch[key] = batch[key] + 0.1 * torch.randn(batch[key].shape, generator=generator)
    batch["advantages"] = torch.randn(batch["advantages"].shape, generator=generator)
    return batch


def loss_and_gradients(trainer: GRPOTrainer, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and the gradient of every trainable parameter."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / scale if scale else float(found.abs().max())


def differences(
    build: Callable[[], GRPOTrainer], names: str | Sequence[str], change: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, float]:
    """Generate, score and train on one batch with both; relative differences of everything that is computed.

    Args:
        build: Makes the trainer, from scratch for each.
        names: Speed-ups, as `speed_up` takes them.
        change: Applied to both batches.
    """
    plain, fast = build(), build()
    installed = speed_up(fast, names)
    batches = [generation(plain), generation(fast)]
    found: dict[str, float] = {}
    for key in ("completion_ids", "ref_per_token_logps", "old_per_token_logps"):
        if key in batches[0]:
            found[key] = apart(batches[1][key].float(), batches[0][key].float())
    for batch in batches:
        if change is not None:
            change(batch)
    shared = {**batches[0], "group_id": batches[1]["group_id"]}
    wanted, wanted_gradients = loss_and_gradients(plain, batches[0])
    loss, gradients = loss_and_gradients(fast, shared)
    assert gradients.keys() == wanted_gradients.keys() and gradients
    found["loss"] = apart(loss, wanted)
    found["gradients"] = max(apart(gradients[name], wanted_gradients[name]) for name in gradients)
    found["metrics"] = max(
        abs(fast._metrics["train"][name][-1] - values[-1]) / max(1.0, abs(values[-1]))
        for name, values in plain._metrics["train"].items()
        if name != "step_time" and name in fast._metrics["train"] and values[-1] == values[-1]
    )
    found |= {f"fact.{key}": value for name in installed.facts() for key, value in installed.facts()[name].items()}
    installed.remove()
    return found
