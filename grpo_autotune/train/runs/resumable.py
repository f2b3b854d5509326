"""A `GRPOTrainer` whose checkpoints hold everything the next step depends on, and which never steps on a NaN.

Between two optimizer steps TRL keeps state that no checkpoint of its own holds: the position inside the generation
batch (`_step`), the rollouts still to be used, the metrics and losses since the last log event, and how many epochs
its sampler has shuffled. Each rank saves its part beside the weights, and a resumed run goes on with the numbers of an
uninterrupted one. Engines outside this process (vLLM) start their own random stream anew.
"""

import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer import utils
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from grpo_autotune.console import say
from grpo_autotune.errors import TrainingError
from grpo_autotune.runs.checkpoints import seal
from grpo_autotune.seams.fully_sharded import check_output_layer, see_trained, whole
from grpo_autotune.seams.sharding import check_sharded
from grpo_autotune.train.runs.reshard import settle
from grpo_autotune.train.runs.signals import StopRequest

REFERENCE_FILE = "reference_model.pt"
"""Weights of a reference model that follows the policy (`sync_ref_model`)."""

BROKEN_SAMPLING = "probability tensor contains either `inf`, `nan` or element < 0"
"""What `torch.multinomial` says about the probabilities of a model whose weights ran away."""


def rank_file(rank: int) -> str:
    """Name of the file in which a rank keeps its part of the state between two steps."""
    return f"grpo_state_{rank}.pt"


class NothingLeft(Exception):
    """Raised before the first step of a run that was resumed at its end: transformers would train one step more."""


class ResumableTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` with exact resumption, a stop at step boundaries that all ranks agree on, and a NaN guard."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stop_request: StopRequest | None = None  # where a signal leaves its wish to stop
        self.monitors: Any = None  # callback of a training in a run folder
        self.evaluations: Any = None  # the same
        self.resampling: Any = None  # layers of `resample`, where it is asked for
        self.earlier_processes: list[int] = []  # numbers of them that this run had for the same batch
        self.best_checkpoint: str | None = None  # stays, beside transformers' own best
        self.must_end = False  # set to end the run after this step, saved
        self.losses: torch.Tensor | float = 0.0  # sum of the micro batches' since the last optimizer step (a scalar)
        self.grad_norm: torch.Tensor | float | None = None  # of this step before clipping; None where none is clipped
        self._train_sampler: Any = None
        self._resumed_losses: dict[str, Any] = {}
        self.carried: dict[str, Any] = {}  # what parts on this trainer go on with, alike on all ranks: plain values
        super().__init__(*args, **kwargs)
        self.add_callback(_StepBoundary(self))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.losses = self.losses + loss
        return loss

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate_and_score_completions(*args, **kwargs)
        except RuntimeError as error:
            if BROKEN_SAMPLING not in str(error):
                raise
            raise self._not_finite("the model's probabilities are not finite numbers") from error

    def _clip_grad_norm(self, model: Any) -> Any:
        self.grad_norm = whole(super()._clip_grad_norm(model))
        return self.grad_norm

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as TRL does, then this rank's state; the marker comes last, and only then may older ones go."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if not self.args.save_only_model:
            torch.save(self._rank_state(), folder / rank_file(self.args.process_index))
            self._save_reference(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            micro, accumulation, _ = self._batch()
            completions = micro * accumulation * self.args.world_size
            seal(folder, self.args.world_size, completions, self.earlier_processes)
            rotate_checkpoints(str(folder.parent), limit, self.best_checkpoint or self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does; what is not part of a checkpoint in one piece, whatever FSDP's checkpoints are."""
        plugin = None if _internal_call else getattr(self.accelerator.state, "fsdp_plugin", None)
        kind = getattr(plugin, "state_dict_type", None)
        if plugin is not None:
            plugin.state_dict_type = StateDictType.FULL_STATE_DICT
        super().save_model(output_dir, _internal_call)
        if plugin is not None:
            plugin.state_dict_type = kind

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_peft_model(self.model) or self._sharded():
            self._load_adapter(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_adapter(self, checkpoint: str, model: Any) -> None:
        """Load as transformers does, and keep the types: PEFT casts a loaded bfloat16 adapter to float32."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        adapters = set(getattr(self.model, "peft_config", ()))
        super()._load_from_checkpoint(checkpoint, model)
        for name in set(getattr(self.model, "peft_config", ())) - adapters:  # a reference that is not wanted any more
            self.model.delete_adapter(name)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _load_weights(self, checkpoint: str) -> None:
        """Load by `from_pretrained`: it renames weights that a model saves under older names (Qwen2.5-VL's, for one).

        transformers' own resumption does not, and goes on with the weights of the start after a warning.
        """
        widest = functools.reduce(torch.promote_types, {p.dtype for p in self.model.parameters()})
        loaded = type(self.model).from_pretrained(checkpoint, dtype=widest)
        self.model.load_state_dict(loaded.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        settle(self, Path(checkpoint))
        self._load_reference(Path(checkpoint))
        self._skip_shuffles(int(self.state.epoch or 0))
        path = Path(checkpoint) / rank_file(self.args.process_index)
        path = path if path.is_file() else path.with_name(rank_file(0))  # of a rank that was not there
        device = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch cannot restore to "cpu:0"
        state = torch.load(path, map_location=device, weights_only=True) if path.is_file() else {}
        self.carried.update(state.get("carried", {}))
        parts = self._parts(state)
        if state.get("world_size") != self.args.world_size or not parts:
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            return
        self._step = state["micro_step"] * parts
        self._buffered_inputs = in_parts(state["rollouts"], parts)
        for mode, metrics in state["metrics"].items():
            self._metrics[mode] = defaultdict(list, metrics)
        self._restore_completions(json.loads(state["completions"]))
        self._resumed_losses = {name: state[name] for name in ("loss_sum", "last_logged")}

    def _parts(self, state: dict[str, Any]) -> int:
        """Micro batches that one of a saved state's is here, at the same rows per step and generation; 0 for none."""
        (micro, *counts), (micro_here, *counts_here) = state.get("batch", self._batch()), self._batch()
        parts, rest = divmod(micro, micro_here)
        return parts if not rest and [count * parts for count in counts] == counts_here else 0

    def _batch(self) -> list[int]:
        args = self.args
        return [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation]

    def restore_losses(self) -> None:
        """Put back the losses since the last log event; transformers zeroes them when training begins."""
        if self._resumed_losses:
            self._tr_loss: torch.Tensor = self._resumed_losses["loss_sum"].to(self._tr_loss)
            self._globalstep_last_logged = self._resumed_losses["last_logged"]
            self._resumed_losses = {}

    def check_step(self) -> None:
        """TrainingError where this step's loss or gradient is no number, on every rank and before the optimizer has
        touched the weights; else learn whether any rank was asked to stop."""
        bad = not _finite(self.losses) or (
            getattr(self.accelerator, "scaler", None) is None and not _finite(self.grad_norm)
        )
        self.losses = 0.0
        wish = self.stop_request.signum if self.stop_request else 0
        bad_anywhere, signum = self.largest(float(bad), float(wish))
        if bad_anywhere:
            raise self._not_finite("the loss or its gradient is not a finite number")
        self._agree(int(signum))

    def check_stop(self) -> bool:
        """Learn whether any rank was asked to stop, outside a step; True if so."""
        self._agree(int(self.largest(float(self.stop_request.signum if self.stop_request else 0))[0]))
        return bool(self.stop_request and self.stop_request.agreed)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """True for a stop, and where a callback asks to save: with `save_strategy: best` nothing is saved otherwise."""
        asked = self.check_stop() or self.must_end or self.control.should_save
        return bool(super()._determine_best_metric(*args, **kwargs)) or asked

    def _not_finite(self, what: str) -> TrainingError:
        fix = "Try a smaller grpo.learning_rate or grpo.max_grad_norm, or bfloat16 in place of float16"
        return TrainingError(what, where=f"step {self.state.global_step + 1}", fix=fix)

    def _agree(self, signum: int) -> None:
        if self.stop_request is not None:
            self.stop_request.agreed = signum

    def largest(self, *values: float) -> list[float]:
        """Element-wise maximum over ranks."""
        local = torch.tensor([values], dtype=torch.float32, device=self.args.device)
        largest: list[float] = self.accelerator.gather(local).max(dim=0).values.tolist()
        return largest

    def _rank_state(self) -> dict[str, Any]:
        """State of this rank that its next step depends on; rollouts only where the next step uses them again."""
        period = self.args.steps_per_generation * self.num_iterations
        return {
            "world_size": self.args.world_size,
            "micro_step": self._step,
            "batch": self._batch(),
            "carried": self.carried,
            "rollouts": self._buffered_inputs if self._step % period else None,
            "metrics": {mode: {name: list(values) for name, values in m.items()} for mode, m in self._metrics.items()},
            "completions": json.dumps(self._completions_log(), default=str),
            "loss_sum": self._tr_loss.detach().cpu(),
            "last_logged": self._globalstep_last_logged,
        }

    def _completions_log(self) -> dict[str, Any]:
        """The table that `log_completions` prints, without images."""
        if not self.log_completions:
            return {}
        # before TRL 1.15 they are texts
        without_images = getattr(utils, "strip_images_from_messages", lambda text: text)
        texts = {name: [without_images(messages) for messages in self._logs[name]] for name in ("prompt", "completion")}
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        return {**texts, "rewards": rewards, "advantages": list(self._logs["advantages"])}

    def _restore_completions(self, log: dict[str, Any]) -> None:
        for name, values in log.items():
            if name == "rewards":
                for function, rewards in values.items():
                    self._logs["rewards"][function].extend(rewards)
            else:
                self._logs[name].extend(values)

    def _skip_shuffles(self, epochs: int) -> None:
        """Draw the permutations of the epochs already done: the sampler's generator starts from its seed again."""
        generator = getattr(self._train_sampler, "generator", None)
        if generator is not None:
            for _ in range(epochs):
                torch.randperm(self._train_sampler.num_samples, generator=generator)

    def _save_reference(self, folder: Path) -> None:
        if self._reference_moves():
            weights = self.accelerator.get_state_dict(self.ref_model)  # gathered by all ranks where it is sharded
            if self.args.should_save:
                torch.save(weights, folder / REFERENCE_FILE)

    def _load_reference(self, folder: Path) -> None:
        if self._reference_moves() and (folder / REFERENCE_FILE).is_file():
            weights = torch.load(folder / REFERENCE_FILE, map_location="cpu", weights_only=True, mmap=True)
            reference = self.accelerator.unwrap_model(self.ref_model)
            if self.is_fsdp_enabled:
                set_model_state_dict(reference, weights, options=StateDictOptions(full_state_dict=True))
            else:
                reference.load_state_dict(weights)

    def _reference_moves(self) -> bool:
        """True for a reference model that follows the policy; under ZeRO 3 DeepSpeed has it in parts."""
        plugin = self.accelerator.state.deepspeed_plugin
        in_parts = plugin is not None and plugin.zero_stage == 3
        return bool(self.args.sync_ref_model and self.ref_model is not None and not in_parts)

    def _sharded(self) -> bool:
        """True if weights are spread over ranks: their checkpoints are DeepSpeed's or FSDP's own."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)


class _StepBoundary(TrainerCallback):  # type: ignore[misc]
    """Callbacks of the trainer's loop: before the first step, before each optimizer step, and after it."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_output_layer(self._trainer.model)
        see_trained(self._trainer.model)
        if (sharding := check_sharded(self._trainer)) is not None:
            say(str(sharding))
        self._trainer.restore_losses()
        if 0 < state.max_steps <= state.global_step:
            raise NothingLeft

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._obey(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_stop()
        self._obey(control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self._trainer.check_stop() or control.should_training_stop

    def _obey(self, control: Any) -> None:
        request = self._trainer.stop_request
        if self._trainer.must_end or (request is not None and request.agreed):
            control.should_save = control.should_save or request is not None  # a trial saves nothing
            control.should_training_stop = True


def in_parts(rollouts: list[dict[str, Any]] | None, parts: int) -> list[dict[str, Any]] | None:
    """Micro batches of a generation cut into equal parts, their rows in order, as TRL cuts a generation."""
    if rollouts is None or parts == 1:
        return rollouts
    cut = (part for batch in rollouts for part in split_tensor_dict(split_pixel_values_by_grid(batch), parts))
    return [unsplit_pixel_values_by_grid(part) for part in cut]


def _finite(value: torch.Tensor | float | None) -> bool:
    return value is None or bool(torch.isfinite(torch.as_tensor(value)).all())
