"""Speed-ups as predictions see them: which of those asked for can work, what they keep and what they copy."""

from collections.abc import Set

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.estimate.cost import WorkFacts
from grpo_autotune.estimate.engine import FLOAT_BYTES
from grpo_autotune.estimate.passes import Training
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.knobs import knobs_of
from grpo_autotune.records.probe import TrainerFacts
from grpo_autotune.speedups.base import SERVED, kernel_name
from grpo_autotune.speedups.selection import selections

ONE_BY_ONE = ("entropy_coef", "use_adaptive_entropy", "router_aux_loss_coef")
"""Keys of `grpo` under which micro batches are not merged (`speedups/batches/merge_passes.py`)."""


def effective(config: RunConfig, trainer: TrainerFacts) -> frozenset[str]:
    """Speed-ups that are asked for and can work."""
    compiled = knobs_of(config, ["grpo.torch_compile"])["grpo.torch_compile"]
    dropout = (trainer.peft or {}).get("lora_dropout") and not config.grpo.get("disable_dropout")
    asked = dict(selections(config.speedups))
    one_mask = asked.get("shared_prefix", {}).get("dropout") == "shared"
    whole = kernel_name(trainer.attn_implementation) in SERVED and not compiled and (not dropout or one_mask)
    off = set() if whole else {"shared_prefix", "merge_passes"}
    if compiled or dropout or config.grpo.get("fsdp") or config.grpo.get("fsdp_config"):
        off.add("merge_for_generation")
    if dropout:
        off |= {"merge_passes", "shared_prefill"}
    if any(config.grpo.get(key) for key in ONE_BY_ONE):
        off.add("merge_passes")
    return frozenset(asked.keys() - off)


def tower_is_kept(facts: WorkFacts, speedups: frozenset[str]) -> bool:
    """Return whether an image's features serve all passes of a step, and later ones."""
    adapters = facts.training.adapters
    frozen = not (facts.training.vision_weights or adapters.blocks or adapters.mergers)
    return frozen and "vision_cache" in speedups


def weight_copies(shape: ModelShape, training: Training, speedups: Set[str], *, on_gpu: bool) -> float:
    """Bytes of float32 weights with adapters added, and as they are laid out for decoding (`speedups/generation`)."""
    if training.weight_bytes < FLOAT_BYTES:
        return 0.0
    layers, laid, merged = shape.layers * shape.layer_weights, 0.0, 0.0
    if "shared_prefill" in speedups and (training.value_bytes < FLOAT_BYTES or not on_gpu):
        laid = training.value_bytes * (layers + shape.head_weights)
    if "merge_for_generation" in speedups and training.adapters.text:
        merged = training.weight_bytes * layers
    return laid + merged
