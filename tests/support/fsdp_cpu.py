"""FSDP2 on processes without an accelerator, for tests alone.

accelerate turns FSDP on for accelerators only: CPU processes stay plain DDP, whatever they are told. Here its state
says FSDP for them as well, so that its own `fsdp2_prepare_model` and torch's `fully_shard` run, on gloo.

`torchrun ... -m tests.support.fsdp_cpu MODULE ARGS...` runs a module so: `grpo_autotune train X.yaml`, for one. In a
script of a test: `allow()` once, before the first trainer; trainers with and without FSDP may follow each other.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def allow() -> None:
    """Have accelerate shard CPU processes that ask for it, in this process, from here on."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    build = Accelerator.__init__
    begin = AcceleratorState.__init__

    def state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        known = self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP)
        if not (known and kwargs.get("_from_accelerator")):
            return
        kind = DistributedType.MULTI_CPU if fsdp_plugin is None else DistributedType.FSDP
        self._shared_state["fsdp_plugin"] = fsdp_plugin
        self._shared_state["distributed_type"] = PartialState._shared_state["distributed_type"] = kind
        if fsdp_plugin is not None and fsdp_plugin.cpu_offload:
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which needs an accelerator
        if fsdp_plugin is not None and self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

    def accelerator(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        if fsdp_plugin is None and not os.environ.get("TEST_LAUNCHED_WITH_FSDP"):
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate left it there for an earlier trainer
        build(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = state
    Accelerator.__init__ = accelerator


def whole(tensor: Any) -> Any:
    """A copy of a weight or gradient in one piece, on every process; all processes must call it."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        os.environ["TEST_LAUNCHED_WITH_FSDP"] = "1"
    allow()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
