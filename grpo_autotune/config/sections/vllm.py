"""The `vllm` section: engine keys verbatim, and the keys of this package (`OURS`, and the name `mode`).

Any key of vLLM's `EngineArgs` is accepted: those of the installed release, read from its source, else those of the
release in `vllm_names`. The keys with a field here are those that a search changes; the others pass through.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from grpo_autotune.config.foreign_keys import ForeignKey, check_values, engine_keys
from grpo_autotune.config.messages import from_validation, unknown_key
from grpo_autotune.config.sections.section import Section
from grpo_autotune.config.vllm_names import NAMES
from grpo_autotune.errors import ConfigError

VLLM_TO_TRL = {
    "mode": "vllm_mode",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_length",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "enable_sleep_mode": "vllm_enable_sleep_mode",
    "model_impl": "vllm_model_impl",
    "server_base_url": "vllm_server_base_url",
    "server_host": "vllm_server_host",
    "server_port": "vllm_server_port",
    "server_timeout": "vllm_server_timeout",
    "group_port": "vllm_group_port",
    "structured_outputs_regex": "vllm_structured_outputs_regex",
}
"""Keys of the `vllm` section -> the `GRPOConfig` key that carries each (trl/trainer/grpo_config.py, TRL 1.16)."""

OURS = frozenset({"sleep_level", "weight_sync", "server_gpus"})
"""Keys that neither TRL nor vLLM has."""

ENGINE_FIXED = {
    "model": "Use model.name_or_path.",
    "revision": "Use model.revision.",
    "trust_remote_code": "Use model.trust_remote_code.",
    "seed": "Use grpo.seed; each engine draws from a stream of its own.",
    "distributed_executor_backend": "TRL runs an engine inside each training process.",
    "logprobs_mode": "The importance-sampling correction needs the log-probs that were sampled from.",
}
"""Engine keys that are set elsewhere -> the key to use, or the reason."""


class VllmSection(Section):
    """Rollout engine, for `grpo.use_vllm: true`: any key of vLLM's `LLM` under its own name, and those below."""

    model_config = ConfigDict(extra="allow")

    mode: Literal["colocate", "server"] | None = None
    """In the training process, or a vLLM server."""
    weight_sync: Literal["auto", "merged", "batched", "adapter"] = "auto"
    """How trained weights reach the engine: TRL's push of every merged tensor, the same in batches, or the adapter
    alone; `auto` takes the cheapest that this model allows."""
    sleep_level: Literal[0, 1, 2] | None = None
    """Memory that the engine frees while weights are trained: nothing, the KV cache with weights moved to the host, or
    both; by default 2 with `enable_sleep_mode`, else 0."""
    server_gpus: int | None = Field(default=None, ge=0)
    """A server that the run starts and ends itself, on so many GPUs (the last ones; 0 where there is none) that the
    trainer then leaves alone; by default the engine is in the training process, or a server is there already."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of the GPU's memory that the engine takes."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and completion together, in tokens."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Completions that are generated at once; by default those of one generation of this process."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one engine step, prefill and decode together; TRL's default is 4096."""
    enable_prefix_caching: bool | None = None
    """Keep the keys and values of prompts that begin alike."""
    enable_chunked_prefill: bool | None = None
    """Split long prompts over engine steps."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs and compilation."""
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = None
    """Type that the engine computes in; by default the trainer's."""
    kv_cache_dtype: str | None = None
    """Type of the KV cache (`auto`, `fp8`, ...); 8 bits change what is sampled."""
    quantization: str | None = None
    """Quantization of the engine's weights (`fp8`, `bitsandbytes`, ...); it changes what is sampled."""
    speculative_config: dict[str, Any] | None = None
    """Draft tokens that the model checks several at a time (`{method: ngram, num_speculative_tokens: 4}`); what is
    accepted is distributed as without."""
    mm_processor_kwargs: dict[str, Any] | None = None
    """Arguments of the engine's image processor, which must agree with the trainer's."""
    limit_mm_per_prompt: dict[str, Any] | None = None
    """Images per prompt, and their size, for which the engine reserves memory; by default what the data holds."""
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    """GPUs that share one engine."""
    enable_sleep_mode: bool | None = None
    """Free the engine's memory while weights are trained."""
    model_impl: Literal["vllm", "transformers"] | None = None
    """Whose model code the engine runs."""
    server_base_url: str | None = None
    """URL of the server; takes the place of host and port."""
    server_host: str | None = None
    """Host of the server."""
    server_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the server."""
    server_timeout: float | None = Field(default=None, gt=0)
    """Seconds to wait for the server."""
    group_port: int | None = Field(default=None, ge=1, le=65535)
    """Port over which weights are pushed to the server."""
    structured_outputs_regex: str | None = None
    """Pattern that every completion must match."""

    @model_validator(mode="after")
    def _sleep_agrees(self) -> Self:
        asleep = None if self.sleep_level is None else self.sleep_level > 0
        if asleep is not None and self.enable_sleep_mode is not None and asleep != self.enable_sleep_mode:
            raise ConfigError(
                f"the level is {self.sleep_level}, and vllm.enable_sleep_mode is {str(self.enable_sleep_mode).lower()}",
                where="vllm.sleep_level",
                fix="Remove one of the two.",
            )
        return self

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        others = ("server_base_url", "server_host", "server_port")
        other = next((name for name in others if getattr(self, name) is not None), None)
        if self.server_gpus is not None and (self.mode == "colocate" or other is not None):
            raise ConfigError(
                "the run starts a server of its own, and "
                + (f"vllm.{other} names another one" if other else "vllm.mode is colocate"),
                where="vllm.server_gpus",
                fix="Remove one of the two.",
            )
        if self.server_gpus and (self.tensor_parallel_size or 1) > self.server_gpus:
            what = f"{self.tensor_parallel_size} GPUs would share one engine, and the server has {self.server_gpus}"
            raise ConfigError(what, where="vllm.tensor_parallel_size", fix="Lower it, or raise vllm.server_gpus.")
        return self

    @property
    def at_server(self) -> bool:
        """True if completions come from a server, one that is already there or the run's own."""
        return self.mode == "server" or self.server_gpus is not None

    def grpo_kwargs(self) -> dict[str, Any]:
        """The `GRPOConfig` arguments for the keys that TRL has a name for."""
        given = {trl: getattr(self, ours) for ours, trl in VLLM_TO_TRL.items()}
        if self.sleep_level is not None:
            given["vllm_enable_sleep_mode"] = self.sleep_level > 0
        if self.at_server:
            given["vllm_mode"] = "server"
        return {trl: value for trl, value in given.items() if value is not None}

    def engine_kwargs(self) -> dict[str, Any]:
        """The `vllm.LLM` arguments for the keys that TRL has no name for."""
        given = {**{key: getattr(self, key) for key in type(self).model_fields}, **(self.model_extra or {})}
        return {k: v for k, v in given.items() if v is not None and k not in VLLM_TO_TRL and k not in OURS}


@lru_cache(maxsize=1)
def engine_key_types() -> Mapping[str, ForeignKey]:
    """Engine keys of the installed vLLM with the types they accept; empty without it."""
    return engine_keys() if importlib.util.find_spec("vllm") is not None else {}


def engine_names() -> frozenset[str]:
    """Every engine key that may be written."""
    return (frozenset(engine_key_types()) or NAMES) - ENGINE_FIXED.keys()


def check_engine_keys(section: Mapping[str, Any], known: Sequence[str]) -> None:
    """ConfigError where a key of a `vllm` section that has no field of its own is unknown (its message has the nearest
    of `known`, every legal key path), is set elsewhere, or has a value of a wrong type."""
    for name in section:
        if name in ENGINE_FIXED:
            raise ConfigError("this engine key is set elsewhere", where=f"vllm.{name}", fix=ENGINE_FIXED[name])
        if name not in VllmSection.model_fields and name not in engine_names():
            raise unknown_key(("vllm", name), known)
    others = {name: value for name, value in section.items() if name not in VllmSection.model_fields}
    check_values("vllm", others, engine_key_types())


class _Alone(Section):
    vllm: VllmSection


def vllm_section(values: Mapping[str, Any]) -> VllmSection:
    """A section that is not part of a whole configuration; raises as for one that is."""
    known = [f"vllm.{name}" for name in {*VllmSection.model_fields, *engine_names()}]
    check_engine_keys(values, known)
    try:
        return _Alone.model_validate({"vllm": dict(values)}).vllm
    except ValidationError as error:
        raise from_validation(error, known) from error
