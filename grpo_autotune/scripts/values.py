"""Values that take the place of a script's own: in its `GRPOConfig`, in the size of its images, and its speed-ups.

Nothing of TRL is imported before the script does it. The keys enter just before TRL checks its arguments
(`GRPOConfig.__post_init__`), so they win over whatever the script gives, by keyword, from a command line or in a
subclass.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field, ValidationError

from grpo_autotune.config.foreign_keys import check_values, grpo_keys
from grpo_autotune.config.messages import from_validation
from grpo_autotune.config.sections.section import Section
from grpo_autotune.config.sections.speedups import SpeedUps, check_speedups
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL, VllmSection, vllm_section
from grpo_autotune.config.sources import read_source
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.errors import AutotuneError, ConfigError
from grpo_autotune.files import is_file
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.rollout.colocate.unlock import Unlocked
from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.seams import mixed_image_rows
from grpo_autotune.seams.layers import AttributeSlot, Next, wrap
from grpo_autotune.seams.stored_images import Limits, image_columns
from grpo_autotune.speedups.selection import chosen

IMAGE_SIZE = "data.image_size"
SPEEDUPS = "speedups"
RECEIPT = "receipt"


class ScriptValues:
    """Values for a script's trainers and their vLLM engine: key path -> value, of `grpo.*`, `vllm.*`, `data.image_size`
    and `speedups`, which win over the `GRPOConfig` keys in `always`. ConfigError where a key reaches no script, a value
    is not accepted, two keys say different things of one, or there is no such speed-up."""

    def __init__(self, values: Mapping[str, Any], always: Mapping[str, Any] | None = None) -> None:
        engine = vllm_section({path.removeprefix("vllm."): values[path] for path in values if path.startswith("vllm.")})
        if engine.server_gpus is not None:
            fix = "Start one with `grpo-autotune serve`, and give vllm.server_base_url."
            raise ConfigError("a script's run does not start a server of its own", where="vllm.server_gpus", fix=fix)
        overrides = grpo_overrides(values)
        _check_agreement(overrides, engine)
        self.grpo = {**(always or {}), **overrides, **engine.grpo_kwargs()}
        self.unlocked = Unlocked(EngineOptions.of_section(engine))
        self.image_size: int | None = values.get(IMAGE_SIZE)
        self.speedups: SpeedUps = check_speedups(values.get(SPEEDUPS) or "none")
        chosen(self.speedups)

    def on_config_module(self, module: ModuleType) -> None:
        """Put the keys into `GRPOConfig`, whose module was imported; without keys the class stays as it is."""
        if self.grpo:
            wrap(AttributeSlot(module.GRPOConfig, "__post_init__"), self._configured)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """A trainer's keyword arguments, with images of the wanted size; ConfigError where `train_dataset` has none."""
        if self.image_size is None:
            return given
        return {**given, "train_dataset": _resized(given.get("train_dataset"), self.image_size)}

    def finish(self, trainer: Any, say: Callable[[str], None]) -> None:
        """Mend a trainer that was built, put the speed-ups on it, and say which are on."""
        from grpo_autotune.speedups.install import speed_up

        if not trainer.use_vllm:  # else it was done as the engine was unlocked
            mixed_image_rows.mend(trainer)
        if self.speedups != "none":
            for line in speed_up(trainer, self.speedups).lines():
                say(line)

    def _configured(self, call_next: Next, config: Any, /) -> None:
        from grpo_autotune.train.arguments import as_config_errors

        as_written = copy.copy(config)
        for name, value in self.grpo.items():
            setattr(config, name, value)
        try:
            with as_config_errors("grpo"):
                call_next(config)
        except AutotuneError:
            call_next(as_written)  # where the script's own values fail too, the error is the script's
            raise


def grpo_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `GRPOConfig` keys among `values`, without `grpo.`; those of `vllm.` are left to its section. ConfigError
    where a key reaches no script, or a value has a wrong type."""
    grpo = {}
    for path, value in values.items():
        section, _, key = path.rpartition(".")
        name = key if section in ("", "grpo") else None
        if path in (IMAGE_SIZE, SPEEDUPS) or section == "vllm":
            continue
        if name is None:
            fix = f"Only GRPOConfig's keys, vllm's, {IMAGE_SIZE} and {SPEEDUPS} reach a script."
            raise ConfigError("a script has no such knob", where=path, fix=fix)
        if name not in grpo_keys():
            raise ConfigError("GRPOConfig has no such key", where=path)
        grpo[name] = value
    check_values("grpo", grpo, grpo_keys())
    return grpo


def _check_agreement(overrides: Mapping[str, Any], engine: VllmSection) -> None:
    """Refuse an engine's setting that is given different values under TRL's name and under vLLM's."""
    for trl, value in engine.grpo_kwargs().items():
        if trl in overrides and overrides[trl] != value:
            given = {theirs: ours for ours, theirs in VLLM_TO_TRL.items() if getattr(engine, ours) is not None}
            ours = given.get(trl, "sleep_level")
            raise ConfigError(
                f"set to {json.dumps(getattr(engine, ours))}, but grpo.{trl}, TRL's key for the same setting, is "
                f"{json.dumps(overrides[trl])}",
                where=f"vllm.{ours}",
                fix="Remove one of the two keys.",
            )


class _Images(Section):
    image_size: int = Field(gt=0)


class _File(Section):
    """The file that `grpo-autotune search --script` writes."""

    grpo: dict[str, Any] = {}
    vllm: dict[str, Any] = {}
    data: _Images | None = None
    speedups: SpeedUps = "none"
    receipt: Receipt | None = None


def load_script_values(path: Path) -> tuple[dict[str, Any], Receipt | None]:
    """Read a file as `grpo-autotune search --script` writes it: key path -> value, and the receipt if there is one.
    ConfigError where it cannot be read, is no YAML, or holds something else."""
    if not is_file(path):
        raise ConfigError("no such file", where=str(path), fix="Give a file that `search --script` wrote.")
    try:
        given = _File.model_validate(parse_yaml(read_source(path), str(path)))
    except ValidationError as error:
        known = [*_File.model_fields, IMAGE_SIZE, *(f"{RECEIPT}.{key}" for key in Receipt.model_fields)]
        problem = from_validation(error, known)
        raise ConfigError(problem.what, where=f"{path}: {problem.where}".rstrip(": "), fix=problem.fix) from error
    values = {f"grpo.{key}": value for key, value in given.grpo.items()}
    values |= {f"vllm.{key}": value for key, value in given.vllm.items()}
    values[SPEEDUPS] = given.speedups
    if given.data is not None:
        values[IMAGE_SIZE] = given.data.image_size
    ScriptValues(values)
    return values, given.receipt


def _resized(rows: Any, size: int) -> Any:
    import datasets

    from grpo_autotune.train.data.images import prepare_images

    if not isinstance(rows, datasets.Dataset) or not image_columns(rows.column_names):
        what = "the script gives its trainer no data set with a column of images by the keyword train_dataset"
        raise ConfigError(what, where=IMAGE_SIZE, fix="Take this knob out of the search (search.knobs).")
    return prepare_images(rows, Limits(size), Path.cwd(), "the script's data", lambda line: None)
