"""Names of ms-swift that a reward plugin imports, where ms-swift is not installed: its base classes and registries.

Anything else of `swift` can be named, subclassed and filled, so that a plugin with schedulers or environments beside
its rewards is imported, and refuses to be called.
"""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from grpo_autotune.errors import ConfigError


class ORM:
    """Base of rewards, sync and async ones."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args


ORMS: dict[str, Any] = {}  # rewards that plugins have registered, by name
KNOWN = {"ORM": ORM, "AsyncORM": ORM, "orms": ORMS, "get_logger": lambda *name, **how: logging.getLogger("swift")}


def provide_swift() -> None:
    """Make `import swift` possible in this process, where ms-swift is not installed."""
    if "swift" not in sys.modules and importlib.util.find_spec("swift") is None:
        sys.meta_path.append(_Finder())


class _Absent(dict[Any, Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        what = f"a plugin calls {type(self).__name__} of ms-swift, of which only the base of rewards is here"
        fix = "Install ms-swift, or put the reward into a file of its own."
        raise ConfigError(what, where="rewards", fix=fix)

    __call__ = __init__


class _Swift(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        absent: Any = type(name, (_Absent,), {})
        return KNOWN[name] if name in KNOWN else (absent if name[0].isupper() else absent.__new__(absent))


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "swift" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Swift(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None
