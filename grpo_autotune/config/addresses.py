"""Addresses of endpoints and names of variables with their keys: a configuration, which run folders keep, has none."""

import re
from urllib.parse import parse_qsl, urlsplit

from grpo_autotune.errors import ConfigError

VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
"""Name of an environment variable. Keys hold small letters or hyphens: none passes for a name, to be repeated."""
KEY_NAME = re.compile(r"(?i)key|token|secret|sig|auth|passw|cookie")
"""Names of headers, and of parameters of an address, that hold a key."""


def check_address(url: str, where: str, key: str) -> None:
    """Refuse an address that is none or holds a key, which `key` has room for; nothing that may be one is repeated."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if "@" in parts.netloc or any(KEY_NAME.search(name) for name, _ in parse_qsl(parts.query)):
        fix = f"Put it into an environment variable, and name that in {key}."
        raise ConfigError("the address holds a key, which run folders would repeat", where=where, fix=fix)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("this is no address", where=where, fix="Write https://HOST/PATH.")


def check_variable(name: str, where: str) -> None:
    """Refuse what is no name of an environment variable: it may be the key."""
    if not VARIABLE.fullmatch(name):
        fix = "Write the name of an environment variable in capitals, such as OPENAI_API_KEY, and put the key into it."
        raise ConfigError("this is no name of a variable", where=where, fix=fix)
