"""Ranks in step: where weights or gradients lie in parts, all ranks must run the same modules in the same order.

Each forward of a sharded module (ZeRO-3, FSDP2) gathers its weights from all ranks, and each backward pass adds up
gradients of all: a rank that left one out would leave the others waiting. So whatever a rank decides by its own rows is
agreed first, in one small collective; ranks that share nothing agree with themselves. An error can end a pass on one
rank alone, while others wait in the middle of it: it is told past the collectives, by the store at `MASTER_ADDR` that
launchers set up for `torch.distributed` (torchrun's agent, or rank 0 itself).
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

from grpo_autotune.errors import TrainingError

WAIT_S = 30.0
"""Seconds that a rank whose pass ended by an error waits for the end of it on the others, at least."""
PASSES = 3.0
"""And at least as many times what the longest pass took."""
CONNECT_S = 120.0


class _Passes(threading.local):
    """Numbers of passes, which are the same on all ranks: `3.0` is the first one within the fourth."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._levels = [("", itertools.count())]

    @contextmanager
    def numbered(self) -> Iterator[str]:
        outer, numbers = self._levels[-1]
        number, begin = f"{outer}{next(numbers)}", time.monotonic()
        self._levels.append((f"{number}.", itertools.count()))
        try:
            yield number
        finally:
            self._levels.pop()
            self.longest_s = max(self.longest_s, time.monotonic() - begin)


_passes = _Passes()


def sharded(trainer: Any) -> bool:
    """True if no rank has the whole of the weights."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    in_parts = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    return bool(in_parts and trainer.accelerator.num_processes > 1)


def forward_in_step(trainer: Any) -> bool:
    """True while a module's forward waits for other ranks: not where TRL has gathered all weights of ZeRO-3 to generate
    (`trl.models.utils.remove_hooks`)."""
    optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    hooks = getattr(getattr(optimizer, "parameter_offload", optimizer), "forward_hooks", None)
    return sharded(trainer) and (trainer.is_fsdp_enabled or hooks != [])


def backward_in_step(trainer: Any) -> bool:
    """True if each backward pass waits for other ranks: DDP alone lets all but the last of a step go by."""
    several = trainer.accelerator.num_processes > 1
    return bool(several and (trainer.is_fsdp_enabled or trainer.accelerator.state.deepspeed_plugin is not None))


def syncs_each_pass(accelerator: Any) -> bool:
    """True where ranks in step add up gradients in each backward pass, and not in the last of a step alone."""
    each = accelerator.is_fsdp2 and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    return bool(each or accelerator.state.deepspeed_plugin is not None)


def most(numbers: Sequence[int], trainer: Any, in_step: bool) -> list[int]:
    """The largest of each number over all ranks, which must all ask; this rank's own where they are not `in_step`."""
    if not in_step:
        return list(numbers)
    import torch

    told = torch.tensor(numbers, dtype=torch.long, device=trainer.accelerator.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return [int(number) for number in told.tolist()]


class InStep:
    """The ranks of a trainer, which agree while they are in step (`when`)."""

    def __init__(self, trainer: Any, when: Callable[[Any], bool] = forward_in_step) -> None:
        self._trainer, self._when = trainer, when

    def any(self, flag: bool) -> bool:
        """True on all ranks where `flag` is true on one of them, as `most`."""
        return bool(most([flag], self._trainer, self._when(self._trainer))[0])

    def passing(self) -> AbstractContextManager[None]:
        """`passing` of this trainer."""
        return passing(self._trainer) if self._when(self._trainer) else nullcontext()


@contextmanager
def passing(trainer: Any) -> Iterator[None]:
    """A pass that all ranks compute, and that an error ends on all of them or on none.

    One that not all share is a TrainingError, which ends the run, where others may wait in the middle of the pass: they
    do not come to its end in time (`WAIT_S`), or hold parts of the weights. Memory that ran out stays an error of its
    own."""
    try:
        with _passes.numbered() as number:
            yield
    except TrainingError:
        raise  # it ends the run
    except Exception as error:
        _tell(trainer, number, error)
        raise
    _tell(trainer, number, None)


def _tell(trainer: Any, number: str, error: Exception | None) -> None:
    """Tell the others how a pass ended here, and raise what holds for all; nothing where no launcher set up a store."""
    from torch import OutOfMemoryError
    from torch.distributed import DistError

    ranks = range(trainer.accelerator.num_processes)
    if len(ranks) == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    what = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:200]
    try:
        ended = _exchanged(trainer, number, what, isinstance(error, OutOfMemoryError))
    except DistError as problem:
        if error is not None:
            return  # its own, which is raised, says more
        told = f"ranks cannot tell each other how a pass ended: {' '.join(str(problem).split())[:200]}"
        raise TrainingError(
            told, where="MASTER_ADDR", fix="Another rank may have ended: see its messages."
        ) from problem
    rank, what = next(((rank, what) for rank, what in ended.items() if what), (0, ""))
    if not what:
        return
    memory = what.startswith(OutOfMemoryError.__name__)
    if len(ended) < len(ranks) or (sharded(trainer) and not memory and "" in ended.values()):
        alone = f"rank {rank} failed alone where ranks wait for each other: {what}"
        fix = "Leave out the speed-up that fails, or take speedups: none."
        raise TrainingError(alone, where="speedups", fix=fix) from error
    if error is None:
        raise (OutOfMemoryError if memory else RuntimeError)(f"rank {rank}: {what}")


def _exchanged(trainer: Any, number: str, what: str, memory: bool) -> dict[int, str]:
    """The error of each rank that came to the end of a pass, "" for none; nothing where memory ran out and ranks hold
    parts of the weights: nobody goes on from it."""
    from torch.distributed import DistStoreError

    store, keys = store_of("passes"), [f"{number} {rank}" for rank in range(trainer.accelerator.num_processes)]
    store.set(keys[trainer.accelerator.process_index], what)
    if memory and sharded(trainer):
        return {}
    patience = max(WAIT_S, PASSES * _passes.longest_s) if what else trainer.args.ddp_timeout
    with suppress(DistStoreError):
        store.wait(keys, timedelta(seconds=patience))
    return {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}


def store_of(name: str) -> Any:
    """The store in which ranks tell each other something, under a name, since they were started."""
    import torch.distributed

    stores: Any = torch.distributed
    place, wait = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=CONNECT_S)
    store = stores.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=wait)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's agent keeps its store
    return stores.PrefixStore(f"grpo_autotune/{name}/{start}", store)
