"""Named data sets: a file of them, and the `data` section of a configuration with each name replaced by what it stands
for, so that what a run stores needs no such file (docs/data.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo_autotune.config.messages import from_validation
from grpo_autotune.config.sections.data import IMAGE_LIMITS, OF_PARTS, DataSection
from grpo_autotune.config.sources import read_source
from grpo_autotune.config.yaml_text import parse_yaml
from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.files import is_file, is_folder
from grpo_autotune.registry import is_reference, names

DEFAULT_FILE = "datasets.yaml"
HELD_OUT = ("eval_path", "eval_split", "split_ratio", "eval")

Values = Mapping[str, Any]


def with_named_data(values: Values, folder: Path) -> dict[str, Any]:
    """Plain values of a configuration, those of its `data` section as they are without the registry that it names, or
    `datasets.yaml` in `folder` (the configuration's) or the current one. ConfigError for a name that is not there, and
    for an entry that is asked for and broken."""
    section = values.get("data")
    if not isinstance(section, Mapping):
        return dict(values)
    file = section.get("registry")
    if file is not None and not (isinstance(file, str) and is_file(file)):
        raise ConfigError(f"there is no file {file}", where="data.registry", fix=f"Paths start from {Path.cwd()}.")
    places = [folder / DEFAULT_FILE, Path(DEFAULT_FILE)] if file is None else [Path(file).expanduser()]
    registry = next((Registry(place, _entries(place), file is not None) for place in places if is_file(place)), None)
    return {**values, "data": (registry or Registry(places[-1], {})).resolved(section)}


def named_section(section: DataSection, name: str) -> DataSection | None:
    """The section for the data of a name: of a part of the mixture in `section`, or of an entry of `datasets.yaml` in
    the current folder, which is read as `section` has it where the entry does not say. None for what is no name;
    ConfigError as `with_named_data`."""
    part = section.mix.get(name)
    if part is not None:
        values = part.model_dump(exclude_unset=True, exclude={"weight"})
    else:
        values = with_named_data({"data": {"path": name}}, Path())["data"]
    if values == {"path": name}:
        return None
    kept = {*IMAGE_LIMITS, "max_prompt_tokens", "prompt_overflow"}
    kept |= set() if "mix" in values else {"system_prompt", "prompt_format"}
    if not {"mix", "columns", "prompt_template"} & values.keys():
        kept |= {"columns", "prompt_template"}
    return DataSection.model_validate({**section.model_dump(exclude_unset=True, include=kept), **values})


def _entries(file: Path) -> Mapping[str, Any]:
    entries = parse_yaml(read_source(file), str(file)) or {}
    if not isinstance(entries, Mapping):
        raise ConfigError("it is no mapping of names to data sets", where=str(file), fix="Write NAME: {path: ...}.")
    return {str(name): entry for name, entry in entries.items()}


@dataclass(frozen=True)
class Registry:
    """A file of named data sets."""

    file: Path
    entries: Values
    asked_for: bool = False  # by the configuration

    def resolved(self, section: Values) -> dict[str, Any]:
        """The `data` section, or an entry's own keys below it, with nothing left that only the registry explains."""
        name = section.get("path")
        entry = None if "mix" in section else self._entry(name, "data.path")
        result = {key: value for key, value in _over(entry or {}, section).items() if key != "registry"}
        if entry is not None:
            result["path"] = entry.get("path", name)
        self._held_out(result, ("eval_path", "eval_split"), "data.eval_path")
        for name, one in _named_sets(result):
            self._held_out(one, ("path", "split"), f"data.eval.{name}.path")
        if "mix" in result:
            place = "data.mix" if entry is None else f"{self.file}: {name}.mix"
            passed_on = {key: result.pop(key) for key in OF_PARTS if key in result and key not in ("eval", "eval_path")}
            result["mix"] = self._parts(result["mix"], passed_on, place)
            result.setdefault("path", " + ".join(result["mix"]))
        return result

    def _parts(self, mix: Any, passed_on: Values, place: str) -> dict[str, Any]:
        """The data sets of a mixture: entry, under what the mixture says for all, under what it says for the one."""
        if not isinstance(mix, Mapping) or not mix:
            raise ConfigError("the mixture is empty", where=place, fix="Write {NAME: weight, NAME: weight}.")
        parts = {}
        for name, value in mix.items():
            if isinstance(value, bool) or not isinstance(value, int | float | Mapping | None):
                raise ConfigError(f"{value!r} is no weight", where=f"{place}.{name}", fix="Write a number above 0.")
            keys = dict(value) if isinstance(value, Mapping) else {} if value is None else {"weight": value}
            path = keys.get("path", name)
            entry = self._entry(path, f"{place}.{name}") or {}
            if "mix" in entry:
                raise ConfigError(f"{path} is a mixture itself", where=f"{place}.{name}", fix="Name its data sets.")
            part = parts[str(name)] = _over(_over(entry, passed_on), {**keys, "path": entry.get("path", path)})
            if "eval" in part:
                what = "the held-out rows of a mixture are one set, and this names several"
                raise ConfigError(what, where=f"{place}.{name}.eval", fix="Write eval_path or eval_split for the part.")
        return parts

    def _held_out(self, one: dict[str, Any], keys: tuple[str, str], place: str) -> None:
        """Put path and split of an entry in place of its name."""
        key, split = keys
        entry = self._entry(one.get(key), place)
        if entry is not None and "mix" in entry:
            told, fix = f"{one[key]} is a mixture, which is not held out whole", "Name a data set."
            raise ConfigError(told, where=place, fix=fix)
        if entry is not None:
            one |= {key: entry["path"], split: one.get(split) or entry.get("split", "train")}

    def _entry(self, name: Any, place: str) -> dict[str, Any] | None:
        """An entry, judged, its places from the registry's folder; None for what is no name. ConfigError for a name
        that is not there, `place` being the key path that holds it."""
        if not isinstance(name, str) or name not in self.entries:
            self._check_absent(name, place)
            return None
        entry, where = self.entries[name], f"{self.file}: {name}"
        if name in names("dataset"):
            raise ConfigError("a registered data set has this name", where=where, fix="Give the entry another one.")
        if not isinstance(entry, Mapping):
            raise ConfigError(f"a data set is a mapping, not {entry!r}", where=where, fix="Write {path: ...}.")
        try:
            plain = {key: value for key, value in entry.items() if key != "mix"}
            DataSection.model_validate({"path": name, **plain} if "mix" in entry else plain)
        except ValidationError as error:
            raise _inside(from_validation(error, list(DataSection.model_fields)), where) from error
        except ConfigError as error:
            raise _inside(error, where) from error
        sets = {key: {**one, "path": self._placed(one["path"])} for key, one in _named_sets(entry) if "path" in one}
        placed = {key: self._placed(entry[key]) for key in ("path", "eval_path", "image_root") if entry.get(key)}
        return {**entry, **placed, **({"eval": {**entry["eval"], **sets}} if sets else {})}

    def _placed(self, path: str) -> str:
        """A path from the registry's folder, where something is there, and unlike every name in the registry."""
        near = self.file.parent / path
        if not is_file(near) and not is_folder(near):
            return path
        return f"./{near}" if str(near) in self.entries else str(near)

    def _check_absent(self, name: Any, place: str) -> None:
        known = [*self.entries, *names("dataset")]
        if not isinstance(name, str) or "/" in name or name in known or is_reference(name):
            return
        hint = nearest_hint(name, self.entries)
        if (hint or self.asked_for) and not is_file(name) and not is_folder(name):
            fix = hint or f"Data sets of {self.file}: {', '.join(known)}."
            raise ConfigError(f"there is no data set {name}", where=place, fix=fix)


def _named_sets(section: Values) -> Sequence[tuple[str, dict[str, Any]]]:
    sets = section.get("eval")
    return [(name, one) for name, one in sets.items() if isinstance(one, dict)] if isinstance(sets, Mapping) else []


def _over(below: Values, above: Values) -> dict[str, Any]:
    """Values of both, those `above` first, column by column; held-out data there takes the place of the other's."""
    dropped = set(HELD_OUT) if set(HELD_OUT) & set(above) else set[str]()
    if "eval_split" in above:
        dropped -= {"eval_path"}
    merged = {key: value for key, value in below.items() if key not in dropped} | dict(above)
    for key in ("columns", "params"):
        if isinstance(below.get(key), Mapping) and isinstance(above.get(key), Mapping):
            merged[key] = {**below[key], **above[key]}
    return merged


def _inside(error: ConfigError, where: str) -> ConfigError:
    """The error of a key of an entry, at its place in the registry."""
    return ConfigError(error.what, where=f"{where}.{(error.where or '').removeprefix('data.')}", fix=error.fix)
