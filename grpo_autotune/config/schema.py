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
from grpo_autotune.config.branches import Branches, Control, branch_paths, judged_branches, start_weights
from grpo_autotune.config.foreign_keys import OWN_GRPO_KEYS, check_values, grpo_keys, peft_keys
from grpo_autotune.config.messages import from_validation, unknown_key
from grpo_autotune.config.monitors import MonitorsSection
from grpo_autotune.config.rewards import RewardItem
from grpo_autotune.config.sampling import check_sampling
from grpo_autotune.config.section import Section
from grpo_autotune.config.sources import read_source, resolve_source
from grpo_autotune.config.speedups import SpeedUps, check_speedups
from grpo_autotune.config.vllm import VLLM_TO_TRL, VllmSection, check_engine_keys, engine_names
from grpo_autotune.config.yaml_text import parse_yaml, write_yaml
from grpo_autotune.errors import ConfigError
from grpo_autotune.records.receipt import Receipt

__all__ = ["RewardItem", "RunConfig", "load_config", "resolve_source"]

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

PEFT_FIXED = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode", "revision"}
"""`LoraConfig` fields that PEFT fills in itself."""


class ModelSection(Section):
    """The model to train."""

    name_or_path: str | None = None
    """Folder, hub id, or registered model name (`demo`). Exactly one of this and `random_init`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    random_init: str | None = None
    """Architecture to build with random weights (`qwen3-vl-2b`), to measure a model before downloading it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type; `auto` takes the checkpoint's own."""
    attn_implementation: str | None = None
    """Attention kernel, as in `from_pretrained` (`sdpa`, `eager`, `flash_attention_2`, ...)."""
    load_in_4bit: bool = False
    """Load the base weights in 4 bits with bitsandbytes (QLoRA); needs `peft`."""
    freeze_vision_tower: bool = False
    """Do not train the vision tower of a vision-language model."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.random_init is None):
            raise ConfigError(
                "give exactly one of model.name_or_path and model.random_init",
                where="model",
                fix="Set the one that is not wanted to null." if self.name_or_path else "Name a model to train.",
            )
        return self


class HeldOut(Section):
    """One held-out set, as `eval_path` and `eval_split` of the data section name it."""

    path: str | None = None
    split: str | None = None


class DataSection(Section):
    """The prompts, and the columns that rewards read."""

    path: str
    """Registered data-set name, .json/.jsonl/.csv/.parquet file, image folder, saved `datasets` folder, or hub id."""
    name: str | None = None
    """Configuration of a hub data set (`main` of openai/gsm8k)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = "train"
    """Split to train on; slices as in `datasets` (`train[:90%]`). A file has the one split `train`."""
    eval_path: str | None = None
    """Held-out data, where it is not a split of `path`."""
    eval_split: str | None = None
    """Held-out split of `eval_path` (there by default `test`, or a file's one split), or of `path` (`train[90%:]`)."""
    eval: dict[str, HeldOut] = {}
    """Instead of these two, several held-out sets: name -> mapping of `path` and `split`. Each reports its own
    `eval_<name>_loss`; TRL names its metrics (`eval_reward`) alike for all: the best model is the last set's."""
    columns: dict[str, str] = {}
    """Our column -> the data's column: `prompt`, `image`, `images`, and what rewards read (`answer`)."""
    prompt_template: str | None = None
    """Prompt as a format string over columns: `"{question} Answer with a number."`"""
    prompt_format: Literal["messages", "text"] = "messages"
    """Text as a user message, to which the chat template is applied; `text` gives the model the text as it is."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    max_samples: int | None = Field(default=None, ge=1)
    """Number of rows to use, from the first."""
    max_eval_samples: int | None = Field(default=None, ge=1)
    """The same for held-out data."""
    image_size: int | None = Field(default=None, ge=1)
    """Longest side of an image in pixels; larger ones are resized once, aspect kept, and none is enlarged."""
    params: dict[str, Any] = {}
    """Arguments of a registered data-set function."""

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """Held-out sets by name; the one of `eval_path` and `eval_split` has an empty name."""
        one = HeldOut(path=self.eval_path, split=self.eval_split)
        return self.eval or ({} if one == HeldOut() else {"": one})

    @model_validator(mode="after")
    def _sets_are_named(self) -> Self:
        if self.eval and (self.eval_path, self.eval_split) != (None, None):
            raise ConfigError("it takes the place of data.eval_path and data.eval_split", where="data.eval")
        for name, one in self.eval.items():
            if not name or one == HeldOut():
                raise ConfigError("a set needs a name, and a path or a split", where=f"data.eval.{name}")
        return self


class SearchSection(Section):
    """Limits of `grpo-autotune search`: what it may change, and what it must prove."""

    knobs: dict[str, list[Any] | None] = {}
    """Knob (a key path such as `data.image_size`) -> the values it may take; null takes a knob out of the search."""
    accept: list[str] = []
    """Knobs that change what is learned and may enter `tuned.yaml` although the measurements do not prove them."""
    max_reward_drop: float = Field(default=0.03, ge=0, allow_inf_nan=False)
    """Largest loss of mean reward that a knob which changes what is learned may cost."""
    confidence: float = Field(default=0.9, gt=0.5, lt=1)
    """Confidence of every interval, and of the test against `max_reward_drop`."""
    allow_longer_run: bool = False
    """Whether the predicted wall time of the configured run may rise for more useful completions per second."""
    steps: int = Field(default=3, ge=1)
    """Optimizer steps that a trial measures at first; more where intervals overlap."""
    trial_limit_s: float | None = Field(default=None, gt=0)
    """Longest a trial may run, in seconds; by default what the models predict for it, with a margin."""
    seed: int = Field(default=0, ge=0)
    """Seed of the search itself; trials keep `grpo.seed`."""


class OutputSection(Section):
    """The folder of a run."""

    dir: str | None = None
    """Run folder; `runs/<name>` by default."""
    name: str | None = None
    """Name of the run; the configuration file's name by default."""


def packed_at_server() -> ConfigError:
    """The error of a base in 4 bits whose weights would go to a server."""
    return ConfigError(
        "a vLLM server takes no weights of a base in 4 bits: they would be sent packed",
        where="model.load_in_4bit",
        fix="Set vllm.mode to colocate, or this to false.",
    )


class RunConfig(Section):
    """Everything that decides a training run. Frozen; equal after a trip through YAML or JSON."""

    model: ModelSection
    peft: dict[str, Any] | None = None
    data: DataSection
    rewards: list[RewardItem] = Field(min_length=1)
    branches: Branches | None = None
    grpo: dict[str, Any] = {}
    vllm: VllmSection = VllmSection()
    speedups: SpeedUps = "auto"
    """Exact speed-ups of TRL's step: `auto` (all that fit), `none`, or a list of names. An item may be a mapping with
    options: `{name: shared_prefix, form: cascade}` (or `flex`, FlexAttention) also tries that form of attention, on
    CUDA, and takes it where it is faster; `{name: shared_prefix, dropout: shared}` goes on under LoRA dropout, with one
    mask for the prompt of a group: not exact, and so never in `auto`."""
    speedups_check: Literal["auto", "always"] = "auto"
    """When loss and gradients of a micro step are compared with plain TRL's, on the first batch of each kind: `auto`
    where somebody else's code is on the trainer or the model, or `always`."""
    search: SearchSection = SearchSection()
    monitors: MonitorsSection = MonitorsSection()
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
        if self.model.load_in_4bit and self.peft is None:
            raise ConfigError(
                "weights in 4 bits cannot be trained without an adapter",
                where="model.load_in_4bit",
                fix="Add a peft section.",
            )
        if self.model.load_in_4bit and self.use_vllm and self.vllm.at_server:
            raise packed_at_server()
        if self.branches is not None:
            start_weights(self.branches, self.grpo)
            judged_branches(self.branches, self.rewards)
        on_start, fix = bool(self.grpo.get("eval_on_start")), "Set data.eval_split, data.eval_path or data.eval."
        if not self.data.held_out and (on_start or self.batch.eval_batch is not None):
            where = "grpo.eval_on_start" if on_start else "grpo.eval_strategy"
            raise ConfigError("evaluation is on, and there is no held-out data", where=where, fix=fix)
        for name, branch in self.branches.by_name.items() if self.branches is not None else ():
            if not self.data.held_out and branch.eval is not None:
                raise ConfigError("there is no held-out data", where=f"branches.{name}.eval", fix=fix)
        if not self.data.held_out and self.data.max_eval_samples is not None:
            raise ConfigError("there is no held-out data to take rows of", where="data.max_eval_samples", fix=fix)
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
        ("vllm", VllmSection),
        ("search", SearchSection),
        ("monitors", MonitorsSection),
        *((f"monitors.{name}", item.__class__) for name, item in MonitorsSection().items_on().items()),
        ("output", OutputSection),
        ("receipt", Receipt),
    ):
        paths += [f"{name}.{key}" for key in section.model_fields]
    paths += [f"vllm.{key}" for key in sorted(engine_names() - VllmSection.model_fields.keys())]
    paths += [f"grpo.{key}" for key in (*grpo_keys(), *OWN_GRPO_KEYS) if key not in OWNED_ELSEWHERE]
    return paths + [f"peft.{key}" for key in peft_keys() if key not in PEFT_FIXED]


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            "a configuration is a mapping of sections",
            where=where,
            fix=f"Sections: {', '.join(RunConfig.model_fields)}.",
        )
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
                raise ConfigError(
                    f"the list {'.'.join(keys[:depth])} has {len(here)} items",
                    where=f"--set {path}",
                    fix="Count from 0.",
                )
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
