"""torchvision beside a torch it was not built for: its Python half works, once two operator schemas exist.

A torchvision wheel built for CUDA cannot load its C library beside a CPU build of torch (or another release of it).
Its `_meta_registrations.py` then registers fake kernels for `torchvision::nms` and `torchvision::qnms` without asking
whether the operators exist, and `import torchvision` dies; with it die transformers' image processors, TRL's trainers
and vLLM. None of them calls the two operators: declaring the schemas lets the import through, and a call still fails
with torch's own message. In such an environment torchaudio and torchcodec are usually in the same state, and
transformers and vLLM import them wherever they are installed; nothing here reads sound or video, so they are hidden.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from grpo_autotune.console import is_first_rank
from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.files import cache_dir, write_whole

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""As torchvision's C library declares them (`torchvision/csrc/ops`)."""

SIBLINGS = ("torchaudio", "torchcodec")
"""Hidden, when torchvision had to be mended and their own C library cannot load beside this torch either."""

REMEDY = "install the torchvision build that belongs to your torch (same release, same CPU or CUDA index)"

_kept: list[Any] = []
"""The library object: torch forgets the schemas when it is collected."""

_hidden: list[str] = []


def ensure_torchvision() -> str | None:
    """Make `import torchvision` work in this process; to be called before transformers, TRL or vLLM are imported.
    Answers None where nothing was wrong, else one line saying what was found and done about it.

    Does nothing where torchvision is absent (transformers has its own message for that) or imports as it is. Where it
    had to be mended, `SIBLINGS` that cannot load are made to look absent. May be called again, and after an import of
    torchvision failed."""
    if _kept:
        return _mended_line()
    if not (_installed("torch") and _installed("torchvision")):
        return None
    error = _import_error("torchvision")
    if error is not None and _is_missing_schema(error):
        _declare_schemas()
        error = _import_error("torchvision")
        if error is None:
            _hidden.extend(name for name in SIBLINGS if _hide_if_broken(name))
            return _mended_line()
    if error is None:
        return None
    return f"torchvision cannot be imported beside this torch ({' '.join(str(error).split())}): {REMEDY}"


def import_mended(execute: Callable[[ModuleType], None], module: ModuleType) -> str | None:
    """Run the body of torchvision's import (`execute` is the loader's `exec_module`), and once more with the schemas
    declared where it fails for want of them. Answers as `ensure_torchvision`."""
    try:
        execute(module)
    except RuntimeError as error:
        if _kept or not _is_missing_schema(error):
            raise
        _forget_submodules(module.__name__)
        _declare_schemas()
        execute(module)
        _hidden.extend(name for name in SIBLINGS if _hide_if_broken(name))
        return _mended_line()
    return None


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _import_error(package: str) -> Exception | None:
    """Import `package` afresh unless it is already whole; the error it raised, if any."""
    if package not in sys.modules:
        _forget_submodules(package)
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return error
    return None


def _forget_submodules(package: str) -> None:
    """Drop what a failed import left: Python removes only the package, whose next import then lacks attributes."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]


def _hide_if_broken(package: str) -> bool:
    """Make an installed package that cannot be imported look absent to `find_spec` and `import`; whether it was one."""
    if not _installed(package) or _import_error(package) is None:
        return False
    _forget_submodules(package)
    sys.modules[package] = None  # type: ignore[assignment]  # Python's own way to say "not there"
    return True


def _is_missing_schema(error: Exception) -> bool:
    message = str(error)
    return isinstance(error, RuntimeError) and "operator torchvision::" in message and "does not exist" in message


def _declare_schemas() -> None:
    """Declare both operators; a fragment, so that it does not claim the whole name space."""
    import torch

    open_library: Any = torch.library.Library  # untyped in torch
    library = open_library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _kept.append(library)


def _mended_line() -> str:
    hidden = f", hid {' and '.join(_hidden)} (they cannot load either)" if _hidden else ""
    return (
        "torchvision's C operators cannot load beside this torch ('operator torchvision::nms does not exist'): "
        f"declared the two schemas its import needs{hidden}; box operators stay unusable. To mend it, {REMEDY}"
    )


def tell_once(finding: str, say: Callable[[str], None]) -> None:
    """Say a finding about the installed packages, unless this environment was told before: the cache folder remembers
    it under the text, the versions and the folder of Python."""
    if not is_first_rank():
        return
    facts = [finding, sys.prefix, *(_version(package) for package in ("torch", "torchvision"))]
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    with suppress(OSError, EnvironmentProblem):  # a cache that cannot be read or written is no reason to end a run
        told = cache_dir("notes") / name
        if told.exists():
            return
        write_whole(told, finding)
    say(f"note: {finding}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
