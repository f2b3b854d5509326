"""Places that a configuration names, data and model: what the file system tells of them before a library reads them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_autotune.config.foreign_keys import peft_keys
from grpo_autotune.errors import ConfigError, DataError, nearest_hint
from grpo_autotune.files import is_file, is_folder, read_mapping
from grpo_autotune.registry import is_reference, names, source_of

ADAPTER = "adapter_config.json"
"""File in which PEFT describes an adapter."""
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
MOST_OF_HUB_ID = 96
"""Characters of a repository's name on the hub (`validate_repo_id` in huggingface_hub)."""
SPLIT = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?:\[.*\])?")
"""A part of `datasets`' split notation, parts being joined by `+`."""


def check_data_place(
    path: str, *, name: str | None, revision: str | None, params: Mapping[str, Any] | None, where: str
) -> None:
    """Refuse a data set that is not there, or that cannot have the keys of the `data` section it is given
    (ConfigError), or that is an empty file (DataError); `where` is the key path of `path`."""
    place = Path(path)
    hub_only = next((key for key, value in (("revision", revision), ("name", name)) if value is not None), None)
    if path in names("dataset") or is_reference(path):
        if hub_only:
            raise _hub_only(hub_only, f"{path} is a registered function")
        source_of("dataset", path)
        return
    if params:
        raise ConfigError("params are for a registered data-set function", where="data.params", fix="Remove them.")
    saved = any(is_file(place / name) for name in ("dataset_dict.json", "dataset_info.json"))
    if hub_only and (is_file(path) or saved or (is_folder(path) and hub_only == "revision")):
        raise _hub_only(hub_only, f"{path} is on this machine")
    if is_file(path):
        _check_file(place.expanduser(), where)
    elif not is_folder(path):
        if not HUB_ID.fullmatch(path) or len(path) > MOST_OF_HUB_ID or place.suffix.lower() in FILE_BUILDERS:
            raise ConfigError(f"there is no file or folder {path}", where=where, fix=f"Paths start from {Path.cwd()}.")
        if "/" not in path and (hint := nearest_hint(path, names("dataset"))):
            raise ConfigError(f"there is no data set {path}", where=where, fix=hint)


def check_split(path: str, split: str | None, where: str) -> None:
    """ConfigError for a split that a file, a saved data set or the demo's digits has not; others cannot be asked."""
    splits = _splits(path)
    for part in (split or "").split("+") if splits else ():
        match = SPLIT.fullmatch(part.strip())
        if match is not None and match["name"] not in (*splits, "all"):
            raise ConfigError(
                f"{path} has no split {match['name']}", where=where, fix=f"Splits there: {', '.join(splits)}."
            )


def check_model_place(name: str) -> None:
    """ConfigError for a path at which there is no folder, or an adapter alone; a registered name and a hub id pass."""
    adapter = Path(name) / ADAPTER
    if is_file(adapter) and not is_file(adapter.with_name("config.json")):
        base = trained_adapter(name).get("base_model_name_or_path") or "its base model"
        fix = f"Write {base}; to go on from this adapter, write model.adapter: {name} beside it."
        raise ConfigError(f"{name} holds an adapter of {base}, and no model", where="model.name_or_path", fix=fix)
    if name in names("model") or is_reference(name) or is_folder(name):
        return
    if is_file(name) or len(name) > MOST_OF_HUB_ID or not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{name} is not a folder with a model",
            where="model.name_or_path",
            fix="Give a folder that holds config.json, the id of a hub repository (owner/name), or a registered model: "
            + ", ".join(names("model")),
        )


def trained_adapter(folder: str) -> dict[str, Any]:
    """The configuration that PEFT saved with the adapter in `folder`; empty where none can be read."""
    return read_mapping(Path(folder).expanduser() / ADAPTER) or {}


def check_same_adapter(peft: Mapping[str, Any] | None, folder: str) -> None:
    """ConfigError where there is no adapter in `folder`, or a `peft` section asks for another one than is there."""
    adapter = trained_adapter(folder)
    if not adapter:
        fix = "Give a folder that holds one, such as RUN_DIR/model."
        raise ConfigError(f"there is no {ADAPTER} in {folder}", where="model.adapter", fix=fix)
    for name, asked in (peft or {}).items():
        has = adapter.get(name, peft_keys()[name].default_value())
        if not (_comparable(asked) == _comparable(has) or asked == "all-linear"):  # PEFT saves the names it stood for
            what = f"the adapter to go on from has {has}, and this is {asked}"
            raise ConfigError(what, where=f"peft.{name}", fix="Remove the peft section: the adapter brings its own.")


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _splits(path: str) -> Sequence[str]:
    """Names of the splits at a place; none where only a library can tell."""
    place, whole = Path(path), Path(path) / "dataset_dict.json"
    if path == "digits":
        return ("train", "test")
    if is_file(whole):  # `datasets` will say what is wrong with it
        splits = (read_mapping(whole.expanduser()) or {}).get("splits")
        return tuple(map(str, splits)) if isinstance(splits, list) else ()
    return ("train",) if is_file(place) or is_file(place / "state.json") else ()


def _check_file(place: Path, where: str) -> None:
    if place.suffix.lower() not in FILE_BUILDERS:
        fix = f"Accepted: {', '.join(FILE_BUILDERS)}."
        raise ConfigError(f"a file ending in {place.suffix or 'nothing'} cannot be read", where=where, fix=fix)
    if place.stat().st_size == 0:
        raise DataError("the file is empty", where=str(place))


def _hub_only(key: str, reason: str) -> ConfigError:
    return ConfigError(
        f"only a data set on the hub has a {key}, and {reason}", where=f"data.{key}", fix=f"Remove data.{key}."
    )
