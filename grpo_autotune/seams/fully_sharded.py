"""FSDP2 (torch's `fully_shard`, by accelerate) under TRL: its units, and what the libraries leave undone there.

- TRL's loss takes the weight of the output layer without calling the layer. Where no other layer of its unit gathers it
  (accelerate finds no last norm in models with images, whose embeddings may be untied), its gradient is wrong, so that
  it may not be trained.
- TRL shards the reference model as one unit, so that each forward holds all its weights at once; and where only the
  first rank has read them (`cpu_ram_efficient_loading`), the others' parts are left as they came from memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.seams.trainer_access import base_of


def units(model: Any) -> Iterator[Any]:
    """Modules of a model that `fully_shard` manages."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def gathers(module: Any) -> bool:
    """True if the forward of a module gathers weights from all ranks, so that all must run it: units of FSDP2, weights
    of DeepSpeed's ZeRO-3."""
    return next(units(module), None) is not None or any(hasattr(weight, "ds_id") for weight in module.parameters())


def whole(tensor: Any) -> Any:
    """A weight in one piece; one that is in parts is gathered, by all ranks together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_output_layer(model: Any) -> None:
    """ConfigError for a sharded `model` whose output layer is a unit of its own, and trained."""
    head = base_of(model).get_output_embeddings()
    if not hasattr(head, "unshard") or not head.weight.requires_grad:
        return
    if sum(unit._get_fsdp_state() is head._get_fsdp_state() for unit in units(model)) == 1:
        what = "the output layer, which no other layer gathers, would get wrong gradients from TRL's loss"
        fix = "Train an adapter (a peft section), or share the model by grpo.deepspeed: zero3."
        raise ConfigError(what, where="grpo.fsdp_config", fix=fix)


def see_trained(model: Any) -> None:
    """Have FSDP2 see which weights of a `model` are trained: it looks once, as its first pass begins, and gradients of
    those that it took for frozen keep the type of a pass. PEFT freezes an adapter while the base is the reference."""
    if hasattr(model, "_get_fsdp_state"):
        model._get_fsdp_state()._lazy_init()


def fit(plugin: Any, model: Any) -> None:
    """Name the layers to shard by, where nobody has: those which the model's parts name and it has, of the decoder and
    of the vision tower. ConfigError for a name without a layer, at which accelerate would stop."""
    layers = {type(module).__name__ for module in model.modules()}
    known = sorted(layers & set(base_of(model)._no_split_modules or ()))
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = known
    for name in {*plugin.transformer_cls_names_to_wrap} - layers:
        fix = nearest_hint(name, layers, f"Leave it out: {', '.join(known)}.")
        where = "grpo.fsdp_config.transformer_layer_cls_to_wrap"
        raise ConfigError(f"the model has no layer {name}", where=where, fix=fix)


@contextmanager
def reference_by_layers() -> Iterator[None]:
    """Trainers built inside shard their reference model as the policy is sharded."""
    from trl.trainer import grpo_trainer

    def prepare(model: Any, accelerator: Any) -> Any:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        fit(accelerator.state.fsdp_plugin, model)
        model = fsdp2_prepare_model(accelerator, model.requires_grad_(False))
        model.register_forward_hook(_resharded)
        return model.eval()

    before, grpo_trainer.prepare_fsdp = grpo_trainer.prepare_fsdp, prepare
    try:
        yield
    finally:
        grpo_trainer.prepare_fsdp = before


def _resharded(model: Any, *_: Any) -> None:
    """Free what a forward has gathered: no backward does it."""
    for unit in units(model):
        unit.reshard()
