"""RunConfig: one YAML file that says what to train, in the ecosystem's own keys.

Sections hold the keys of the library that uses them, verbatim. Validators check and never rewrite; values derived from
the keys are properties. Every mistake is a `ConfigError` that names the key path. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from grpo_autotune.config.batch import BatchPlan, batch_plan
from grpo_autotune.config.foreign_keys import OWN_GRPO_KEYS, check_values, grpo_keys, peft_keys
from grpo_autotune.config.messages import from_validation, unknown_key
from grpo_autotune.config.places import trained_adapter
from grpo_autotune.config.registry_file import with_named_data
from grpo_autotune.config.sampling import check_eval_sampling, check_sampling
from grpo_autotune.config.sections.branches import Branches, Control, branch_paths, judged_branches, start_weights
from grpo_autotune.config.sections.checkpoints import CheckpointsSection, check_choice
from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.config.sections.fsdp import check_fsdp
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.config.sections.monitors import MonitorsSection
from grpo_autotune.config.sections.rewards import RewardItem
from grpo_autotune.config.sections.sampled import EvalSampling, Resample, check_resample
from grpo_autotune.config.sections.section import OutputSection, SearchSection, Section
from grpo_autotune.config.sections.speedups import SpeedUps, check_speedups
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL, VllmSection, check_engine_keys, engine_names
from grpo_autotune.config.sources import read_source, resolve_source
from grpo_autotune.config.yaml_text import parse_yaml, write_yaml
from grpo_autotune.config.zero import deepspeed_keys, with_deepspeed_file
from grpo_autotune.errors import ConfigError
from grpo_autotune.records.receipt import Receipt

StopSignal = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]
Consent = Literal["micro_batch", "image_size", "lora_rank", "num_generations", "max_completion_length"]

OWNED_ELSEWHERE = {
    "output_dir": "output.dir",
    "model_init_kwargs": "the model section (dtype, attn_implementation, revision, load_in_4bit)",
    "trust_remote_code": "model.trust_remote_code",
    "reward_weights": "rewards[].weight",
    "logging_nan_inf_filter": "no key: a loss that is not a number always stops the run",
    "resume_from_checkpoint": "the option --resume",
    **{trl: f"vllm.{ours}" for ours, trl in VLLM_TO_TRL.items()},
}
"""`GRPOConfig` keys that belong elsewhere -> the key or option to use."""

LADDER_LACKS = {
    "auto_find_batch_size": "it changes the batch of a step",
    "save_only_model": "training cannot go on from its checkpoints",
}
"""Keys of `grpo` that must not be true with `on_oom: ladder`, and why."""

PEFT_FIXED = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode", "revision"}
"""`LoraConfig` fields that PEFT fills in itself."""


def packed_at_server() -> ConfigError:
    """The error of a base in 4 bits whose weights would go to a server."""
    what = "a vLLM server takes no weights of a base in 4 bits: they would be sent packed"
    return ConfigError(what, where="model.load_in_4bit", fix="Set vllm.mode to colocate, or this to false.")


class RunConfig(Section):
    """Everything that decides a training run. Frozen; equal after a trip through YAML or JSON."""

    model: ModelSection
    peft: dict[str, Any] | None = None
    data: DataSection
    rewards: list[RewardItem] = Field(min_length=1)
    branches: Branches | None = None
    grpo: dict[str, Any] = {}
    resample: Resample | None = None
    eval_sampling: EvalSampling | None = None
    vllm: VllmSection = VllmSection()
    speedups: SpeedUps = "auto"
    """Exact speed-ups of TRL's step: `auto` (all that fit), `none`, or a list of names, `auto` among them for all
    others. An item may be a mapping with options: `{name: shared_prefix, form: cascade}` (or `flex`, FlexAttention)
    also tries that form of attention, on CUDA, and takes it where it is faster; `{name: shared_prefix, dropout:
    shared}` goes on under LoRA dropout, with one mask for the prompt of a group: not exact, and so never in `auto`."""
    speedups_check: Literal["auto", "always"] = "auto"
    """When loss and gradients of a micro step are compared with plain TRL's, on the first batch of each kind: `auto`
    where somebody else's code is on the trainer or the model, or `always`."""
    stop_signals: list[StopSignal] = ["SIGTERM", "SIGUSR1", "SIGUSR2"]
    """Signals that end training as Ctrl-C does: after the step, evaluation or save under way, on all ranks, with a
    checkpoint and exit code 128 + its number; `SIGHUP` and `SIGXCPU` may be added. One that is left out ends it at once
    ([clusters](scale.md#signals))."""
    on_oom: Literal["stop", "ladder"] = "stop"
    """What `train` does where memory runs out: `stop`, or `ladder`: go on from the newest checkpoint, in a new process,
    with a setting that needs less memory and learns the same ([the rungs](troubleshooting.md#out-of-memory))."""
    on_oom_allow: list[Consent] = []
    """Rungs of that ladder that change what is learned and may be taken after the others: `micro_batch` (where the loss
    depends on it), `image_size`, `lora_rank`, `num_generations`, `max_completion_length`."""
    search: SearchSection = SearchSection()
    monitors: MonitorsSection = MonitorsSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    output: OutputSection = OutputSection()
    receipt: Receipt | None = None

    @field_validator("grpo")
    @classmethod
    def _grpo_keys(cls, grpo: dict[str, Any]) -> dict[str, Any]:
        for name in grpo:
            if name in OWNED_ELSEWHERE:
                raise ConfigError(
                    "this key belongs to another section", where=f"grpo.{name}", fix=f"Use {OWNED_ELSEWHERE[name]}."
                )
            if name not in grpo_keys() and name not in OWN_GRPO_KEYS:
                raise unknown_key(("grpo", name), known_paths())
        check_values("grpo", grpo, {**grpo_keys(), **OWN_GRPO_KEYS})
        for key, default in (("multi_objective_aggregation", "sum_then_normalize"), ("scale_rewards", "group")):
            if grpo.get("advantages") == "rank" and grpo.get(key, default) not in (default, True):
                raise ConfigError("no meaning beside grpo.advantages rank", where=f"grpo.{key}", fix="Remove it.")
        batch_plan(grpo)
        check_sampling(grpo)
        check_fsdp(grpo)
        if grpo.get("deepspeed"):
            deepspeed_keys(grpo["deepspeed"])
        return grpo

    @field_validator("peft")
    @classmethod
    def _peft_keys(cls, peft: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in peft or {}:
            if name in PEFT_FIXED:
                raise ConfigError("PEFT fills this in itself", where=f"peft.{name}", fix="Remove it.")
            if name not in peft_keys():
                raise unknown_key(("peft", name), known_paths())
        check_values("peft", peft or {}, peft_keys())
        return peft

    @field_validator("vllm", mode="before")
    @classmethod
    def _vllm_keys(cls, vllm: Any) -> Any:
        if isinstance(vllm, Mapping):
            check_engine_keys(vllm, known_paths())
        return vllm

    @model_validator(mode="before")
    @classmethod
    def _tuned_without_speedups(cls, values: Any) -> Any:
        """A tuned configuration that says nothing of speed-ups was measured without any, as its receipt tells."""
        if isinstance(values, Mapping) and values.get("receipt") is not None:
            return {"speedups": "none", **values}
        return values

    @field_validator("speedups", mode="before")
    @classmethod
    def _speedups_shape(cls, speedups: Any) -> Any:
        return check_speedups(speedups)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.model.load_in_4bit and self.peft is None and self.model.adapter is None:
            what = "weights in 4 bits cannot be trained without an adapter"
            raise ConfigError(what, where="model.load_in_4bit", fix="Add a peft section.")
        if self.model.load_in_4bit and self.use_vllm and self.vllm.at_server:
            raise packed_at_server()
        if self.branches is not None:
            start_weights(self.branches, self.grpo)
            judged_branches(self.branches, self.rewards)
        on_start, fix = (
            bool(self.grpo.get("eval_on_start")),
            "Set data.eval_split, data.eval_path, data.eval or data.split_ratio.",
        )
        if not self.data.held_out and (on_start or self.batch.eval_batch is not None):
            where = "grpo.eval_on_start" if on_start else "grpo.eval_strategy"
            raise ConfigError("evaluation is on, and there is no held-out data", where=where, fix=fix)
        if self.eval_sampling is not None:
            evaluates = on_start or self.batch.eval_batch is not None
            server_n = self.batch.eval_generations if self.use_vllm and self.vllm.at_server else 1
            values = self.eval_sampling.model_dump()
            check_eval_sampling(values, evaluates=evaluates, in_vllm=self.use_vllm, server_n=server_n)
        if self.resample is not None:
            check_resample(self.resample, self.rewards, self.branches)
        has_kl = self.branches is not None or bool(self.grpo.get("beta"))
        check_choice(self.checkpoints, self.grpo, evaluates=self.batch.eval_batch is not None, has_kl=has_kl)
        for name, branch in self.branches.by_name.items() if self.branches is not None else ():
            if not self.data.held_out and branch.eval is not None:
                raise ConfigError("there is no held-out data", where=f"branches.{name}.eval", fix=fix)
        if not self.data.held_out and self.data.max_eval_samples is not None:
            raise ConfigError("there is no held-out data to take rows of", where="data.max_eval_samples", fix=fix)
        for key, why in LADDER_LACKS.items() if self.on_oom == "ladder" else ():
            if self.grpo.get(key):
                raise ConfigError(f"on_oom ladder cannot be used with it: {why}", where=f"grpo.{key}", fix="Remove it.")
        if self.vllm != VllmSection() and not self.use_vllm:
            raise ConfigError(
                "the vllm section has keys, and vLLM is off",
                where="vllm",
                fix="Set grpo.use_vllm to true, or remove the section.",
            )
        return self

    @property
    def batch(self) -> BatchPlan:
        """The batch arithmetic, with TRL's defaults for keys left out and the world size of this process."""
        return batch_plan(self.grpo)

    @property
    def run_dir(self) -> Path:
        return Path(self.output.dir) if self.output.dir else Path("runs") / (self.output.name or "run")

    @property
    def lora(self) -> dict[str, Any] | None:
        """Keys of the adapter that is trained: the `peft` section, or those of `model.adapter`; None without one."""
        return self.peft if self.model.adapter is None else trained_adapter(self.model.adapter)

    @property
    def use_vllm(self) -> bool:
        return bool(self.grpo.get("use_vllm", False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from plain values, ConfigError for the first mistake; a section that is null counts as left out."""
        try:
            return cls.model_validate({key: value for key, value in values.items() if value is not None})
        except ValidationError as error:
            raise from_validation(error, known_paths() + branch_paths(values.get("branches"))) from error

    @classmethod
    def from_yaml(cls, text: str, where: str = "YAML text") -> RunConfig:
        """Build from YAML text; `where` names it in messages. Raises as `from_dict`."""
        return cls.from_dict(_mapping(parse_yaml(text, where), where))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; keys that hold their default are left out, `speedups` apart: a stored run says what it had."""
        values = {**self.model_dump(mode="json", exclude_defaults=True), "speedups": self.speedups}
        return {name: values[name] for name in type(self).model_fields if name in values}

    def to_yaml(self) -> str:
        """YAML text that `from_yaml` reads back to an equal configuration."""
        return write_yaml(self.to_dict())


def load_config(source: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        source: Path, or name of a shipped profile; None takes `./grpo.yaml` if it is there, else the profile `demo`.
        overrides: Items of the form `section.key=value`, the value in YAML; later ones win. `rewards.0.weight=2`
            reaches into a list.

    Returns:
        The configuration; `output.name` is the file's name without its ending, unless it is given.

    Raises:
        ConfigError: If the source is not there, is not YAML, or is not a legal configuration.
    """
    label, path = resolve_source(source)
    values = _mapping(parse_yaml(read_source(path), label), label)
    for item in overrides:
        override(values, item)
    values = with_deepspeed_file(with_named_data(values, path.parent), path.parent)
    output = values.get("output") or {}
    if isinstance(output, dict) and output.get("name") is None:
        values["output"] = {**output, "name": path.stem}
    return RunConfig.from_dict(values)


def known_paths() -> list[str]:
    """Every key path a configuration may hold, for instance `grpo.beta`."""
    paths = list(RunConfig.model_fields)
    for name, section in (
        ("model", ModelSection),
        ("data", DataSection),
        ("rewards", RewardItem),
        ("branches", Branches),
        ("branches.control", Control),
        ("resample", Resample),
        ("eval_sampling", EvalSampling),
        ("vllm", VllmSection),
        ("search", SearchSection),
        ("monitors", MonitorsSection),
        *((f"monitors.{name}", item.__class__) for name, item in MonitorsSection().items_on().items()),
        ("checkpoints", CheckpointsSection),
        ("output", OutputSection),
        ("receipt", Receipt),
    ):
        paths += [f"{name}.{key}" for key in section.model_fields]
    paths += [f"vllm.{key}" for key in sorted(engine_names() - VllmSection.model_fields.keys())]
    paths += [f"grpo.{key}" for key in (*grpo_keys(), *OWN_GRPO_KEYS) if key not in OWNED_ELSEWHERE]
    return paths + [f"peft.{key}" for key in peft_keys() if key not in PEFT_FIXED]


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        fix = f"Sections: {', '.join(RunConfig.model_fields)}."
        raise ConfigError("a configuration is a mapping of sections", where=where, fix=fix)
    return values


def override(values: dict[str, Any], item: str) -> None:
    """Set one `a.b=value` in nested plain values, creating missing sections."""
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{item!r} is not of the form section.key=value", where="--set", fix="Example: --set grpo.beta=0.02."
        )
    here: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                what = f"the list {'.'.join(keys[:depth])} has {len(here)} items"
                raise ConfigError(what, where=f"--set {path}", fix="Count from 0.")
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
        else:
            raise ConfigError(f"{'.'.join(keys[:depth])} holds {here!r}, which has no keys", where=f"--set {path}")
        if last:
            here[index] = parse_yaml(text, f"--set {path}")
        else:
            if isinstance(here, dict) and here.get(index) is None:
                here[index] = {}
            here = here[index]
