"""The same batch scored and trained on twice, by plain TRL and with speed-ups, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.support.trainers import make_trainer

from grpo_autotune.seams.table import find, wrap_rows  # isort: skip
from grpo_autotune.speedups.batches.rows import trim  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.selection import Wanted  # isort: skip
import torch  # isort: skip
from trl import GRPOTrainer  # isort: skip
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid  # isort: skip


def ready(*args: Any, spread: float = 0.05, **kwargs: Any) -> GRPOTrainer:
    """As `make_trainer`, `set_to_train`."""
    return set_to_train(make_trainer(*args, **kwargs), spread)


def set_to_train(trainer: GRPOTrainer, spread: float = 0.05) -> GRPOTrainer:
    """As TRL's loop sets it, with adapters that are not zero (a fresh adapter's gradients half are)."""
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
    batch: dict[str, Any] = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    generator = torch.Generator().manual_seed(seed)  # of the CPU: one noise on every device
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        if key in batch:
            batch[key] = batch[key] + 0.1 * torch.randn(batch[key].shape, generator=generator).to(batch[key])
    batch["advantages"] = torch.randn(batch["advantages"].shape, generator=generator).to(batch["advantages"])
    return batch


def loss_and_gradients(trainer: GRPOTrainer, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, and the gradient of every trainable parameter."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def micro_batches(trainer: GRPOTrainer, dead: Sequence[int] = ()) -> list[dict[str, Any]]:
    """A generation in TRL's micro batches, each cut to the longest of its rows; rows of `dead` have no advantage."""
    batch = generation(trainer)
    batch["advantages"][list(dead)] = 0.0
    parts = split_tensor_dict(split_pixel_values_by_grid(batch), trainer.args.steps_per_generation)
    return [trim(unsplit_pixel_values_by_grid(part)) for part in parts]


class Accumulated(NamedTuple):
    """What an accumulation computes: the summed loss, gradients by parameter, and TRL's metrics of each micro batch."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, list[float]]


def accumulated(trainer: GRPOTrainer, batches: Sequence[dict[str, Any]], first: int = 0) -> Accumulated:
    """An accumulation as transformers' loop runs it, from micro step `first` on."""
    trainer._step = first
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    total = 0.0
    for index, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        trainer.accelerator.backward(loss)
        total += float(loss.detach())
        trainer._step += 1
    trainer._step = 0
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return Accumulated(total, gradients, {name: list(values) for name, values in trainer._metrics["train"].items()})


def gradients_apart(found: Accumulated, wanted: Accumulated) -> float:
    """The largest relative difference of a gradient."""
    assert found.gradients.keys() == wanted.gradients.keys() and wanted.gradients
    return max(apart(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = float(wanted.abs().max())
    return float((found - wanted).abs().max()) / scale if scale else float(found.abs().max())


def asked(names: str | Sequence[Any]) -> str | Sequence[Any]:
    """Speed-ups as `speed_up` takes them; `shared_prefix=split` is one with its option `form`."""
    name, given, form = names.partition("=") if isinstance(names, str) else ("", "", "")
    return [{"name": name, "form": form}] if given else names


def differences(
    build: Callable[[], GRPOTrainer], names: Wanted, change: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, float]:
    """Generate, score and train on one batch with both; relative differences of everything that is computed.

    Args:
        build: Makes the trainer, from scratch for each.
        names: Speed-ups, as `asked` reads them.
        change: Applied to both batches.
    """
    plain, fast = build(), build()
    installed = speed_up(fast, asked(names))
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


class Numbers(NamedTuple):
    """What a trainer computes on one batch.

    Attributes:
        logps: Log-probs of the old policy and of the reference, by their key in TRL's batch.
        loss: A scalar.
        gradients: One a trainable parameter.
    """

    logps: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def drawn(batch: dict[str, Any]) -> list[list[int]]:
    """The completions of a generation batch, without padding."""
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def numbers(trainer: GRPOTrainer, batch: dict[str, Any]) -> Numbers:
    """Score and train on a batch that another trainer generated.

    Log-probs are of that batch's completions, scored anew; loss and gradients start from that batch's log-probs.
    """
    inputs = next(iter(trainer.get_train_dataloader()))
    completions = drawn(batch)
    handles = wrap_rows(trainer, [(find("turn"), lambda call_next, *args, **kwargs: (completions, None))])
    scored = trainer._generate_and_score_completions(inputs)
    for handle in handles:
        handle.remove()
    assert torch.equal(scored["completion_ids"], batch["completion_ids"])
    shared = {**batch, "group_id": scored["group_id"]} if "group_id" in scored else batch
    loss, gradients = loss_and_gradients(trainer, shared)
    logps = {key: scored[key].float() for key in ("old_per_token_logps", "ref_per_token_logps") if key in scored}
    return Numbers(logps, loss, gradients)


def numbers_apart(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """Relative differences of log-probs, loss and gradients, the largest of each."""
    assert found.logps.keys() == wanted.logps.keys() and found.gradients.keys() == wanted.gradients.keys()
    assert wanted.logps and wanted.gradients
    return {
        "log_probs": max(apart(found.logps[key], wanted.logps[key]) for key in wanted.logps),
        "loss": apart(found.loss, wanted.loss),
        "gradients": max(apart(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients),
    }


class Rounded(NamedTuple):
    """Differences under autocast to bfloat16, each by what differs (see `numbers_apart`).

    Attributes:
        fast: Sped up from plain TRL, both under autocast.
        plain: Plain TRL under autocast from plain TRL in float32: what rounding alone does.
        fast_from_float32: Sped up under autocast from plain TRL in float32.
    """

    fast: dict[str, float]
    plain: dict[str, float]
    fast_from_float32: dict[str, float]


def under_autocast(
    build: Callable[[bool], GRPOTrainer], names: Sequence[str], batches: int
) -> dict[str, list[Rounded]]:
    """The differences on a few batches, generated by plain TRL in float32; a list for each of `names`.

    Args:
        build: Makes the trainer, from scratch for each; told whether to autocast to bfloat16.
        names: Speed-ups to try, each by itself, as `asked` reads them.
        batches: How many; one batch's largest difference says little where everything is rounded.
    """
    exact, plain = build(False), build(True)
    sped_up = {name: build(True) for name in names}
    installed = [speed_up(trainer, asked(name)) for name, trainer in sped_up.items()]
    on = [[row.on for row in speedups.table()] for speedups in installed]
    found: dict[str, list[Rounded]] = {name: [] for name in names}
    for seed in range(batches):
        batch = generation(exact, seed)
        precise, rounded = numbers(exact, batch), numbers(plain, batch)
        for name, trainer in sped_up.items():
            fast = numbers(trainer, batch)
            pairs = ((fast, rounded), (rounded, precise), (fast, precise))
            found[name].append(Rounded(*(numbers_apart(*pair) for pair in pairs)))
    assert on == [[row.on for row in speedups.table()] for speedups in installed], "a speed-up fell back"
    for speedups in installed:
        speedups.remove()
    return found
