"""The trained weights that a command is given: a run folder, a checkpoint in it, or a folder that holds weights.

`RUN_DIR` is its finished `model`, else the newest whole checkpoint. `RUN_DIR/best`, `RUN_DIR/last` and
`RUN_DIR/checkpoint-120` name checkpoints with or without `checkpoints/` between.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_autotune.config.batch import of_other_processes
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.runs.checkpoints import WEIGHTS_ONLY, find_flaw, survey
from grpo_autotune.runs.folder import RunFolder

ADAPTER = "adapter_config.json"
MODEL = "config.json"
PARTS = ("pytorch_model_fsdp_*", "global_step*")


@dataclass(frozen=True)
class Trained:
    """Weights of a training, not loaded."""

    path: Path  # the folder that holds them
    name: str  # `model`, `checkpoint-120`; of a folder outside a run its own name
    run: Path | None  # the run folder around it
    config: RunConfig | None  # the configuration that the run was trained with; None without `config.yaml`
    adapter: dict[str, Any] | None  # `adapter_config.json`; None for whole weights

    @property
    def base(self) -> str | None:
        """The base model that an adapter names."""
        return None if self.adapter is None else self.adapter.get("base_model_name_or_path")


def find_trained(place: str | Path, *, adapter: str | None = None) -> Trained:
    """The weights at `place`, as the module's text has it; `adapter` names one of several in a folder.

    Raises:
        ConfigError: There is nothing there, no whole checkpoint, or a folder that holds no weights, or no such adapter.
    """
    place = Path(place).expanduser()
    run = place if _is_run(place) else next((above for above in _two_above(place) if _is_run(above)), None)
    if run is None:
        if not place.is_dir():
            raise ConfigError(f"there is no folder {place}", where=str(place), fix="Give a run folder of `train`.")
        return _described(place, None, adapter)
    folder = RunFolder(run)
    if place == run:
        if folder.model.is_dir():
            return _described(folder.model, run, adapter)
        whole = next((one for one in survey(folder.checkpoints) if one.flaw in (None, WEIGHTS_ONLY)), None)
        if whole is None:
            raise ConfigError("the run has no whole checkpoint and no model", where=str(run), fix=_else(_kept(run)))
        return _described(whole.path, run, adapter)
    choices = (place, folder.checkpoints / place.name) if place.absolute().parent == run.absolute() else (place,)
    path = next((choice for choice in choices if choice.is_dir()), None)
    if path is None:
        saved = [one.path for one in survey(folder.checkpoints)]
        known = [path.name for path in (run / "best", run / "last", folder.model, *saved) if path.is_dir()]
        known += _kept(run)
        fix = nearest_hint(place.name, known, _else(known))
        raise ConfigError(f"the run has no {place.name}", where=str(run), fix=fix)
    return _described(path.resolve(), run, adapter)


def _kept(run: Path) -> list[str]:
    """Checkpoints of before a rung of `on_oom: ladder` with which the run began again."""
    saved = [one for folder in RunFolder(run).before_rungs() for one in survey(folder)]
    return [f"{one.path.parent.name}/{one.path.name}" for one in saved if one.flaw in (None, WEIGHTS_ONLY)]


def _else(known: list[str]) -> str:
    return f"There {'is' if len(known) == 1 else 'are'} {', '.join(known)}." if known else "Train it first."


def base_section(trained: Trained) -> ModelSection:
    """The `model` section that loads what the trained weights stand on: the run's, or the base that an adapter names,
    and of whole weights the trained folder. Never in 4 bits.

    Raises:
        ConfigError: An adapter outside a run does not name its base.
    """
    if trained.adapter is not None and trained.config is not None:
        return trained.config.model.model_copy(update={"load_in_4bit": False})
    name = str(trained.path) if trained.adapter is None else trained.base
    if name is None:
        raise ConfigError("the adapter does not name its base model", where=str(trained.path))
    trusted = trained.config is not None and trained.config.model.trust_remote_code
    return ModelSection(name_or_path=name, trust_remote_code=trusted)


def find_whole(place: str | Path) -> Trained:
    """As `find_trained`; ConfigError also for weights of which each rank saved its part."""
    if parts_of((trained := find_trained(place)).path) is not None:
        fix = f"Put them together first, and give what comes out: grpo-autotune merge {trained.path} OUT."
        raise ConfigError("each rank saved its part of these weights", where=str(trained.path), fix=fix)
    return trained


def parts_of(path: Path) -> Path | None:
    """The folder in `path` with weights that each rank saved its part of (DeepSpeed's ZeRO-3, FSDP's sharded state),
    where they are not there in one piece as well."""
    if any(path.glob("*model*.safetensors")) or any(path.glob("*model*.bin")):
        return None
    return next((part for name in PARTS for part in sorted(path.glob(name)) if part.is_dir()), None)


def _is_run(place: Path) -> bool:
    return (place / "config.yaml").is_file() or (place / "checkpoints").is_dir()


def _two_above(place: Path) -> list[Path]:
    return [*place.parents[:2], *place.absolute().parents[:2]]


def _described(path: Path, run: Path | None, name: str | None) -> Trained:
    flaw = find_flaw(path) if path.name.startswith("checkpoint-") else None
    if flaw not in (None, WEIGHTS_ONLY):
        raise ConfigError(f"this checkpoint is torn: {flaw}", where=str(path), fix="Take an older one.")
    label, path = path.name, _with_name(path, name)
    adapter = _read(path / ADAPTER)
    if adapter is None and _read(path / MODEL) is None and parts_of(path) is None:
        raise ConfigError(
            "it holds neither a model nor an adapter", where=str(path), fix="Give a run folder of `train`."
        )
    with of_other_processes():
        config = load_config(run / "config.yaml") if run is not None and (run / "config.yaml").is_file() else None
    return Trained(path, label, run, config, adapter)


def _with_name(path: Path, name: str | None) -> Path:
    """The folder of an adapter: PEFT keeps `default` in the folder itself, and others in folders of their names."""
    named = {file.parent.name: file.parent for file in sorted(path.glob(f"*/{ADAPTER}"))}
    alone = any((path / file).is_file() for file in (ADAPTER, MODEL))
    named = ({"default": path} if alone else {}) | named
    if name is None and (alone or len(named) < 2):
        return path if alone else next(iter(named.values()), path)
    if name not in named:
        what = f"there is no adapter {name}" if name else "there are several adapters"
        names = f"Name one with --adapter: {', '.join(named)}." if named else "There is none."
        raise ConfigError(what, where=str(path), fix=names)
    return named[name]


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, ConfigError where it is something else."""
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"is no JSON: {error}", where=str(file), fix="The folder was not saved whole.") from error
    if not isinstance(values, dict):
        raise ConfigError("is no JSON object", where=str(file), fix="The folder was not saved whole.")
    return values
