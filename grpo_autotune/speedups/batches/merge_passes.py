"""Neighbouring micro batches of one accumulation go through the model as one pass, forward and backward.

TRL's loss is a function of the log-probs and entropies of a micro batch, and the gradients of an accumulation are
summed. So the micro batches of a window wait until the last of them: what each asks of the model is recorded, log-probs
and entropies come from one pass over several, and TRL's own `compute_loss` runs on each with its rows of them. Every
divisor, clipping and metric is that of TRL's micro batch, whatever the loss type; the sum of the losses goes backward.
With several processes gradients are synchronized by the last pass of a step, as TRL's last micro batch does it; under
DeepSpeed and FSDP, where every pass is one for all ranks, two micro batches go together where they do on all ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from grpo_autotune.errors import TrainingError
from grpo_autotune.seams.layers import INNER, OUTERMOST, Next
from grpo_autotune.seams.ranks import InStep, backward_in_step, most, syncs_each_pass
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import SPEED_UPS, compute_dtype
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.groups import groups_of
from grpo_autotune.speedups.batches.order import depends_on_partition, steps_line_up, window, window_ends
from grpo_autotune.speedups.batches.passes import Part, planned
from grpo_autotune.speedups.batches.request import Request, joined, rows_of
from grpo_autotune.speedups.batches.rows import Batch
from grpo_autotune.speedups.conditions import MICRO_BATCH, active_noise, foreign_hook, in_parts
from grpo_autotune.speedups.selfcheck import SelfCheck

Scores = tuple[torch.Tensor, torch.Tensor | None, None]
"""Log-probs and entropies (B, C), as TRL's method returns them without an auxiliary loss."""


class MergePasses:
    """The speed-up."""

    name = "merge_passes"
    summary = "micro batches go through the model together where TRL's micro batch leaves room"
    stands_for = (*MICRO_BATCH, "_get_per_token_logps_and_entropies", "model.forward")

    def applies(self, trainer: Any) -> str | None:
        """None where several micro batches add up to one gradient, whichever pass they are computed in."""
        return next((reason for rule in _RULES for reason in [rule(trainer)] if reason is not None), None)

    def install(self, trainer: Any) -> Installed:
        """Put layers on the loss, and around the probe on the log-probs and the backward pass."""
        installed = Merging(self.name, trainer)
        installed.handles += wrap_seams(trainer, INNER, loss=installed.loss)
        installed.handles += wrap_seams(trainer, OUTERMOST, logps=installed.scores, backward=installed.backward)
        return installed


def _window(trainer: Any) -> str | None:
    if not steps_line_up(trainer):
        return "grpo.steps_per_generation and grpo.gradient_accumulation_steps are no multiples of each other"
    return None if window(trainer) > 1 else "a generation has one micro batch an optimizer step: nothing to merge"


def _whole_groups(trainer: Any) -> str | None:
    args = trainer.args
    if trainer.accelerator.device.type == "cuda" or args.per_device_train_batch_size % trainer.num_generations:
        return None
    if args.steps_per_generation > window(trainer) or depends_on_partition(trainer) is not None:
        return None
    return "micro batches hold whole groups: on a CPU, where tokens cost and not launches, merging them saves nothing"


def _terms(trainer: Any) -> str | None:
    if trainer.aux_loss_enabled:
        return "grpo.router_aux_loss_coef takes a mean over each pass"
    if trainer._entropy_bonus_enabled:
        return "grpo.entropy_coef or grpo.use_adaptive_entropy acts on the last micro batch of a step"
    return None


def _rows_apart(trainer: Any) -> str | None:
    noise = active_noise(trainer)
    if noise is not None:
        return f"{noise}: more rows in a pass would draw other random numbers"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trainer.model.modules()):
        return "the model has batch normalisation, which mixes the rows of a pass"
    hook = foreign_hook(trainer.model)
    return None if hook is None else f"{hook}, which may depend on the micro batch"


def _loop(trainer: Any) -> str | None:
    args = trainer.args
    if (reason := in_parts(trainer)) is not None:
        return reason
    if "lomo" in str(args.optim):
        return f"grpo.optim {args.optim} updates the weights in each backward pass"
    return (
        "a compiled model would be compiled again for every size (grpo.torch_compile)" if args.torch_compile else None
    )


_RULES: tuple[Callable[[Any], str | None], ...] = (_window, _whole_groups, _terms, _rows_apart, _loop)


@contextmanager
def _step_goes_on(accelerator: Any, model: Any) -> Iterator[None]:
    """Inside it, no backward pass is the last of an optimizer step: gradients are added up between ranks where
    transformers' loop has it so (`Trainer._run_epoch`), and DeepSpeed, which accelerate tells, makes no step."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with nullcontext() if syncs_each_pass(accelerator) else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)


class _Recorded(Exception):
    """Ends TRL's loss where it asks for log-probs."""

    def __init__(self, asked: Request) -> None:
        super().__init__("recorded")
        self.asked = asked


class Merging(Installed):
    """Layers of one trainer."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        self._groups = groups_of(trainer)
        self._check = SelfCheck(self, InStep(trainer, backward_in_step))
        self.held: list[Batch] = []  # micro batches that wait
        self._given: dict[str, Any] = {}  # to the backward passes that were left out
        self._last, self._state = -1, trainer.state
        self._waits = self._records = False
        self._answers: list[Scores] = []
        self.counts = {"micro_batches": 0.0, "passes": 0.0}

    @property
    def note(self) -> str:
        """Micro batches of a pass so far."""
        micro_batches, passes = self.counts.values()
        return f"{micro_batches / passes:.1f} micro batches a pass" if passes else ""

    def loss(self, call_next: Next, /, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Zero for a micro batch that waits; at the end of a window the loss of all, of which the last pass's part is
        left to go backward."""
        if not self.trainer.model.training:
            return call_next(model, inputs, *args, **kwargs)
        step, state = self.trainer._step, self.trainer.state
        if self._state is not state:
            self.held = []  # training was stopped within a window
        elif self.held and self._last + 1 != step:
            what = (
                "compute_loss was called in between the micro batches of a step, some of which merge_passes holds back"
            )
            raise TrainingError(what, where="speedups", fix="Leave merge_passes out")
        self.held.append(inputs)
        self._last, self._state = step, state
        if not window_ends(self.trainer):
            self._waits = True
            return inputs["advantages"].new_zeros(())
        held, self.held = self.held, []
        return self._window_loss(model, held, lambda batch: call_next(model, batch, *args, **kwargs))

    def backward(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """Nothing for a micro batch that waits."""
        waits, self._waits = self._waits, False
        if not waits:
            return call_next(*args, **kwargs)
        self._given = kwargs
        return None

    def scores(
        self, call_next: Next, /, model: Any, ids_BT: Any, mask_BT: Any, width_C: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Record what is asked, or answer from the pass that was made of it."""
        if self._records:
            raise _Recorded(Request(ids_BT, mask_BT, width_C, kwargs, self._groups.current, self._groups.known))
        if self._answers:
            return self._answers.pop(0)
        return call_next(model, ids_BT, mask_BT, width_C, *args, **kwargs)

    def _window_loss(self, model: Any, held: list[Batch], loss_of: Callable[[Batch], Any]) -> torch.Tensor:
        """The sum of the losses; passes before the last one have gone backward already."""
        accelerator = self.trainer.accelerator
        asked = [self._asked(batch, loss_of) for batch in held] if len(held) > 1 and not self.fell_back else []
        *early, last = self._planned(model, asked, held)
        self.counts["micro_batches"] += len(held)
        self.counts["passes"] += len(early) + 1

        def loss_of_pass(members: list[int]) -> torch.Tensor:
            if len(members) > 1:
                self._answers = self._scored(model, [asked[index] for index in members])
            try:
                return torch.stack([loss_of(held[index]) for index in members]).sum()
            finally:
                self._answers = []

        gone: torch.Tensor = held[0]["advantages"].new_zeros(())
        for members in early:
            with _step_goes_on(accelerator, model):
                loss = loss_of_pass(members)
                accelerator.backward(loss, **self._given)
            gone += loss.detach()
        return loss_of_pass(last) + gone

    def _asked(self, batch: Batch, loss_of: Callable[[Batch], Any]) -> Request:
        self._records = True
        try:
            loss_of(batch)
        except _Recorded as recorded:
            return recorded.asked
        finally:
            self._records = False
        raise AssertionError("TRL's loss asks for no log-probs")

    def _planned(self, model: Any, asked: list[Request], held: list[Batch]) -> list[list[int]]:
        """Indices of the micro batches of each pass; one each where nothing was asked or merging is found wrong."""
        alone = [[index] for index in range(len(held))]
        if not asked:
            return alone
        table = getattr(self.trainer, SPEED_UPS).table()
        passes = planned(
            [Part(*pair) for pair in zip((one.kind for one in asked), rows_of(asked), strict=True)],
            max(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in held),
            shared=any(row.name == "shared_prefix" and row.on for row in table),
            by_launches=held[0]["advantages"].is_cuda,
        )
        passes = self._on_all_ranks(passes, len(held))
        merged = next((members for members in passes if len(members) > 1), None)
        return passes if merged and self._agrees(model, [asked[index] for index in merged]) else alone

    def _on_all_ranks(self, passes: list[list[int]], count: int) -> list[list[int]]:
        """The passes, cut wherever a rank in step begins one: parts of a pass fit where the whole does."""
        first = {members[0] for members in passes}
        begins = most([index in first for index in range(count)], self.trainer, backward_in_step(self.trainer))
        cut: list[list[int]] = []
        for index in range(count):
            if begins[index]:
                cut.append([])
            cut[-1].append(index)
        return cut

    def _agrees(self, model: Any, asked: list[Request]) -> bool:
        """True if a micro batch scores the same by itself as in the pass; compared once."""
        single = self.trainer.accelerator.unwrap_model(model)
        width = asked[0].completion_width
        mask = asked[0].attention_mask[:, -width:]
        return self._check.run(
            lambda: self._scored(single, asked[:1])[0][0] * mask,
            lambda: self._scored(single, asked)[0][0] * mask,
            getattr(torch, compute_dtype(self.trainer)),
            "log-probs",
        )

    def _scored(self, model: Any, asked: list[Request]) -> list[Scores]:
        """Log-probs and entropies of each, from one pass."""
        whole = joined(asked)
        with self._groups.under_way(whole.group, whole.known):
            logps, entropies, _ = self.trainer._get_per_token_logps_and_entropies(
                model, whole.input_ids, whole.attention_mask, whole.completion_width, **whole.others
            )
        rows = [len(one.input_ids) for one in asked]
        return [
            (part[:, : one.completion_width], entropy[:, : one.completion_width], None)
            for one, part, entropy in zip(asked, logps.split(rows), entropies.split(rows), strict=True)
        ]
