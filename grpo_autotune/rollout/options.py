"""Options of the rollout engine, beyond what TRL can be told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self

from grpo_autotune.config.sections.vllm import VLLM_TO_TRL, VllmSection, engine_names, vllm_section
from grpo_autotune.errors import ConfigError

WeightSync = Literal["auto", "merged", "batched", "adapter"]
SleepLevel = Literal[0, 1, 2]

GREEDY = 1e-5
"""Temperature below which vLLM decodes greedily (`_SAMPLING_EPS` in vllm/sampling_params.py)."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine."""

    weight_sync: WeightSync = "auto"  # the way by which trained weights reach the engine
    # 0, 1 or 2: nothing, the cache, or the cache and the weights are given back while weights are trained; None leaves
    # it to the trainer's `vllm_enable_sleep_mode`, whose level is 2
    sleep_level: SleepLevel | None = None
    # `vllm.LLM` arguments verbatim; they win over what TRL gives
    keys: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    # width and height of the data's images, each size once; empty where they are not known. Found as the trainer is
    # built
    image_sizes: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def of_section(cls, section: VllmSection) -> Self:
        """The options that a `vllm` section asks for; keys that TRL has a name for reach it by `GRPOConfig`."""
        return cls(section.weight_sync, section.sleep_level, MappingProxyType(section.engine_kwargs()))

    @classmethod
    def of_keys(cls, weight_sync: WeightSync, sleep_level: SleepLevel | None, keys: Mapping[str, Any]) -> Self:
        """The options of a script, judged like a `vllm` section: ConfigError where a key is unknown or decided
        elsewhere, or a value is not accepted."""
        for name in keys.keys() & VLLM_TO_TRL.keys() - engine_names():
            fix = f"Give GRPOConfig {VLLM_TO_TRL[name]} instead."
            raise ConfigError("this is an argument of GRPOConfig, not of vllm.LLM", where=name, fix=fix)
        if "server_gpus" in keys:
            fix = "Start one with `grpo-autotune serve`, and give its address to GRPOConfig (vllm_server_base_url)."
            raise ConfigError("unlock_vllm starts no server", where="server_gpus", fix=fix)
        vllm_section({"weight_sync": weight_sync, "sleep_level": sleep_level, **keys})
        return cls(weight_sync, sleep_level, MappingProxyType(dict(keys)))
