"""A trainer's weights under the names vLLM's loaders know, one at a time, nothing of the trainer's written to.

TRL merges every adapter into the trainer's own weights, pushes, and subtracts it again, which leaves the rounding of
both in them and turns 4-bit weights into others. Here each weight that an adapter touches is summed apart.
"""

from collections.abc import Container, Iterator
from typing import Any

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.rollout.sync.lora import active_adapter, is_adapted, lora_layers
from grpo_autotune.seams.fully_sharded import whole

BASE_WEIGHT = ".base_layer.weight"


def engine_name(model: Any, name: str) -> str | None:
    """The name that vLLM has for the parameter `name`; None for adapters, and for modules that PEFT replaced."""
    if is_adapted(model):
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        name = name.replace("modules_to_save.default.", "")
        if (
            model.prefix in name or "original_module" in name or "modules_to_save." in name
        ):  # of TRL's reference adapter
            return None
    return name.replace("_checkpoint_wrapped_module.", "")


def changing(model: Any) -> set[str]:
    """Engine names of the weights that training changes: trained ones, and those an adapter is merged into."""
    return {
        target
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or ".base_layer." in name) and (target := engine_name(model, name)) is not None
    }


def weights(generation: Any, only: Container[str] | None, *, merged: bool) -> Iterator[tuple[str, Any]]:
    """Name and tensor of each weight of a model, with the plain LoRA adapter `merged` into those it is for or without;
    `only` those of these engine names, all for None.

    4-bit weights come as the numbers that they stand for. Under DeepSpeed ZeRO-3 and FSDP2 every rank must
    exhaust the iterator.
    """
    model = generation.model
    layers = lora_layers(model) if merged and is_adapted(model) else {}
    for name, parameter in model.named_parameters():
        target = engine_name(model, name)
        if target is None or (only is not None and target not in only):
            continue
        layer = layers.get(name.removesuffix(BASE_WEIGHT)) if name.endswith(BASE_WEIGHT) else None
        with generation._dist.gather_params([parameter, *([] if layer is None else layer.parameters())]):
            value = whole(numbers(parameter))
            if layer is not None:
                value = (value + whole(layer.get_delta_weight(active_adapter(model)).detach())).to(value.dtype)
            yield target, value


def numbers(parameter: Any) -> Any:
    """The weight as a tensor of floating-point numbers; EnvironmentProblem where bitsandbytes has rounded its scales
    meanwhile, so that they are not those of training."""
    if not is_4bit(parameter):
        return parameter.data
    if getattr(parameter.quant_state, "packing_format_for_cpu", False):
        what = "bitsandbytes has packed the 4-bit weights for inference on this CPU, which rounds their scales"
        fix = "Train without evaluation (grpo.eval_strategy: no) here, or on a GPU."
        raise EnvironmentProblem(what, where="model.load_in_4bit", fix=fix)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def is_4bit(parameter: Any) -> bool:
    """True for a weight that bitsandbytes holds in 4 bits."""
    return type(parameter).__name__ == "Params4bit"


def has_4bit(model: Any) -> bool:
    """True for a model with such weights."""
    return any(is_4bit(parameter) for parameter in model.parameters())


def packed(model: Any) -> str | None:
    """The type of weights that stand for others (4 bits, 8 bits); None for a model without."""
    weights = model.parameters()
    return next(
        (type(weight).__name__ for weight in weights if is_4bit(weight) or not weight.is_floating_point()), None
    )
