"""Speed-ups that are wrong on purpose, for the checks that must find them."""

from __future__ import annotations

import os
from typing import Any

from grpo_autotune.seams.layers import INNER
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.speedups.base import Installed

WRONG, FAILING, ALONE = (f"{__name__}:{name}" for name in ("Wrong", "Failing", "Alone"))
EARLY = f"{__name__}:Early"


class Wrong:
    """A speed-up that is one part in a hundred off, and checks nothing itself."""

    name, summary, stands_for = WRONG, "is off", ()

    def applies(self, trainer: Any) -> None:
        return None

    def install(self, trainer: Any) -> Installed:
        installed = Installed(self.name)

        def loss(call_next: Any, *args: Any, **kwargs: Any) -> Any:
            return call_next(*args, **kwargs) * (1.0 if installed.fell_back else 1.01)

        installed.handles += wrap_rows(trainer, [(find("loss"), loss)], INNER)
        return installed


class Failing(Wrong):
    """A speed-up whose backward pass ends with an error, near its end."""

    name, early = FAILING, False
    on: tuple[str, ...] = ("0", "1")

    def install(self, trainer: Any) -> Installed:
        installed = Installed(self.name)

        def fails(gradient: Any) -> None:
            if not installed.fell_back and os.environ.get("RANK", "0") in self.on:
                raise ValueError("no gradient")

        def seen(module: Any, inputs: Any, hidden: Any) -> None:
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if hidden.requires_grad and self.early:
                fails(hidden)
            elif hidden.requires_grad:
                hidden.register_hook(fails)

        layer = next(one for name, one in trainer.model.named_modules() if name.endswith("layers.0"))
        installed.handles.append(layer.register_forward_hook(seen))
        return installed


class Alone(Failing):
    """The same on the second rank alone."""

    name, on = ALONE, ("1",)


class Early(Alone):
    """The same in its forward pass."""

    name, early = EARLY, True
