"""From a `RunConfig` to a `GRPOTrainer`, and from there to a trained model in a run folder."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from grpo_autotune.config.packages import check_packages
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import as_warning, is_first_rank, is_live, progress_console
from grpo_autotune.hardware.device import memory_share
from grpo_autotune.hardware.versions import check_log_probs
from grpo_autotune.records.base import Frozen
from grpo_autotune.records.evaluation_lines import RowPrinter
from grpo_autotune.registry import resolve
from grpo_autotune.runs.checkpoints import batch_of
from grpo_autotune.runs.folder import RunFolder, Start, enter, find_start
from grpo_autotune.runs.kept_batch import with_this_batch
from grpo_autotune.seams import fully_sharded, mixed_image_rows
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.speedups.selection import chosen
from grpo_autotune.train.advantages import put_ranks_on
from grpo_autotune.train.arguments import (
    as_config_errors,
    check_best_metric,
    check_deepspeed,
    check_host_optimizer,
    grpo_arguments,
    packed_in,
    suppress_image_token,
    unlocked_engine,
)
from grpo_autotune.train.branches.control import BranchControl
from grpo_autotune.train.branches.evaluation import evaluate_by_branch
from grpo_autotune.train.branches.rows import divided
from grpo_autotune.train.data.datasets import LoadData, check_rows, load_data
from grpo_autotune.train.data.templates import fit_prompts
from grpo_autotune.train.eval_sampling import evaluate_with
from grpo_autotune.train.models.adapter import check_head, load_policy, settle_reference
from grpo_autotune.train.models.load import check_images, load_processor, model_source
from grpo_autotune.train.monitors.callback import Monitors
from grpo_autotune.train.resample import Resampling
from grpo_autotune.train.rewards.build import build_rewards
from grpo_autotune.train.rewards.failures import attend
from grpo_autotune.train.rewards.without_model import ask_first
from grpo_autotune.train.runs.best import EvaluationTable
from grpo_autotune.train.runs.callbacks import ProgressLine, TrainLog
from grpo_autotune.train.runs.measures import Measures
from grpo_autotune.train.runs.quiet import quieten
from grpo_autotune.train.runs.reshard import fit_checkpoint
from grpo_autotune.train.runs.resumable import NothingLeft, ResumableTrainer
from grpo_autotune.train.runs.signals import StopRequest, exit_code
from grpo_autotune.units import duration

Phase = Callable[[str], AbstractContextManager[object]]
Say = Callable[[str], None]


class TrainResult(Frozen):
    """The end of a training run."""

    folder: str
    steps: int  # optimizer steps done, those before a resume included
    total_steps: int  # optimizer steps the run has in all
    seconds: float  # wall time of this process's training loop
    # the newest train line of `train_log.jsonl` (loss, reward, kl, ...); empty if there was no log event
    metrics: dict[str, Any]
    eval_metrics: dict[str, Any]  # the newest evaluation line; empty without one
    resumed_from: int | None  # step of the checkpoint this process began at; None for a fresh run
    signum: int  # the signal that ended the run early, 0 if none did
    by_monitor: bool = False  # True if a monitor ended it early

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1; 1 after a monitor's stop, on
        the first rank alone: `torchrun` would end it over another's while it writes its report."""
        return exit_code(self.signum) or int(self.by_monitor and is_first_rank())

    def line(self) -> str:
        """The closing line for a person."""
        if self.signum or self.by_monitor:
            by, at = " by a monitor" if self.by_monitor else "", f"after step {self.steps} of {self.total_steps}"
            return f"stopped{by} {at}, saved; go on with --resume ({self.folder})"
        told = [f"trained {self.steps} steps in {duration(self.seconds)}"]
        told += [f"{name} {self.metrics[name]:.4f}" for name in ("reward", "kl") if self.metrics.get(name) is not None]
        if self.eval_metrics.get("eval_reward") is not None:
            told.append(f"held-out reward {self.eval_metrics['eval_reward']:.4f}")
        return f"{', '.join(told)}: {self.folder}"


def say_on(console: Console) -> Say:
    """Prints a line on rank 0, and nothing on the others."""

    def say(line: str) -> None:
        if is_first_rank():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return say


def build_trainer(
    config: RunConfig,
    *,
    phase: Phase = nullcontext,
    grpo_overrides: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    say: Say | None = None,
    load: LoadData = load_data,
) -> ResumableTrainer:
    """Build the trainer that a configuration describes, without transformers' own progress output.

    Args:
        phase: Brackets the start-up phases `data`, `model` and `trainer`.
        grpo_overrides: `GRPOConfig` keys that take precedence, such as a trial's `max_steps`.
        say: Told, line by line, what is under way and what was derived; standard error by default.

    Raises:
        ConfigError: The configuration cannot be used; the message says which key.
        DataError: A row cannot be used.
        EnvironmentProblem: A package that it needs is missing.
    """
    say = say or say_on(progress_console())
    quieten(bars=is_live())
    chosen(config.speedups)
    check_packages(config, grpo_overrides or {})
    with phase("data"):
        train_data, eval_data = load(config, say)
        functions, weights, names = build_rewards(config, train_data.column_names)
        if config.branches is not None:
            train_data, eval_data, functions = divided(config, train_data, eval_data, functions, say)
    arguments = grpo_arguments(
        config,
        output_dir=str(RunFolder(config.run_dir).checkpoints),
        reward_weights=weights,
        overrides=grpo_overrides or {},
    )
    modules = (sys.modules.get(resolve("reward", item.name).__module__) for item in config.rewards)
    branch_names = config.branches.by_name if config.branches is not None else ()
    check_best_metric(arguments.grpo, names, modules, config.data.eval, *branch_names, checkpoints=config.checkpoints)
    check_log_probs(arguments.grpo.device.type)
    for note in arguments.notes:
        say(note)
    if eval_data is not None and arguments.grpo.eval_strategy == "no":
        say("held-out data is configured, and grpo.eval_strategy is no: it will not be evaluated")
    with phase("model"):
        source = model_source(config.model, say)
        processor = load_processor(config.model, source)
        check_images(processor, train_data.column_names)
        options = arguments.grpo.chat_template_kwargs or {}
        train_data = fit_prompts(train_data, processor, options, config.data.path, say, config.data)
        check_rows(config, len(train_data))
        fitted = {}
        for name, one in config.data.held_out.items():
            rows = eval_data[name] if name else eval_data
            fitted[name] = fit_prompts(rows, processor, options, one.path or config.data.path, say, config.data)
        zero_3 = getattr(arguments.grpo.deepspeed_plugin, "zero_stage", None) == 3
        model, adapter = load_policy(
            config, source, arguments.placement, zero_3=zero_3, packed_in=packed_in(arguments.grpo)
        )
        suppress_image_token(arguments.grpo, processor, model)
    set_seed(arguments.grpo.seed)  # of an adapter's weights: TRL before 1.15 draws them unseeded
    with (
        phase("trainer"), as_config_errors("grpo"), unlocked_engine(config), fully_sharded.reference_by_layers()
    ):  # fmt: skip
        trainer = ResumableTrainer(
            model=model,
            reward_funcs=functions,
            args=arguments.grpo,
            train_dataset=train_data,
            eval_dataset=fitted.get("", fitted) or None,
            processing_class=processor,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
    if trainer.is_fsdp_enabled:
        fully_sharded.fit(trainer.accelerator.state.fsdp_plugin, trainer.model)
    check_deepspeed(trainer.accelerator.state.deepspeed_plugin)
    check_host_optimizer(arguments.grpo, trainer.accelerator.state.deepspeed_plugin)
    check_head(trainer.model)
    if config.model.adapter is not None:
        say(settle_reference(trainer, config))
    if not config.use_vllm:  # else it was done as the engine was unlocked
        mixed_image_rows.mend(trainer)
    for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    attend(trainer)
    if config.branches is not None:
        evaluate_by_branch(trainer, config.branches, BranchControl(trainer, config.branches, config.grpo, say))
    if config.grpo.get("advantages") == "rank":
        put_ranks_on(trainer)
    if config.resample is not None:
        trainer.resampling = Resampling(trainer, config.resample, say)
    if config.eval_sampling is not None:
        evaluate_with(trainer, config.eval_sampling, say)
    if config.speedups != "none":
        for line in speed_up(trainer, config.speedups, check=config.speedups_check).lines():
            say(line)
    ask_first(trainer, phase)
    return trainer


def run_training(
    config: RunConfig,
    out_dir: str | Path,
    resume: bool = False,
    *,
    phase: Phase = nullcontext,
    prepare: Callable[[ResumableTrainer], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    grpo_overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train in a run folder until the end, or until Ctrl-C or one of `stop_signals` asks for a stop.

    Args, beside those of `build_trainer`:
        resume: Go on at the newest whole checkpoint there; from the beginning where there is none yet.
        prepare: Called with the trainer before its first step (to attach a probe, for instance).
        console: Where progress goes; standard error by default.

    Raises:
        ConfigError: As `build_trainer`, or the folder holds a run and `resume` is false.
        TrainingError: The loss or its gradient is not a number.
        RewardError: A reward function failed.
    """
    console = console or progress_console()
    say = say_on(console)
    folder = RunFolder(Path(out_dir))
    start = find_start(folder, resume)
    overrides = {**(grpo_overrides or {}), "output_dir": str(folder.checkpoints)}
    trainer = build_trainer(config, phase=phase, grpo_overrides=overrides, callbacks=callbacks, say=say)
    if start.checkpoint is not None:
        trainer.earlier_processes = with_this_batch(trainer.args, *batch_of(start.checkpoint.path))
        fit_checkpoint(trainer, start.checkpoint.path)
    trainer.accelerator.wait_for_everyone()  # every rank has looked for checkpoints before one of them tidies up
    if trainer.is_world_process_zero():
        enter(folder, config, start, say)
    trainer.accelerator.wait_for_everyone()  # and reads the log once it is cut
    if resume:
        say(_start_line(folder, start))
    log = TrainLog(folder.log, lambda: memory_share(trainer.args.device))
    trainer.add_callback(log)  # before those that read the line
    with as_warning("measures of our own are not logged"):  # an unknown TRL may lack what they are read from
        Measures(trainer)
    trainer.evaluations = EvaluationTable(trainer, config, folder, log, RowPrinter(say, console.width))
    trainer.add_callback(trainer.evaluations)
    trainer.monitors = Monitors(trainer, config, folder.path, log, resumes=resume)
    trainer.add_callback(trainer.monitors)
    if prepare is not None:
        prepare(trainer)
    begun = time.monotonic()
    signals = [signal.Signals[name] for name in config.stop_signals]
    with StopRequest(signals) as trainer.stop_request, closing(trainer.monitors):
        signum = _train(trainer, start, ProgressLine(lambda: trainer._metrics["train"], console))
        by_monitor = not signum and trainer.monitors.is_stopped and trainer.state.global_step < trainer.state.max_steps
        if not signum and not by_monitor:
            draft = folder.path / ".model"  # whole or not at all: a folder `model` says that training has finished
            trainer.save_model(str(draft))
            trainer.accelerator.wait_for_everyone()  # ranks save their parts
            if trainer.is_world_process_zero():
                shutil.rmtree(folder.model, ignore_errors=True)
                draft.rename(folder.model)
    return TrainResult(
        folder=str(folder.path),
        steps=trainer.state.global_step,
        total_steps=trainer.state.max_steps,
        seconds=time.monotonic() - begun,
        metrics=log.last.get("train", {}),
        eval_metrics=log.last.get("eval", {}),
        resumed_from=start.step if start.checkpoint else None,
        signum=signum,
        by_monitor=by_monitor,
    )


def _train(trainer: ResumableTrainer, start: Start, progress: ProgressLine) -> int:
    """Run the loop; the signal that ended it early, or 0."""
    if start.checkpoint is not None:
        trainer.args.eval_on_start = False  # it was done when the run began
    trainer.add_callback(progress)
    quieten(bars=False)  # those of saving would break the progress line
    with closing(progress), suppress(NothingLeft):
        trainer.train(resume_from_checkpoint=str(start.checkpoint.path) if start.checkpoint else None)
    agreed = trainer.stop_request.agreed if trainer.stop_request else 0
    return agreed if trainer.state.global_step < trainer.state.max_steps else 0


def _start_line(folder: RunFolder, start: Start) -> str:
    if start.checkpoint is None:
        return f"no whole checkpoint in {folder.checkpoints} yet: starting at step 0"
    return f"resuming at step {start.step} ({start.checkpoint.path.name})"
