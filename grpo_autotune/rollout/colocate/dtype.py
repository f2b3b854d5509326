"""The engine computes in the trainer's type, and on CPU keeps its weights where TRL pushes new ones.

Left to itself vLLM runs a float32 checkpoint in bfloat16, so that its log-probs are not those of the trainer.

vLLM's CPU build packs linear weights into a layout of their own and drops the plain ones: TRL's push then dies
("'Parameter' object has no attribute 'weight_loader'"). Without packing they stay.
"""

from typing import Any

from grpo_autotune.rollout.parts import Part


class TrainerDtype(Part):
    """The type of the trainer's forward pass for the engine."""

    def llm_keys(self, generation: Any) -> dict[str, Any]:
        """Mixed precision's type, else that of the weights (of a base in 4 bits, that of its embeddings)."""
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _keep_weights_plain()
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(generation.accelerator.mixed_precision)
        weights = generation.model.get_input_embeddings().weight.dtype
        return {"dtype": mixed or str(weights).removeprefix("torch.")}


def _keep_weights_plain() -> None:
    import vllm._custom_ops
    from vllm.model_executor.layers import utils

    vllm._custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False
