"""The `speedups` key, read: `auto`, `none`, or a list of names and of mappings with a name and options.

`auto` in a list stands for all others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_autotune import registry
from grpo_autotune.errors import ConfigError
from grpo_autotune.speedups.base import SpeedUp

AUTO, NONE = "auto", "none"

Wanted = str | Sequence[str | Mapping[str, Any]]
"""Values of the key; one name stands for a list of it."""

OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "shared_prefix": {"form": ("auto", "split", "flex", "cascade"), "dropout": ("own", "shared")},
    "shared_prefill": {"decode": ("eager", "graph")},
    "merge_for_generation": {"weights": ("float32", "any")},
}
"""Speed-up -> option -> the accepted values, the default first; others have none."""


class Selection(NamedTuple):
    """A speed-up that is asked for, and the options that its class is built with."""

    name: str
    options: Mapping[str, Any] = {}


def selections(wanted: Wanted) -> list[Selection]:
    """The speed-ups that the key's value stands for, in installation order. ConfigError where a name is not known (a
    reference `package.module:Class` is), an option or its value is not, or one speed-up is asked for with two sets of
    options."""
    known = registry.names("speedup")
    items = [] if wanted == NONE else [wanted] if isinstance(wanted, str) else wanted
    asked: dict[str, Selection] = {}
    for item in (item for item in items if item != AUTO):
        selection = _selection(item, known)
        if asked.setdefault(selection.name, selection) != selection:
            fix = "Remove one of the two."
            raise ConfigError(f"{selection.name} is given twice with different options", where="speedups", fix=fix)
    if AUTO in items:
        asked = {name: Selection(name) for name in known} | asked
    return [asked[name] for name in sorted(asked, key=lambda name: known.index(name) if name in known else len(known))]


def chosen(wanted: Wanted) -> list[str]:
    """The names alone, as `selections`."""
    return [selection.name for selection in selections(wanted)]


def load(selection: Selection) -> SpeedUp:
    """The speed-up, built with its options."""
    speedup: SpeedUp = registry.resolve("speedup", selection.name)(**selection.options)
    return speedup


def _selection(item: str | Mapping[str, Any], known: Sequence[str]) -> Selection:
    options = {} if isinstance(item, str) else {key: value for key, value in item.items() if key != "name"}
    name = item if isinstance(item, str) else item.get("name")
    if name not in known and not registry.is_reference(str(name)):
        what = f"there is no speed-up {name!r}"
        fix = f"Accepted: {AUTO}, {NONE}, or a list of: {', '.join([*known, AUTO])}."
        raise ConfigError(what, where="speedups", fix=fix)
    accepted = OPTIONS.get(str(name), {})
    for key, value in options.items():
        if key not in accepted:
            fix = f"Accepted: {', '.join(accepted)}." if accepted else "It has none."
            raise ConfigError(f"{name} has no option {key!r}", where="speedups", fix=fix)
        if value not in accepted[key]:
            what = f"{key} {value!r} of {name} is not accepted"
            raise ConfigError(what, where="speedups", fix=f"Accepted: {', '.join(accepted[key])}.")
    return Selection(str(name), options)
