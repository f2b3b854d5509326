"""The policy of a run: a model as it was loaded, or under a trained adapter to go on from (`model.adapter`).

TRL keeps a frozen copy of an adapter that it is given, and takes it as the reference model of the KL term
(`ref` in trl/trainer/grpo_trainer.py, TRL 1.16); without the copy the reference is the base with the adapter off.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from grpo_autotune.config.places import check_same_adapter
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.seams.trainer_access import has_fused_head
from grpo_autotune.train.models.load import first_line, load_model, lora_config, vision_tower

WHERE = "model.adapter"
REFERENCE = "ref"
"""Name of TRL's copy of the adapter."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")
"""First words of `init_lora_weights` with which PEFT writes to the base weights as it adds an adapter."""


def load_policy(
    config: RunConfig, source: str, placement: Mapping[str, Any], *, zero_3: bool, packed_in: Any = None
) -> tuple[Any, LoraConfig | None]:
    """The model at `source` as `load_model` has it, and the adapter that TRL shall put on it; with `model.adapter` a
    `PeftModel`, and None. As TRL has it, PEFT makes its matrices float32 unless DeepSpeed's `zero_3` shards the model.

    Raises:
        ConfigError: As `load_model` and `with_adapter`, or the vision tower is frozen and the adapter is on it.
    """
    model = load_model(config.model, source, placement, packed_in=packed_in)
    if config.model.adapter is None:
        return model, lora_config(config, model)
    folder, in_float32 = config.model.adapter, not zero_3 or config.model.load_in_4bit
    check_same_adapter(config.peft, folder)
    where = f"{WHERE}: {folder}"
    model = with_adapter(model, folder, where=where, is_trainable=True, autocast_adapter_dtype=in_float32)
    if (init := _init_words(model)).startswith(CHANGES_BASE):
        raise ConfigError(
            f"the adapter changes the base model's weights as it is put on it (init_lora_weights: {init})",
            where=WHERE,
            fix="Merge it into its base, and train that: model.name_or_path.",
        )
    if config.grpo.get("beta") and (why := _not_copied(model)) is not None:
        raise ConfigError(
            f"TRL cannot copy this adapter, and its copy is the reference of the KL term: {why}",
            where=WHERE,
            fix="Merge it into its base, and train that (model.name_or_path), or set grpo.beta: 0.",
        )
    if config.model.freeze_vision_tower and _sees(model.get_base_model()):
        what, where = "the adapter holds layers of the vision tower, which is to be frozen", "model.freeze_vision_tower"
        raise ConfigError(what, where=where, fix="Set it to false.")
    return model, None


def _not_copied(model: PeftModel) -> str | None:
    adapter = model.peft_config[model.active_adapter].to_dict()
    if adapter.get("bias", "none") != "none":
        return "it has biases (peft.bias)"
    return "it ties weights of its own (peft.ensure_weight_tying)" if adapter.get("ensure_weight_tying") else None


def _init_words(model: PeftModel) -> str:
    return str(model.peft_config[model.active_adapter].to_dict().get("init_lora_weights")).lower()


def _sees(base: Any) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in base.get_submodule(vision_tower(base)).modules())


def with_adapter(model: Any, folder: str, *, where: str = "", **options: Any) -> PeftModel:
    """`model` under the adapter that PEFT saved in `folder`; `options` are those of `PeftModel.from_pretrained`.
    Messages begin with `where`, or the folder.

    Raises:
        ConfigError: The adapter is torn, or another model's: its names or shapes do not fit.
    """
    where = where or folder
    if not any(Path(folder).glob("adapter_model.*")):
        raise _unfit(model, where, "adapter_model.safetensors is missing")
    try:
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # of missing names, which are an error below
            adapted = PeftModel.from_pretrained(model, folder, **options)
        # again, for what it tells: from_pretrained keeps the names that it found no place for to itself
        result = adapted.load_adapter(folder, adapted.active_adapter, **options)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        if is_of_the_machine(error):
            raise
        lines = [line for line in str(error).splitlines() if "size mismatch" in line]  # after a heading
        raise _unfit(model, where, lines[0].strip() if lines else first_line(error)) from error
    for names, what in ((result.unexpected_keys, "the model has no"), (result.missing_keys, "the adapter has no")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise _unfit(model, where, f"{what} {names[0]}{more}")
    return adapted


def check_head(model: Any) -> None:
    """ConfigError for single trained tokens of the output layer: TRL's loss asks PEFT's layer for a bias (TRL 1.16)."""
    head = model.get_output_embeddings()
    if has_fused_head() and hasattr(head, "token_adapter") and not hasattr(head, "bias"):
        is_tied = hasattr(model.get_input_embeddings(), "token_adapter")
        what = (
            f"TRL's loss cannot train single tokens of the output layer{', tied to the embeddings' if is_tied else ''}"
        )
        name = "embed_tokens" if is_tied else "lm_head"
        fix = f"Take peft.modules_to_save: [{name}]; an adapter that has such tokens is to be merged first."
        raise ConfigError(what, where="peft.trainable_token_indices", fix=fix)


def settle_reference(trainer: Any, config: RunConfig) -> str:
    """Keep TRL's copy of the adapter as the reference, or take it away (`model.adapter_reference`); the line that says
    from what the run goes on, and which reference holds."""
    asked, told = config.model.adapter_reference, f"going on from the adapter {config.model.adapter}"
    if trainer.beta == 0.0:
        return f"{told}; no reference model (grpo.beta 0)"
    if asked == "base" and REFERENCE in trainer.model.peft_config:
        trainer.model.delete_adapter(REFERENCE)
    held = REFERENCE in trainer.model.peft_config
    for name, weight in trainer.model.named_parameters() if held else ():
        if name.endswith(".default"):  # TRL's copy leaves out embeddings and single tokens, which PEFT names so
            trainer.model.get_parameter(f"{name.removesuffix('default')}{REFERENCE}").data.copy_(weight.data)
    kept = "this adapter as it is at the start" if held else "the base model without it"
    return f"{told}; the reference model is {kept} (model.adapter_reference: {'adapter' if held else 'base'})"


def _unfit(model: Any, where: str, why: str) -> ConfigError:
    base = getattr(model, "name_or_path", None) or type(model).__name__
    fix = f"It was trained on another model than {base}, or the folder is not whole."
    return ConfigError(f"the adapter does not fit: {why}", where=where, fix=fix)
