"""`speed_up(trainer)`: puts the speed-ups that fit on a trainer, and tells which are on and why the rest is not."""

import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from grpo_autotune import registry
from grpo_autotune.errors import ConfigError, SeamError
from grpo_autotune.hardware.versions import tell_untried, unheld
from grpo_autotune.seams.layers import INNER, OUTERMOST, AttributeSlot, Next, take_off, wrap
from grpo_autotune.seams.trainer_access import SPEED_UPS
from grpo_autotune.speedups.base import Installed, Removable, SpeedUp
from grpo_autotune.speedups.batches.groups import Groups
from grpo_autotune.speedups.conditions import MICRO_BATCH, REWARDS, foreign_callback, foreign_code, in_parts, overridden
from grpo_autotune.speedups.selection import AUTO, Selection, Wanted, load, selections

_logger = logging.getLogger("grpo_autotune.speedups")

Check = Literal["auto", "always"]
"""When whole micro steps are compared with plain TRL's: where somebody else's code takes part in them, or a version
that speed-ups were not held against, or always."""


class Row(NamedTuple):
    """One line of the table: a speed-up, whether it is on, and why not (or what it does)."""

    name: str
    on: bool
    reason: str


class SpeedUps:
    """The speed-ups of one trainer."""

    def __init__(self, trainer: Any, wanted: Sequence[Selection], check: Check = "auto") -> None:
        self._trainer, self._check = trainer, check
        self._asked_at = -1
        self._wanted = {selection.name: load(selection) for selection in wanted}
        self._installed: dict[str, Installed] = {}
        self._rows: list[Row] = []
        self._layers: list[Removable] = []
        self._put_on()
        self._start = wrap(AttributeSlot(trainer, "_inner_training_loop"), self._begin, INNER)
        setattr(trainer, SPEED_UPS, self)
        _on.add(self)

    def _put_on(self) -> None:
        names = dict.fromkeys([*registry.names("speedup"), *self._wanted])
        self._replaced = self._foreign()
        try:
            self._groups: Removable = Groups(self._trainer)
        except SeamError as error:
            self._groups, self._rows = Installed("groups"), [Row(name, False, error.what) for name in names]
            return
        try:
            for name in names:
                self._rows.append(self._take(name, self._wanted.get(name)))
        except BaseException:
            self._take_off()
            raise
        if not self._installed:
            self._groups.remove()
        self._layers = [wrap(AttributeSlot(self._trainer, "training_step"), self._step, OUTERMOST)]
        asked = self._check == "always" or unheld() or foreign_code(self._trainer) is not None
        if asked and in_parts(self._trainer) is None:
            from grpo_autotune.speedups.step_check import StepCheck

            self._layers += StepCheck(self._trainer, self._installed.values()).handles

    def _take_off(self) -> None:
        take_off(self._layers)
        for installed in reversed(list(self._installed.values())):
            installed.remove()
        self._groups.remove()

    def _begin(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        self._ask_again()
        return call_next(*args, **kwargs)

    def _step(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """With each optimizer step ask again where somebody's code may change settings and replace methods."""
        others = self._replaced != {None} or foreign_callback(self._trainer)
        if others and self._asked_at != self._trainer.state.global_step:
            self._asked_at = self._trainer.state.global_step
            self._ask_again()
        return call_next(*args, **kwargs)

    def _ask_again(self) -> None:
        """Decide anew where something was replaced or set since, and say what that turns off."""
        before = {row.name for row in self.table() if row.on}
        if self._foreign() == self._replaced and not any(self._why_not(self._wanted[name]) for name in before):
            return
        self._take_off()
        self._installed, self._rows = {}, []
        self._put_on()
        for row in self.table():
            if row.name in before and not row.on:
                _logger.warning("speed-up %s is off: %s", row.name, row.reason)

    def _foreign(self) -> set[str | None]:
        """The methods that are not TRL's, of those that a speed-up stands for or that see how rows are dealt, and the
        first of all that are on the trainer and its model."""
        stood_for = {method for speedup in self._wanted.values() for method in _stands_for(speedup)}
        methods = {*MICRO_BATCH, REWARDS, *stood_for}
        return {foreign_code(self._trainer), *(overridden(self._trainer, (method,)) for method in methods)}

    def _why_not(self, speedup: SpeedUp) -> str | None:
        return speedup.applies(self._trainer) or overridden(self._trainer, _stands_for(speedup))

    def _take(self, name: str, speedup: SpeedUp | None) -> Row:
        if speedup is None:
            return Row(name, False, "not asked for")
        if (why_not := self._why_not(speedup)) is not None:
            return Row(name, False, why_not)
        try:
            self._installed[name] = speedup.install(self._trainer)
        except SeamError as error:
            return Row(name, False, error.what)
        return Row(name, True, speedup.summary)

    def table(self) -> list[Row]:
        """Every known speed-up: on or not, and why."""
        return [self._row_as_it_is(row) for row in self._rows]

    def _row_as_it_is(self, row: Row) -> Row:
        installed = self._installed.get(row.name)
        if installed is None:
            return row
        if installed.fell_back is not None:
            return Row(row.name, False, installed.fell_back)
        return Row(row.name, True, "; ".join(filter(None, (row.reason, installed.note))))

    def lines(self) -> list[str]:
        """The table as text, a line per speed-up."""
        width = max((len(row.name) for row in self.table()), default=0)
        return [f"speed-up {row.name:<{width}}  {'on ' if row.on else 'off'}  {row.reason}" for row in self.table()]

    def facts(self) -> dict[str, dict[str, float]]:
        """Counts of each installed speed-up's work so far."""
        return {name: self.counts_of(name) for name in self._installed}

    def counts_of(self, name: str) -> dict[str, float]:
        """Counts of one speed-up's work so far; empty where it is not on."""
        return self._installed[name].facts() if name in self._installed else {}

    def remove(self) -> None:
        """Leave the trainer as it was; may be called twice."""
        self._take_off()
        self._start.remove()
        if getattr(self._trainer, SPEED_UPS, None) is self:
            delattr(self._trainer, SPEED_UPS)
        _on.discard(self)


def _stands_for(speedup: SpeedUp) -> tuple[str, ...]:
    return getattr(speedup, "stands_for", ())  # somebody's own may have none


_on: weakref.WeakSet[SpeedUps] = weakref.WeakSet()


def installed() -> list[SpeedUps]:
    """The speed-ups of every trainer of this process that has not been rid of them."""
    return list(_on)


def speed_up(trainer: Any, names: Wanted = AUTO, *, check: Check = "auto") -> SpeedUps:
    """Make the steps of `trainer` faster without changing what is learned.

    Args:
        trainer: A `trl.GRPOTrainer` that has not begun to train.
        names: `auto` for all that fit, `none`, a name, or a list of names and of mappings with a name and options, such
            as `{"name": "shared_prefix", "form": "flex"}`.
        check: `auto` compares loss and gradients of a micro step with plain TRL's, on the first batch of each kind,
            where somebody else's code is on the trainer or its model, or speed-ups were not held against the installed
            versions; `always` on every trainer.

    Returns:
        What was put on: `table()` tells what is on and why the rest is not, `facts()` what it did, `remove()` takes
        it off again.

    Raises:
        ConfigError: An unknown name or option, not a `GRPOTrainer`, installed already, or training has begun."""
    from trl import GRPOTrainer

    wanted = selections(names)
    tell_untried()
    if not isinstance(trainer, GRPOTrainer):
        raise ConfigError(f"speed_up() takes a trl.GRPOTrainer, got {type(trainer).__name__}")
    if hasattr(trainer, SPEED_UPS):
        fix = "Call remove() on what the first call returned."
        raise ConfigError("speed_up() was called on this trainer before", fix=fix)
    if trainer.is_in_train or trainer._step > 0:
        raise ConfigError("speed_up() was called after training began", fix="Call it before trainer.train().")
    return SpeedUps(trainer, wanted, check)
