"""Files as text, those that another one names, and YAML and JSON as settings with their lines, with Hydra's `defaults`
beside the file and OmegaConf's interpolations."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.source import Setting

MOST_BYTES = 20_000_000
SUBSTITUTION = re.compile(r"(\$\((?:[^()]|\([^()]*\))*\)|\$\{?\w+\}?)/?")  # known when a script runs


def beside(path: Path, named: str) -> Path | None:
    """The file that `path` means by `named`: that, or its last parts in the folder of `path` or one above; or None."""
    known = SUBSTITUTION.sub("", named)
    parts = PurePosixPath(known).parts
    folders = [path.absolute().parent, *path.absolute().parents[1:5]]
    ends = [Path(*parts[start:]) for start in range(len(parts))]
    candidates = [Path(known).expanduser(), *(folder / end for end in ends for folder in folders)]
    try:
        return next((file for file in candidates if file.is_file()), None)
    except (OSError, ValueError):  # no name of a file
        return None


def text_of(path: Path) -> str:
    """The text of a configuration. ConfigError for a file that is missing, empty, huge, or no text."""
    if path.is_dir():
        raise ConfigError("this is a folder", where=str(path), fix="Name the file in it.")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"more than {MOST_BYTES // 10**6} MB: no configuration is that long", where=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ConfigError("this is no text, but a program or data", where=str(path))
    if not text.strip():
        raise ConfigError("the file is empty", where=str(path))
    return text.replace("\r\n", "\n")


MOST_SETTINGS = 20_000
INTERPOLATION = re.compile(r"\$\{([^${}]+)\}")


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: `1e-6` is a number."""


FLOAT = r"^(?:[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.nan)$"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(FLOAT), list("-+0123456789."))


def yaml_settings(text: str, name: str, opened: Collection[str] | None = None) -> dict[str, Setting]:
    """Settings of a YAML or JSON text, names joined by dots; with `opened`, those of other mappings stay in them as
    values. A later document's win. ConfigError, `name` and line named, for a text that cannot be read."""
    loader = _Loader(text.replace("\t", " ") if text.lstrip().startswith("{") else text)
    settings: dict[str, Setting] = {}
    try:
        while loader.check_node():
            node = loader.get_node()
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError("this holds no settings (no mapping of keys to values)", where=name)
            settings |= dict(islice(_leaves(loader, node, "", opened), MOST_SETTINGS))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = name if mark is None else f"{name}, line {mark.line + 1}"
        raise ConfigError(f"this YAML cannot be read: {getattr(error, 'problem', error)}", where=where) from None
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"this YAML cannot be read: {error}", where=name) from None
    return settings


def _leaves(
    loader: _Loader, node: yaml.MappingNode, prefix: str, opened: Collection[str] | None
) -> Iterator[tuple[str, Setting]]:
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value if isinstance(key_node, yaml.ScalarNode) else '?'}"
        if (opened is None or key in opened) and isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _leaves(loader, value_node, f"{key}.", opened)
        else:
            yield key, Setting(loader.construct_object(value_node, deep=True), key_node.start_mark.line + 1)


def with_defaults(settings: dict[str, Setting], path: Path, within: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """Settings over those of the files of Hydra's `defaults` list that lie beside `path`."""
    listed = settings.pop("defaults", None)
    base: dict[str, Setting] = {}
    for entry in listed.value if listed is not None and isinstance(listed.value, list) else ():
        group, name = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        group, _, package = str(group).removeprefix("override ").removeprefix("optional ").partition("@")
        if name == "_self_" or not isinstance(name, str):
            continue
        file = path.parent / group / f"{name.removesuffix('.yaml')}.yaml"
        if not file.is_file() or file in (path, *within):
            continue
        inner = with_defaults(yaml_settings(text_of(file), file.name), file, (path, *within))
        place = package or group.replace("/", ".")
        prefix = "" if place in ("", "_global_", "_here_") else f"{place}."
        base |= {f"{prefix}{key}": replace(setting, file=setting.file or file.name) for key, setting in inner.items()}
    return base | settings


def resolved(settings: Mapping[str, Setting], environment: Mapping[str, str]) -> dict[str, Setting]:
    """Settings with OmegaConf's interpolations put in (`${a.b}`, `oc.env`, `oc.select`) where the file has them."""
    if not any("${" in str(setting.value) for setting in settings.values()):
        return dict(settings)
    return {key: _resolved(key, setting, settings, environment) for key, setting in settings.items()}


def _resolved(
    key: str, setting: Setting, settings: Mapping[str, Setting], environment: Mapping[str, str], depth: int = 0
) -> Setting:
    value = setting.value
    if not isinstance(value, str) or "${" not in value or depth > 20:
        return setting

    def answer(match: re.Match[str]) -> Any:
        name = match[1].strip()
        resolver, _, rest = name.partition(":")
        default: Any = match[0]
        if resolver in ("oc.env", "oc.select"):
            name, comma, text = (part.strip() for part in rest.partition(","))
            default = yaml.load(text, _Loader) if comma else match[0]
        if resolver == "oc.env":
            return yaml.load(environment[name], _Loader) if name in environment else default
        up = len(name) - len(name.lstrip("."))
        place = ".".join([*key.split(".")[:-up], name.lstrip(".")]) if up else name
        if place not in settings:
            return match[0] if any(key.startswith(f"{place}.") for key in settings) else default
        return _resolved(place, settings[place], settings, environment, depth + 1).value

    whole = INTERPOLATION.fullmatch(value)
    value = answer(whole) if whole else INTERPOLATION.sub(lambda match: str(answer(match)), value)
    return replace(setting, value=value, text=setting.text or setting.value)
