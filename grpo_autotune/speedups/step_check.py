"""Whole micro steps with the speed-ups and without, compared where somebody else's code takes part in them or a version
that speed-ups were not held against. Of speed-ups that differ together those are off that differ alone, else all.

On the first micro batch of each kind the loss goes backward without the speed-ups and with them, each from the same
state, which is then put back: the micro step itself comes after that. Micro batches that `merge_passes` holds back are
compared with the last of their window, all together. Gradients are those of each rank, taken where they come together,
before DDP, DeepSpeed or FSDP 2 add up, cut or free anything; all ranks take part.
"""

import copy
import functools
import logging
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from grpo_autotune.errors import EnvironmentProblem, TrainingError
from grpo_autotune.hardware.seeded import random_streams
from grpo_autotune.seams.first_use import first_use
from grpo_autotune.seams.fully_sharded import units
from grpo_autotune.seams.layers import INNER, OUTERMOST, Next, take_off
from grpo_autotune.seams.ranks import passing, sharded, syncs_each_pass
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import base_of, compute_dtype, without_dropout
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.merge_passes import Merging
from grpo_autotune.speedups.batches.order import window_ends
from grpo_autotune.speedups.batches.rows import Batch, widened
from grpo_autotune.speedups.batches.skip_dead import KEY, gradient_rows
from grpo_autotune.speedups.conditions import LIBRARIES
from grpo_autotune.speedups.selfcheck import SelfCheck

_logger = logging.getLogger("grpo_autotune.speedups")

BEFORE = {"images_once", "shared_prefill", "merge_for_generation", "reward_overlap", "length_sort"}
"""Speed-ups whose work is done when a micro batch is handed out."""
CONTAINERS = (dict, defaultdict, OrderedDict, Counter, list, set, deque)
DEAD = 1e-3
"""Advantage that may be the rounding of equal rewards."""
SAMPLE = 1 << 16
"""Numbers of each weight's gradient that are compared, at even distances."""


class StepCheck(Installed):
    """The comparison on one trainer."""

    def __init__(self, trainer: Any, installed: Iterable[Installed]) -> None:
        handles = wrap_seams(trainer, INNER, backward=self._backward)
        super().__init__("step_check", [*handles, *wrap_seams(trainer, OUTERMOST, loss=self._loss)])
        self.trainer, self._trying = trainer, False
        self._parts = [one for one in installed if one.name not in BEFORE]
        self._merging = next((one for one in self._parts if isinstance(one, Merging)), None)
        self._compared: set[Hashable] = set()

    def _loss(self, call_next: Next, /, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        waits = self._merging is not None and not window_ends(self.trainer)
        if self._parts and self.trainer.model.training and not waits and isinstance(inputs, Mapping):
            window = [*(self._merging.held if self._merging else ()), inputs]
            kinds = {(_kind(batch), _lives(batch)) for batch in window}
            told = torch.tensor([[not kinds <= self._compared, any(lives for _, lives in kinds)]]).int()
            new, lives = self.trainer.accelerator.gather(told.to(self.trainer.accelerator.device)).any(0).tolist()
            self._compared |= kinds
            if new:  # on any rank: losses are gathered
                deepspeed = self.trainer.accelerator.state.deepspeed_plugin is not None
                tried = self.trainer.accelerator.unwrap_model(model) if deepspeed else model  # no pass for its engine
                with first_use():
                    self._compare(window, lives, tried, lambda batch: call_next(tried, batch, *args, **kwargs))
        return call_next(model, inputs, *args, **kwargs)

    def _backward(self, call_next: Next, /, loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """A backward pass, but not by DeepSpeed's engine where it is tried, and without FSDP 2 adding up."""
        if self._trying and self.trainer.is_fsdp_enabled:
            self.trainer.model.set_requires_gradient_sync(False)  # merged passes have turned it on again
        if not self._trying or self.trainer.accelerator.state.deepspeed_plugin is None:
            return call_next(loss, *args, **kwargs)
        (loss * getattr(self.trainer.model_wrapped.optimizer, "loss_scale", 1.0)).backward()  # type: ignore[no-untyped-call]
        return None

    def _compare(self, window: list[Batch], lives: bool, model: Any, loss_of: Callable[[Batch], Any]) -> None:
        """Take the speed-ups off where a micro step is another with them; leave everything else as it was."""
        trainer = self.trainer
        unused = trainer.optimizer, trainer.ref_model, trainer.train_dataset, trainer.eval_dataset, trainer.reward_funcs
        leaves = _leaves(trainer.model)  # and of no weight is more gathered than its part
        state = State([*map(vars, (trainer, trainer.state, *self._parts)), window], unused)
        state.weights = leaves or state.weights
        state.size = 0.0 if lives else math.inf
        text = base_of(trainer.model).config.get_text_config()
        judged = [_judged(batch) for batch in window]
        wider = [widened(batch, getattr(text, "pad_token_id", None) or 0) for batch in judged]
        relative = getattr(text, "rope_parameters", None) is not None  # else a column of padding is a position
        tried = functools.partial(self._tried, state, model, loss_of)
        plain, again = (functools.partial(tried, batches, self._parts) for batches in (judged, wider))
        dtype = getattr(torch, compute_dtype(trainer))
        what = "a micro step's loss, gradients or random draws"
        exact = all(one.exact or one.fell_back for one in self._parts)

        def differs(left_out: Sequence[Installed] = ()) -> str | None:
            verdict, fast = _Verdict(self.name), functools.partial(tried, judged, left_out)
            SelfCheck(verdict).run(plain, fast, dtype, what, again if relative else None)
            return verdict.fell_back

        parts, why = self._on(), None
        try:
            with nullcontext() if exact else without_dropout(self.trainer.model):
                while parts and (why := differs()) is not None:
                    alone = {one: differs([other for other in parts if other is not one]) for one in parts}
                    guilty = {one: reason for one, reason in alone.items() if reason} or dict.fromkeys(parts, why)
                    for one, reason in guilty.items():
                        one.fall_back(reason)
                    parts = self._on()
        except torch.OutOfMemoryError:
            if sharded(trainer):  # other ranks may wait in the middle of the pass
                raise
            for one in parts if why else ():
                one.fall_back(str(why))
            _logger.warning("a micro step without speed-ups does not fit into memory, and is not compared")

    def _on(self) -> list[Installed]:
        """The speed-ups that are on, on some rank: all ranks compare equally often."""
        accelerator = self.trainer.accelerator
        on = torch.tensor([[one.fell_back is None for one in self._parts]], device=accelerator.device).int()
        return [one for one, here in zip(self._parts, accelerator.gather(on).any(0).tolist(), strict=True) if here]

    def _tried(
        self,
        state: "State",
        model: Any,
        loss_of: Callable[[Batch], Any],
        window: list[Batch],
        left_out: Sequence[Installed],
    ) -> torch.Tensor:
        """Gradients of a window without some speed-ups, over their size when they were first tried, its loss, and what
        is drawn after it."""
        accelerator = self.trainer.accelerator
        with passing(self.trainer):  # nothing is changed, should another rank have no room for them
            gradients = Gradients(state.weights)
        fell_back = {one: one.fell_back for one in left_out}
        for one in left_out:
            one.fell_back = "being compared"
        if self._merging is not None:
            self._merging.held = list(map(dict, window[:-1]))
        self._trying = True
        try:
            gradients.start()
            with passing(self.trainer), torch.enable_grad(), accelerator.no_sync(model):
                loss = loss_of(dict(window[-1]))
                accelerator.backward(loss)
            sampled = accelerator.gather(gradients.sample())
            drawn = torch.rand(1, device=sampled.device), torch.rand(1).to(sampled.device)
        except Exception as error:
            if self.trainer.is_fsdp_enabled and not isinstance(error, TrainingError):
                _forget_pass(self.trainer.model, error)
            raise
        finally:
            self._trying = False
            gradients.put_back()
            fell_back = {one: one.fell_back for one in self._parts} | fell_back
            state.put_back()
            for one, reason in fell_back.items():
                one.fell_back = reason
            if self.trainer.is_fsdp_enabled:
                model.set_requires_gradient_sync(accelerator.sync_gradients or syncs_each_pass(accelerator))
        others = accelerator.gather(torch.cat([loss.detach().float()[None], *drawn]))
        state.size = state.size or float(sampled.square().mean().sqrt()) or 1.0
        return torch.cat([sampled / state.size, others * math.sqrt(len(sampled) / len(others))])


def _forget_pass(model: Any, error: Exception) -> None:
    """Have FSDP 2 forget a pass that an error ended: within a backward pass, later ones would train nothing."""
    if not hasattr(model, "reset_iter_state"):
        what = f"a pass that is compared ended by {type(error).__name__}, after which this torch cannot go on"
        raise EnvironmentProblem(what, where="speedups", fix="Take a newer torch, or speedups: none.") from error
    model.reset_iter_state()


class Gradients:
    """Gradients of passes; those that were there, and hooks, which may make steps or wait for other ranks, are put
    back."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights = weights
        self._before = [(weight.grad, weight._post_accumulate_grad_hooks) for weight in weights]
        self._taken: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        for weight in weights:
            size = getattr(weight, "ds_numel", weight.numel())  # ZeRO 3 has emptied it
            sampled = len(range(0, size, _distance(size)))
            self._taken[id(weight)] = torch.zeros(sampled, device=weight.device)

    def start(self) -> None:
        """Take gradients off the weights as they come, until `put_back`."""
        for weight in self._weights:
            weight.grad = weight._post_accumulate_grad_hooks = None  # type: ignore[assignment]
            self._handles.append(weight.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    def _take(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        flat = weight.grad.detach().flatten()
        self._taken[id(weight)] += flat[:: _distance(len(flat))]
        weight.grad = None

    def sample(self) -> torch.Tensor:
        """A sample of each weight's, zeros where it got none."""
        return torch.cat(list(self._taken.values()))

    def put_back(self) -> None:
        take_off(self._handles)  # first: None in place of a hook leaves it in autograd
        for weight, (gradient, hooks) in zip(self._weights, self._before, strict=True):
            weight.grad, weight._post_accumulate_grad_hooks = gradient, hooks


def _leaves(model: Any) -> list[nn.Parameter]:
    """The tensors that get gradients under FSDP 2, which are not the shards: all ranks gather them, unit by unit."""
    leaves: list[nn.Parameter] = []
    for unit in units(model):
        unit.unshard()
        leaves += (weight for weight in unit.parameters() if weight.requires_grad and not hasattr(weight, "to_local"))
        unit.reshard()
    return leaves


class _Verdict(Installed):
    """Keeps why a comparison failed, and takes nothing off."""

    def fall_back(self, reason: str) -> None:
        self.fell_back = reason


class State:
    """Whatever can be reached from `roots` through containers, modules, optimizers and objects of classes that are in
    no installed package, and the random streams. `leave` and objects of libraries stay as they are, and so do a
    module's globals and what was written or sent away."""

    def __init__(self, roots: Iterable[Any], leave: Iterable[Any] = ()) -> None:
        self.weights: list[nn.Parameter] = []  # trained ones that are there
        self.size = 0.0  # of their gradients, until these were computed 0
        self._met: dict[int, Any] = {id(one): one for one in leave}
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._add(roots)
        self._streams_back = random_streams()

    def put_back(self) -> None:
        for container, values in self._containers:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(values)
        for tensor, values in self._tensors:
            if not torch.equal(tensor.detach().cpu(), values):
                tensor.data.copy_(values)
        self._streams_back()

    def _add(self, values: Iterable[Any]) -> None:
        for value in values:
            if id(value) in self._met:
                continue
            self._met[id(value)] = value  # and its number stays its own
            if isinstance(value, nn.Parameter) and value.requires_grad:
                self.weights.append(value)
            if isinstance(value, torch.Tensor):
                part = getattr(value, "ds_tensor", getattr(value, "_local_tensor", value))  # of this rank
                self._tensors.append((part, part.detach().to("cpu", copy=True)))
            elif isinstance(value, nn.Module):
                self._add([*value.buffers(), *(weight for weight in value.parameters() if weight.requires_grad)])
            elif isinstance(value, torch.optim.Optimizer):
                self._add([value.state])
            elif type(value) in CONTAINERS:
                self._containers.append((value, copy.copy(value)))
                self._add(value.values() if isinstance(value, dict) else value)
            elif hasattr(value, "__dict__") and _of_no_package(type(value)):
                self._add([vars(value)])


def _of_no_package(cls: type) -> bool:
    if cls.__module__.partition(".")[0] in LIBRARIES | sys.stdlib_module_names:
        return False
    return "-packages" not in (getattr(sys.modules.get(cls.__module__), "__file__", None) or "")


def _distance(size: int) -> int:
    return size // SAMPLE | 1  # odd: it comes to all columns


def _kind(batch: Batch) -> Hashable:
    """The inputs that a batch has, and whether its prompts and its completions are padded and all its rows trained."""
    masks = [batch[key] for key in ("prompt_mask", "completion_mask") if key in batch]
    masks += [gradient_rows(batch)] if {"advantages", "completion_mask"} <= batch.keys() else []
    flags = [bool(mask.all()) for mask in masks]
    return frozenset(name for name, value in batch.items() if value is not None), *flags


def _lives(batch: Batch) -> bool:
    """True if a batch has a gradient to compare, and not the rounding of none."""
    advantages = _judged(batch).get("advantages")
    return advantages is None or bool((advantages.abs() > DEAD).any())


def _judged(batch: Batch) -> Batch:
    """A batch to compare by: rows of dead groups have the advantage 0, of which TRL's is off by a rounding."""
    advantages, dead = batch.get("advantages"), batch.get(KEY)
    if advantages is None or dead is None or dead.shape != advantages.shape:
        return batch
    return {**batch, "advantages": advantages.masked_fill(advantages == dead, 0.0)}
