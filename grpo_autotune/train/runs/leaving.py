"""Ranks that begin anew together: one ran out of memory, and the others wait for it in a collective that never ends.

They tell each other past their collectives, by the launcher's store. No rank goes before all have said that they will:
the first to close its connections would be an error in the others. The store keeps the addresses of the old processes,
so that the new ones meet at another port, where rank 0 serves it.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistStoreError

from grpo_autotune.config.batch import world_size
from grpo_autotune.processes.fresh import free_port
from grpo_autotune.seams.ranks import store_of

LOOK_S = 0.5
WAIT_S = 120.0
"""Seconds that ranks have to answer: one may be in a call that no thread interrupts."""


class Ranks:
    """This rank among `WORLD_SIZE`; `leave` gets the variables by which the new processes meet, and does not return.

    A thread waits for another rank to call, and leaves from there: the main thread may be in a collective."""

    def __init__(self, leave: Callable[[Mapping[str, str]], object]) -> None:
        self._rank, self._world, self._leave = int(os.environ["RANK"]), world_size(), leave
        self._over, self._leaves = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="grpo-autotune-ranks", daemon=True)
        self._thread.start()

    def claim(self) -> bool:
        """True for the first rank that ran out of memory: it decides, and calls the others."""
        return bool(store_of("leaving").compare_set("first", "", str(self._rank)) == str(self._rank).encode())

    def call(self) -> None:
        """Tell all ranks that it is decided."""
        store_of("leaving").set("decided", "1")

    def wait(self) -> None:
        """Wait until this rank leaves with the others; returns only where one of them does not answer."""
        self._thread.join()

    def close(self) -> None:
        """End the thread; where it is leaving, as `wait`."""
        self._over.set()
        self._thread.join(None if self._leaves else 2 * LOOK_S)  # it may wait for a store that never comes

    def _watch(self) -> None:
        with suppress(DistError):  # the store ended with the rank that serves it
            store = store_of("leaving")
            while not self._over.wait(LOOK_S):
                if store.check(["decided"]):
                    self._leaves = True
                    self._leave(self._meeting(store))

    def _meeting(self, store: Any) -> dict[str, str]:
        """Agree on where the new processes meet; `DistStoreError` where a rank does not answer."""
        store.add("ready", 1)
        if self._rank == 0:
            self._all(store, "ready")
            store.set("port", str(free_port()))
        store.wait(["port"], timedelta(seconds=WAIT_S))
        port = store.get("port").decode()
        store.add("gone", 1)
        if self._rank == 0:  # which may serve the store
            self._all(store, "gone")
        return {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}

    def _all(self, store: Any, key: str) -> None:
        until = time.monotonic() + WAIT_S
        while store.add(key, 0) < self._world:
            if time.monotonic() > until:
                raise DistStoreError(f"not all ranks are {key}")
            time.sleep(LOOK_S / 10)
