"""The shape of the `speedups` key; its names and options are judged where the speed-ups are known."""

from typing import Any

from grpo_autotune.config.foreign_keys import wrong_type

SpeedUps = str | list[str | dict[str, Any]]

ACCEPTED = "auto, none, or a list of names and of mappings with a name and options"


def check_speedups(value: Any) -> Any:
    """The value as it is; ConfigError if it is none of `ACCEPTED`."""
    items = value if isinstance(value, list) else None
    named = items is not None and all(
        isinstance(item, str) or (isinstance(item, dict) and isinstance(item.get("name"), str)) for item in items
    )
    if not named and not (isinstance(value, str) and value in ("auto", "none")):
        raise wrong_type("speedups", value, ACCEPTED)
    return value
