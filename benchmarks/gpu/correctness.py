"""Stage correctness: speed-ups against plain TRL on this device, from a float32 model of two layers to a 2B one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu.attention import CASES, TINY, attend, forms, operands
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import release_trainer, run_config, trainer_of
from tests.support.exactness import differences, ready
from tests.support.exactness_ranks import rows_of
from tests.support.tiny import tiny_model

import torch  # isort: skip

from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.speedups.batches.groups import groups_of
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.speedups.selection import OPTIONS

EXACT, LIMIT = 1e-5, 1e-4
"""Predicted, and the bar, in float32: relative to the largest value. Kernels of other shapes add in another order."""

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
MEDIA = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
COMPLETION = 64
KEPT_S = 25.0
"""For the parts in bfloat16."""


def measure(bench: Bench) -> None:
    """Write the rows: float32, one layer in bfloat16, and the 2B model."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        in_float32(bench)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for name, form, pin in forms(bench):
        if form is not None:
            with bench.part(f"one layer: {name}"), pin():
                one_layer(bench, name, form)
    with bench.part("2B: log-probs"):
        real_size(bench)


def in_float32(bench: Bench) -> None:
    """Log-probs, loss and gradients of tiny models, every form, with and without gradient checkpointing."""
    shared = [{"name": "shared_prefix", "form": form} for form in OPTIONS["shared_prefix"]["form"]]
    wanted: list[tuple[str, bool, Any, bool]] = [("qwen3_vl", True, "auto", True)]
    if not bench.tiny:
        wanted += [("qwen3_vl", checkpointing, form, True) for checkpointing in (True, False) for form in shared]
        wanted += [("qwen3", checkpointing, "auto", True) for checkpointing in (True, False)]
        wanted += [("qwen3_vl", False, "auto", True), ("qwen3_vl", True, shared[0], False)]
    wanted.sort(key=lambda row: "flex" in str(row[2]))  # it compiles for many seconds
    for kind, checkpointing, names, cudnn in wanted:
        told = names if isinstance(names, str) else f"shared_prefix {names['form']}"
        label = f"{kind}, {told}{'' if checkpointing else ', no checkpointing'}{'' if cudnn else ', cuDNN off'}"
        if bench.left() < KEPT_S and not bench.tiny:
            bench.row(label, None, note="not begun: no time was left")
            continue
        with bench.part(label), cudnn_attention(cudnn):
            apart = compared(bench, kind, checkpointing, names)
            same = apart.pop("completion_ids", 0.0)
            facts = {key: apart.pop(key) for key in list(apart) if key.startswith("fact.")}
            worst = max(apart.values())
            ok = worst <= LIMIT and same == 0.0
            parts = {key: f"{value:.1e}" for key, value in apart.items()}
            note = f"{parts}, greedy tokens equal: {same == 0.0}, {facts}"
            bench.row(label, worst, "", predicted=(0.0, EXACT), ok=ok, note=note)


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Let cuDNN compute attention, or not."""
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def compared(bench: Bench, kind: str, checkpointing: bool, names: Any) -> dict[str, float]:
    """Largest relative differences on one batch of greedy completions."""
    folder = bench.scratch / "tiny"
    path = folder / kind if (folder / kind).exists() else tiny_model(kind, folder)
    rows = rows_of("picture" if kind.endswith("vl") else "text")
    greedy: dict[str, Any] = {"generation_kwargs": {"do_sample": False}, "beta": 0.05, "num_iterations": 2}

    def build() -> Any:
        trainer = ready(path, rows, bench.scratch / "out", gradient_checkpointing=checkpointing, **greedy, **GROUPS)
        assert trainer.accelerator.device.type == bench.device.type
        return trainer

    return differences(build, [names] if isinstance(names, dict) else names)


def one_layer(bench: Bench, name: str, form: Any) -> None:
    """Error of attention's output and gradients in this form against float64, relative, largest of the four."""
    case = TINY[0] if bench.tiny else CASES[0]
    states, layout = operands(bench, case, case.completion)
    output = attend(form, states, layout, case)
    computed = [output, *torch.autograd.grad(output, states, torch.ones_like(output))]
    exact = tuple(state.detach().double().requires_grad_() for state in states)
    wanted_output = by_mask(exact, layout, case)
    wanted = [wanted_output, *torch.autograd.grad(wanted_output, exact, torch.ones_like(wanted_output))]
    worst = max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(computed, wanted, strict=True))
    bar = (2e-3, 1e-2) if bench.on_gpu else (0.0, 1e-5)
    bench.row(f"one layer against float64: {name}", worst, "", predicted=bar, ok=worst <= 2 * bar[1])


def by_mask(states: tuple[torch.Tensor, ...], layout: Any, case: Any) -> torch.Tensor:
    """Attention over the flat sequence by its definition, (1, T, H, D)."""
    query, key, value = states
    at = torch.arange(layout.tokens, device=query.device)
    among = (layout.owner[None] < 0) | (layout.owner[None] == layout.owner[:, None])
    mask = (at[None] <= at[:, None]) & among & (layout.prompt[None] == layout.prompt[:, None])
    groups = case.heads.query // case.heads.keys
    key, value = (state.repeat_interleave(groups, dim=1) for state in (key, value))
    scores = (query @ key.transpose(-1, -2)) * case.heads.width**-0.5
    attended: torch.Tensor = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)
    return attended


def real_size(bench: Bench) -> None:
    """Log-probs of two groups of the 2B model: shared against plain, beside plain one row at a time against plain."""
    rows = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1} if not bench.tiny else {}
    trainer = trainer_of(bench, run_config(bench, **rows))
    batch = forced_batch(trainer, 6 if bench.tiny else COMPLETION)
    plain, single = scores(trainer, batch), scores(trainer, batch, at_once=1)
    installed = speed_up(trainer, ["shared_prefix"])
    groups = groups_of(trainer)
    groups.current = torch.arange(len(plain), device=bench.device) // trainer.num_generations
    shared = scores(trainer, batch)
    groups.current = None
    passes = installed.facts()["shared_prefix"]
    mask = batch["completion_mask"].bool()
    yardstick, apart = (float((other - plain)[mask].square().mean().sqrt()) for other in (single, shared))
    note = f"yardstick (rows one by one) {yardstick:.2e}, {passes}"
    bench.row("2B: log-probs, shared from plain", apart, "nats rms", predicted=(5e-3, 2e-2), note=note)
    if yardstick:
        ratio = apart / yardstick
        bench.row("2B: that over the yardstick", ratio, predicted=(0.8, 1.5), ok=None if bench.tiny else ratio <= 2.0)
    release_trainer(trainer)


def forced_batch(trainer: Any, length: int) -> dict[str, Any]:
    """A generation batch of random completions of one length; the model generates nothing."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    digits = torch.tensor(tokenizer("0 1 2 3 4 5 6 7 8 9")["input_ids"]).flatten()
    inputs = next(iter(trainer.get_train_dataloader()))
    drawn = digits[torch.randint(len(digits), (len(inputs), length), generator=generator)].tolist()
    handles = wrap_rows(trainer, [(find("turn"), lambda call_next, *args, **kwargs: (drawn, None))])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batch: dict[str, Any] = trainer._generate_and_score_completions(inputs)
    for handle in handles:
        handle.remove()
    return batch


def scores(trainer: Any, batch: dict[str, Any], at_once: int | None = None) -> torch.Tensor:
    """Log-probs of the batch's completions without gradients, (B, C)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    media = {key: batch[key] for key in MEDIA if key in batch}
    size = {"batch_size": at_once} if at_once else {}
    with torch.no_grad():
        logps: torch.Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], **size, **media
        )[0]
    return logps.float()
