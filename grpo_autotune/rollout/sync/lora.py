"""A trainer's adapter: its layers and tensors, and the reasons for which vLLM cannot run it as an adapter."""

from typing import Any

from grpo_autotune.seams.fully_sharded import whole

TOWERS = ("qwen2_5_vl", "qwen3_vl")
"""`model_type` whose vision tower takes adapters in vLLM (`supports_tower_connector_lora`) with the trainer's own
log-probs; vLLM calls it experimental."""


def is_adapted(model: Any) -> bool:
    """True if PEFT has put an adapter on it."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def active_adapter(model: Any) -> str:
    """Name of the adapter that is trained."""
    return str(model.active_adapters[0])


def lora_layers(model: Any) -> dict[str, Any]:
    """Each layer that has matrices of the active adapter, by its name in the PEFT model."""
    from peft.tuners.lora import LoraLayer

    adapter = active_adapter(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def tower_layers(model: Any) -> list[str]:
    """Names of the adapted layers that lie outside the language model: vision tower and connector."""
    base = model.get_base_model()
    language = {id(module) for module in base.get_decoder().modules()}
    return [name for name, layer in lora_layers(model).items() if id(layer) not in language]


def unmergeable(model: Any) -> str | None:
    """The reason why an adapter is more than a product of two matrices added to a linear layer; None if it is not."""
    if not is_adapted(model):
        return "the model has no adapter (peft)"
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active"
    config = model.peft_config[active_adapter(model)]
    if config.peft_type != "LORA":
        return f"the adapter is {getattr(config.peft_type, 'value', config.peft_type)}, not LoRA (peft.peft_type)"
    if config.use_dora:
        return "DoRA scales the base weights too (peft.use_dora)"
    if getattr(config, "target_parameters", None) or getattr(config, "trainable_token_indices", None):
        return "not only linear layers are adapted (peft.target_parameters, peft.trainable_token_indices)"
    for name, layer in lora_layers(model).items():
        if (reason := _not_plain(layer, active_adapter(model))) is not None:
            return f"{reason} at {name.removeprefix('base_model.model.')}"
    return None


def _not_plain(layer: Any, adapter: str) -> str | None:
    from torch import nn

    if not isinstance(layer.get_base_layer(), nn.Linear):
        return f"a {type(layer.get_base_layer()).__name__} is adapted, not a linear layer (peft.target_modules)"
    if adapter in layer.lora_variant:
        return f"the adapter is a {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias.get(adapter):
        return "the adapter has a bias (peft.lora_bias)"
    return None


def refusal(model: Any) -> str | None:
    """The reason why vLLM cannot run the trained adapter as one; None where it can."""
    return next((reason for check in CHECKS if (reason := check(model)) is not None), None)


def _saved_modules(model: Any) -> str | None:
    saved = model.peft_config[active_adapter(model)].modules_to_save
    return f"{', '.join(saved)} is trained whole (peft.modules_to_save)" if saved else None


def _trained_elsewhere(model: Any) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name.removeprefix('base_model.model.')} is trained beside the adapter"
    return None


def _outside(model: Any) -> str | None:
    head = model.get_base_model().get_output_embeddings()
    for name in tower_layers(model):
        if head is not None and any(module is head for module in model.get_submodule(name).modules()):
            return "the output layer is adapted (peft.target_modules: lm_head)"
        kind = model.get_base_model().config.model_type
        if kind not in TOWERS:
            return f"the vision tower of {kind} is adapted, which is done for {' and '.join(TOWERS)}"
    return None


def _rank(model: Any) -> str | None:
    return None if engine_rank(model) else f"rank {largest_rank(model)} is above vLLM's largest (peft.r)"


def _model_class(model: Any) -> str | None:
    from vllm.model_executor.models import ModelRegistry, supports_lora

    base = model.get_base_model()
    name = (base.config.architectures or [type(base).__name__])[0]
    known = ModelRegistry.models.get(name)  # another one runs through vLLM's transformers backend, which takes adapters
    return f"vLLM's {name} takes none" if known is not None and not supports_lora(known.load_model_cls()) else None


CHECKS = (unmergeable, _saved_modules, _trained_elsewhere, _outside, _rank, _model_class)
"""In this order: the later ones look at a plain LoRA adapter."""


def largest_rank(model: Any) -> int:
    """Of all adapted layers: `peft.rank_pattern` gives them different ones."""
    adapter = active_adapter(model)
    return max(int(layer.r[adapter]) for layer in lora_layers(model).values())


def engine_rank(model: Any) -> int | None:
    """The smallest `max_lora_rank` of vLLM that holds the adapter."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    rank = largest_rank(model)
    return min((size for size in get_args(MaxLoRARanks) if size >= rank), default=None)


def tensors(generation: Any) -> dict[str, Any]:
    """The adapter's matrices as PEFT names them in a file, copies, with each layer's scale in its second one: one that
    differs between layers (`peft.alpha_pattern`, `peft.rank_pattern`, `peft.use_rslora`) needs nothing of vLLM."""
    adapter = active_adapter(generation.model)
    matrices: dict[str, Any] = {}
    for name, layer in lora_layers(generation.model).items():
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        with generation._dist.gather_params([down, up]):
            matrices[f"{name}.lora_A.weight"] = whole(down.detach()).clone()
            matrices[f"{name}.lora_B.weight"] = whole(up.detach()) * layer.scaling[adapter]
    return matrices
