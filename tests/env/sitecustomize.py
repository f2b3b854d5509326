"""What vLLM's CPU build needs before TRL can train with it, in every Python process of the vLLM tests, children too.

Python runs this file at start-up where its folder is on PYTHONPATH (`make test-vllm` puts it there). It says which
engine is wanted (below), and mends two things, each as soon as the module concerned has been imported:

* torchvision beside a torch it was not built for, in the child processes in which vLLM looks at model classes;
* vLLM packs linear weights on CPU into a layout of their own and drops the plain ones, so TRL's in-place push of
  trained weights fails ('Parameter' object has no attribute 'weight_loader'). With packing off the weights stay where
  the push expects them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # TRL pushes weights into the engine of its own process
    "VLLM_USE_AOT_COMPILE": "0",  # with the next: eager, since compiling a two-layer model takes longer than the tests
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def _mend_torchvision(_: ModuleType) -> None:
    from grpo_autotune.seams.torchvision_compat import ensure_torchvision

    ensure_torchvision()


def _no_onednn_packing(custom_ops: ModuleType) -> None:
    custom_ops._supports_onednn = False


def _no_sgl_packing(layer_utils: ModuleType) -> None:
    layer_utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "torch": _mend_torchvision,
    "vllm._custom_ops": _no_onednn_packing,
    "vllm.model_executor.layers.utils": _no_sgl_packing,
}


class AfterImport:
    """A finder that finds what Python's own finds, and runs a function once the module's code has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in AFTER_IMPORT:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            AFTER_IMPORT[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


for key, value in ENGINE.items():
    if not os.environ.setdefault(key, value):  # a test that gives it no value wants it away
        del os.environ[key]
sys.meta_path.insert(0, AfterImport())
