"""Memory that a vLLM engine needs inside its share: weights, the activations of one engine step, keys and values.

vLLM takes its share whole and gives what weights and activations leave to keys and values
(`determine_available_memory` in vllm/v1/worker/gpu_worker.py). It starts where they hold one request of full length
(`_check_enough_kv_cache_memory` in vllm/v1/core/kv_cache_utils.py); completions beyond what they hold wait.
"""

from typing import NamedTuple

from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.rollout.server.command import TRL_BATCHED_TOKENS

HALF_BYTES = 2.0
FLOAT_BYTES = 4.0

BYTES = {"float32": 4.0, "float": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0}

EIGHT_BITS = 1.0
"""Bytes of a number under `kv_cache_dtype` and `quantization` fp8."""


class EngineNeed(NamedTuple):
    """Bytes on one device."""

    weights: float  # the model
    activations: float  # the largest layer of an engine step, and the logits that completions are drawn from
    request: float  # keys and values of one request of full length
    row: float  # those of a prompt with its completion, as they are expected

    @property
    def least(self) -> float:
        """Bytes below which the engine does not start."""
        return self.weights + self.activations + self.request


def engine_need(
    shape: ModelShape,
    *,
    longest: float,
    row: float,
    batched_tokens: int = TRL_BATCHED_TOKENS,
    running: int = 1,
    value_bytes: float = HALF_BYTES,
    weight_bytes: float | None = None,
    cache_bytes: float | None = None,
    tensor_parallel: int = 1,
) -> EngineNeed:
    """Memory that an engine needs.

    `longest` (`max_model_len`), `row` (a prompt with its completion) and `batched_tokens` (`max_num_batched_tokens`)
    are tokens, and `running` is `max_num_seqs`. Bytes are those of a number that it computes with; weights, and keys
    and values, take as many where nothing else is given. `tensor_parallel` GPUs share the model."""
    token = shape.kv_bytes_per_token(value_bytes if cache_bytes is None else cache_bytes) / tensor_parallel
    layer = batched_tokens * (2 * shape.hidden + max(3 * shape.mlp, 6 * shape.attention_width)) * value_bytes
    drawn = running * shape.vocab * FLOAT_BYTES
    return EngineNeed(
        weights=shape.parameters * (value_bytes if weight_bytes is None else weight_bytes) / tensor_parallel,
        activations=layer / tensor_parallel + drawn,
        request=longest * token,
        row=row * token,
    )
