"""torchvision beside a torch it was not built for: its Python half works, once two operator schemas exist.

A torchvision wheel built for CUDA cannot load its C library beside a CPU build of torch (or another release of it).
Its `_meta_registrations.py` then registers fake kernels for `torchvision::nms` and `torchvision::qnms` without asking
whether the operators exist, and `import torchvision` dies; with it die transformers' image processors, TRL's trainers
and vLLM. None of them calls the two operators: declaring the schemas lets the import through, and a call still fails
with torch's own message.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""As torchvision declares them (torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp)."""

REMEDY = "install the torchvision build that belongs to your torch (same release, same CPU or CUDA index)"

_kept: list[Any] = []
"""The library object: torch forgets the schemas when it is collected."""


def ensure_torchvision() -> str | None:
    """Make `import torchvision` work in this process; to be called before transformers, TRL or vLLM are imported.

    Does nothing where torchvision is absent (transformers has its own message for that) or imports as it is. May be
    called again, and after an import of torchvision failed.

    Returns:
        None where nothing was wrong, else one line saying what was found and done about it.
    """
    if _kept:
        return _declared_line()
    if importlib.util.find_spec("torch") is None or not _installed():
        return None
    error = _import_error()
    if error is None:
        return None
    if not _is_missing_schema(error):
        return f"torchvision cannot be imported beside this torch ({_first_line(error)}): {REMEDY}"
    _declare_schemas()
    error = _import_error()
    if error is not None:
        return f"torchvision cannot be imported beside this torch ({_first_line(error)}): {REMEDY}"
    return _declared_line()


def _installed() -> bool:
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"] is not None
    return importlib.util.find_spec("torchvision") is not None


def _import_error() -> Exception | None:
    """Import torchvision afresh unless it is already whole; the error it raised, if any."""
    if "torchvision" not in sys.modules:
        _forget_submodules()
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return error
    return None


def _forget_submodules() -> None:
    """Drop what a failed import left: Python removes only the package, whose next import then lacks attributes."""
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]


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


def _declared_line() -> str:
    return (
        "torchvision's C operators cannot load beside this torch ('operator torchvision::nms does not exist'); "
        f"declared the two schemas its import needs, box operators stay unusable: {REMEDY}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
