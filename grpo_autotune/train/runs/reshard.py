"""A checkpoint of ranks that shared a model, for a run that shares it in another way or not at all.

Under ZeRO another number of processes goes on by DeepSpeed's universal checkpoint: the parts put together by rank 0,
and removed once they are read. Another kind of sharding cannot read the optimizer's state, and transformers would go on
without it and without a word.
"""

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.runs.checkpoints import WHOLE, saved_by

UNIVERSAL = "_universal"


def fit_checkpoint(trainer: Any, folder: Path) -> None:
    """Make a checkpoint ready for the processes of this run, on all of them; ConfigError where it cannot be."""
    saved, plugin = saved_by(folder), trainer.accelerator.state.deepspeed_plugin
    stage = None if plugin is None else plugin.zero_stage
    here = WHOLE if plugin is None else "ZeRO-3" if stage == 3 else "ZeRO-1 or 2" if stage else "ZeRO-0"
    if trainer.is_fsdp_enabled:
        here = f"FSDP ({trainer.accelerator.state.fsdp_plugin.state_dict_type.name})"
    if saved.kind != here:
        raise ConfigError(
            f"this checkpoint was saved under {saved.kind}, and the run is under {here}, which cannot read its state",
            where=str(folder),
            fix="Resume as it was saved, or `grpo-autotune merge` it and train that: the optimizer's state is lost.",
        )
    if trainer.args.sync_ref_model and trainer.ref_model is not None and here == "ZeRO-3":
        what = f"the reference model that followed the policy is in no checkpoint under {here}"
        raise ConfigError(what, where="grpo.sync_ref_model", fix="Begin anew under ZeRO-1 or 2 to be able to resume.")
    if stage and saved.processes != trainer.args.world_size:
        say(f"{folder.name} was saved at world size {saved.processes} and is read at {trainer.args.world_size}")
        if trainer.is_world_process_zero():
            _put_together(folder)
        trainer.accelerator.wait_for_everyone()
        plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True


def settle(trainer: Any, folder: Path) -> None:
    """Once the parts that were put together are read: give each group its own settings, since DeepSpeed gives all under
    ZeRO-3 those of the first, weight decay among them, and remove the parts."""
    engine = trainer.model_wrapped
    if not trainer.is_deepspeed_enabled or not engine.load_universal_checkpoint():
        return
    parts = _latest(folder, UNIVERSAL)
    groups = torch.load(parts / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)["param_groups"]
    for group, saved in zip(engine.optimizer.optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})
    engine._config.load_universal_checkpoint = False  # what it reads from here on was saved by these processes
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(parts)
        (folder / "latest_universal").unlink()


def _put_together(folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    source, target = _latest(folder), _latest(folder, UNIVERSAL)
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed
    wish = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(Namespace(input_folder=str(source), output_folder=str(target), **wish, **workers))


def _latest(folder: Path, ending: str = "") -> Path:
    return folder / f"{(folder / 'latest').read_text(encoding='utf-8').strip()}{ending}"
