"""The table of seams: which method of TRL, transformers, accelerate or vLLM holds which stage of an optimizer step.

Read off TRL 1.12 to 1.16 (`trl/trainer/grpo_trainer.py`, `trl/generation/vllm_generation.py`) and transformers 5
(`transformers/trainer.py`). The owner is an attribute path from the trainer, or the module whose global is replaced.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from grpo_autotune.errors import SeamError
from grpo_autotune.seams.layers import (
    OUTER,
    AttributeSlot,
    ClassSlot,
    Handle,
    ItemSlot,
    Layer,
    Slot,
    is_async,
    take_off,
    wrap,
)

SUPPORTED = "TRL 1.12 to 1.16 with transformers 5"
GRPO_MODULE = "trl.trainer.grpo_trainer"


class Seam(NamedTuple):
    """One row: `key` names it; its time belongs to `stage` ("" for a container) and there to `part`."""

    key: str
    stage: str
    owner: str
    attribute: str
    part: str = ""
    kind: Literal["attribute", "class"] = "attribute"
    needed: Callable[[Any], bool] = lambda trainer: True


def _uses_vllm(trainer: Any) -> bool:
    return bool(getattr(trainer, "use_vllm", False))


def _sleeps(trainer: Any) -> bool:
    return _uses_vllm(trainer) and hasattr(trainer.vllm_generation, "llm")


def _never(trainer: Any) -> bool:
    return False


TABLE = (
    Seam("score", "", "trainer", "_generate_and_score_completions"),
    Seam("rollout", "prompt", "trainer", "_generate", "copy"),
    Seam("tokenize", "prompt", "trainer", "_tokenize_prompts", "tokenize"),
    Seam("processor", "prompt", "trainer.processing_class", "__call__", "processor", "class"),
    Seam("chat_template", "prompt", GRPO_MODULE, "apply_chat_template", "chat_template"),
    Seam("prepare_messages", "prompt", GRPO_MODULE, "prepare_multimodal_messages", "chat_template"),
    Seam("tool_calls", "tools", "trainer", "_tool_call_loop", "call"),
    Seam("tool_suffix", "prompt", "trainer", "_get_tool_suffix_ids", "tokenize"),
    Seam("rollout_func", "generation", "trainer", "rollout_func", "rollout", needed=_never),
    Seam("turn", "generation", "trainer", "_generate_single_turn", "set_up"),
    Seam("model_generate", "generation", "trainer.model", "generate", "generate", needed=lambda t: not _uses_vllm(t)),
    Seam("vllm_generate", "generation", "trainer.vllm_generation", "generate", "generate", needed=_uses_vllm),
    Seam("decode", "generation", "trainer.processing_class", "batch_decode", "decode", "class"),
    Seam("sync_weights", "weight_sync", "trainer.vllm_generation", "sync_weights", needed=_uses_vllm),
    Seam("wake_up", "engine", "trainer.vllm_generation.llm", "wake_up", "wake_up", needed=_sleeps),
    Seam("sleep", "engine", "trainer.vllm_generation.llm", "sleep", "sleep", needed=_sleeps),
    Seam("logps", "policy_logprob", "trainer", "_get_per_token_logps_and_entropies"),
    Seam("adapter", "reference_logprob", GRPO_MODULE, "use_adapter", "switch"),
    Seam("checkpointing", "reference_logprob", GRPO_MODULE, "disable_gradient_checkpointing", "switch"),
    Seam("loss", "policy_logprob", "trainer", "compute_loss", "training_forward"),
    Seam("batch_samples", "data", "trainer", "get_batch_samples", "load"),
    Seam("buffer", "data", GRPO_MODULE, "split_pixel_values_by_grid", "split"),
    Seam("unbuffer", "data", GRPO_MODULE, "unsplit_pixel_values_by_grid", "split"),
    Seam("pad", "data", GRPO_MODULE, "pad", "pad"),
    Seam("shuffle", "data", GRPO_MODULE, "shuffle_sequence_dict", "split"),
    Seam("rewards", "reward", "trainer", "_calculate_rewards"),
    Seam("gather", "sync_wait", "trainer.accelerator", "gather", "exchange"),
    Seam("reduce", "sync_wait", "trainer.accelerator", "reduce", "exchange"),
    Seam("pad_across", "sync_wait", "trainer.accelerator", "pad_across_processes", "exchange"),
    Seam("barrier", "sync_wait", "trainer.accelerator", "wait_for_everyone", "exchange"),
    Seam("gather_global", "sync_wait", GRPO_MODULE, "gather", "exchange"),
    Seam("gather_object", "sync_wait", GRPO_MODULE, "gather_object", "exchange"),
    Seam("backward", "backward", "trainer.accelerator", "backward"),
    Seam("clip", "optimizer", "trainer", "_clip_grad_norm", "clip", needed=_never),
    Seam("grad_norm", "optimizer", "trainer", "_get_grad_norm", "clip", needed=_never),
    Seam("zero_grad", "optimizer", "trainer.model", "zero_grad", "zero_grad"),
    Seam("log_save_evaluate", "log_save_eval", "trainer", "_maybe_log_save_evaluate", "log"),
    Seam("log", "log_save_eval", "trainer", "log", "log"),
    Seam("evaluate", "log_save_eval", "trainer", "_evaluate", "evaluate"),
    Seam("save", "log_save_eval", "trainer", "_save_checkpoint", "save"),
)
CALLBACKS = {"optimizer": "TrainerCallback.on_pre_optimizer_step .. on_optimizer_step"}
STEP_ENDS = "log_save_evaluate"
"""The seam without which no step can be told from the next."""


def find(key: str) -> Seam:
    """The row called `key`."""
    return next(row for row in TABLE if row.key == key)


def slot_of(trainer: Any, row: Seam) -> Slot | None:
    """The slot of `row` on this trainer; None where this trainer has no use for it, SeamError where it needs the seam,
    and the installed version does not have it."""
    owner = _owner(trainer, row.owner)
    if owner is None or not callable(getattr(owner, row.attribute, None)):
        if not row.needed(trainer):
            return None
        is_object = owner is not None and row.owner.startswith("trainer")
        holder = f"{type(owner).__module__}.{type(owner).__qualname__}" if is_object else row.owner
        what = f"stage `{row.stage or 'step'}` is measured at `{holder}.{row.attribute}`, which is not there"
        raise SeamError(what, fix=f"Supported: {SUPPORTED}; `grpo-autotune doctor` shows what is installed.")
    return ClassSlot(owner, row.attribute) if row.kind == "class" else AttributeSlot(owner, row.attribute)


def lost(trainer: Any) -> dict[str, SeamError]:
    """The rows of the table that the installed version does not have, by key, though this trainer needs them; their
    stages are not measured. SeamError where that is the end of a step."""
    gone: dict[str, SeamError] = {}
    for row in TABLE:
        try:
            slot_of(trainer, row)
        except SeamError as error:
            if row.key == STEP_ENDS:
                raise
            gone[row.key] = error
    return gone


def wrap_rows(trainer: Any, layers: Iterable[tuple[Seam, Layer]], order: int = OUTER) -> list[Handle]:
    """Put each layer on its row's place, all of them or none; rows that this trainer has no use for are left out.
    SeamError as `slot_of`."""
    handles: list[Handle] = []
    try:
        for row, layer in layers:
            if (slot := slot_of(trainer, row)) is not None:
                handles.append(wrap(slot, layer, order, weakly=row.owner != "trainer"))
    except BaseException:
        take_off(handles)
        raise
    return handles


def wrap_seams(trainer: Any, order: int = OUTER, **layers: Layer) -> list[Handle]:
    """As `wrap_rows`, on the rows of these keys."""
    return wrap_rows(trainer, [(find(key), layer) for key, layer in layers.items()], order)


def reward_slots(trainer: Any) -> list[tuple[str, bool, Slot]]:
    """Each reward function's name, whether TRL awaits it, and its slot (a reward model's is its `forward`)."""
    slots: list[tuple[str, bool, Slot]] = []
    for index, function in enumerate(trainer.reward_funcs):
        name = trainer.reward_func_names[index]
        if hasattr(function, "forward") and hasattr(function, "parameters"):
            slots.append((name, False, AttributeSlot(function, "forward")))
        else:
            slots.append((name, is_async(function), ItemSlot(trainer.reward_funcs, index)))
    return slots


def _owner(trainer: Any, path: str) -> Any:
    first, *rest = path.split(".")
    if first != "trainer":
        return importlib.import_module(path)
    owner = trainer
    for name in rest:
        owner = getattr(owner, name, None)
        if owner is None:
            return None
    return owner


DEEPSPEED_STEP = Seam("deepspeed_step", "optimizer", "deepspeed.runtime.engine", "step", "step")
"""DeepSpeed's engine updates the weights within accelerate's `backward`, and there is no engine before training."""

PREPARE_INPUTS = Seam("prepare_inputs", "", "trainer", "_prepare_inputs")
"""Around TRL's shuffle and split: these are functions of a module, and tell no trainer from another."""

DATALOADER = Seam("dataloader", "", "trainer", "_get_dataloader")
"""transformers builds every loader here, of training and of evaluation."""

IMAGE_PROCESSOR = Seam("image_processor", "", "trainer.processing_class.image_processor", "__call__", "", "class")
"""Where a processor hands over the images of all prompts."""
