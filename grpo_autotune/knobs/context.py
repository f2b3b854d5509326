"""The facts before a knob is applied: the configuration, the machine, the model's config.json, a probe's record."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.model import ModelSection
from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.architectures import architecture
from grpo_autotune.files import read_mapping
from grpo_autotune.hardware import Machine
from grpo_autotune.records.probe import ProbeRecord, TrainerFacts
from grpo_autotune.registry import names
from grpo_autotune.seams.stored_images import image_columns


class KnobContext(NamedTuple):
    """The facts that decide a knob's values and kind."""

    config: RunConfig  # the user's configuration
    machine: Machine | None  # None where only the configuration is asked about
    model: Mapping[str, Any]  # the model's config.json; empty where nobody has it yet
    record: ProbeRecord | None = None  # a probe of this configuration, where there is one

    @property
    def text(self) -> Mapping[str, Any]:
        """The language model's part of `model`."""
        nested = self.model.get("text_config")
        return nested if isinstance(nested, Mapping) else self.model

    @property
    def images(self) -> bool | None:
        """True if prompts hold images; None where that is not known."""
        if self.record is not None:
            return self.record.images is not None
        if self.model and "vision_config" not in self.model:
            return False
        told = self.config.data.image_size is not None or image_columns(self.config.data.columns)
        return True if told else None

    @property
    def gpus(self) -> int:
        return len(self.machine.gpus) if self.machine is not None else 0


def gpu_bytes(machine: Machine | None, trainer: TrainerFacts | None) -> int | None:
    """Memory of the GPU that a rank trains on: as its process saw it, else the first visible one's; or None."""
    if trainer is not None and trainer.device_bytes is not None:
        return trainer.device_bytes
    return machine.gpus[0].memory_bytes if machine is not None and machine.gpus else None


def context_of(config: RunConfig, machine: Machine | None = None, record: ProbeRecord | None = None) -> KnobContext:
    """Gather what is known without loading or downloading anything."""
    model = record.trainer.model_config_json if record is not None else model_config(config.model)
    return KnobContext(config, machine, model, record)


def model_config(section: ModelSection) -> Mapping[str, Any]:
    """The model's config.json, if it is in the table, in a folder or in the hub's cache; else empty."""
    if section.random_init is not None:
        try:
            return architecture(section.random_init).config
        except ConfigError:
            return {}
    return stored_json(str(section.name_or_path), section.revision, "config.json")


@lru_cache(maxsize=16)
def stored_json(name: str, revision: str | None, file: str) -> Mapping[str, Any]:
    """A JSON file of a model in a folder or in the hub's cache; empty where there is none that can be read."""
    path: Path | None = Path(name).expanduser() / file
    if path is not None and not path.is_file():
        path = cached_file(name, revision, file) if name.count("/") <= 1 and name not in names("model") else None
    return (path and read_mapping(path)) or {}


def cached_file(name: str, revision: str | None, file: str) -> Path | None:
    """The file of a hub repository in the hub's cache; None where it was not downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def pixel_bounds(config: RunConfig) -> tuple[int, int] | None:
    """Least and most pixels that the data section and the image processor, where its file is in a folder or in the
    hub's cache, leave an image: smaller images are enlarged, larger ones shrunk."""
    name, revision = str(config.model.name_or_path), config.model.revision
    whole = stored_json(name, revision, "processor_config.json").get("image_processor") or {}
    settings = whole or stored_json(name, revision, "preprocessor_config.json")
    size = settings.get("size") or {}
    least, most = (
        settings.get("min_pixels") or size.get("shortest_edge"),
        settings.get("max_pixels") or size.get("longest_edge"),
    )
    if not least or not most:
        return None
    return max(int(least), config.data.min_pixels or 0), min(int(most), config.data.max_pixels or int(most))
