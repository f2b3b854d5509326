"""The group of each row of a batch, the completions of one prompt: carried in the batch, never guessed from ids.

Two images of one size with one question have the same prompt ids and grids, so that ids cannot tell two prompts apart.
TRL lays a generation batch out as G neighbouring rows a prompt, over all processes (`RepeatSampler`; its advantages
rely on the same). A `group_id` put into the generation batch goes through TRL's shuffle and split as any other column.

B: rows of this process.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER, Next, take_off
from grpo_autotune.seams.table import wrap_seams

KEY = "group_id"

KNOWN = "rows_known"
"""Column, on the CPU, with what the host has to know of rows and would have to wait for a device to tell; whoever
changes a row's masks drops it."""

_ATTRIBUTE = "_grpo_autotune_groups"


class Groups:
    """Puts `group_id` into every generation batch of a trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.current: torch.Tensor | None = None  # group of each row under way in TRL's scoring or loss, (B,), if known
        self.known: torch.Tensor | None = None  # the column `KNOWN` of the rows under way in TRL's loss, where it is
        self._handles = wrap_seams(trainer, INNER, score=self._score, loss=self._loss)
        setattr(trainer, _ATTRIBUTE, self)

    def remove(self) -> None:
        take_off(self._handles)
        if getattr(self.trainer, _ATTRIBUTE, None) is self:
            delattr(self.trainer, _ATTRIBUTE)

    def of_generation(self, rows: int) -> torch.Tensor:
        """The group of each of this process's rows of a generation batch, (B,), on the trainer's device."""
        trainer = self.trainer
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        first = trainer.accelerator.process_index * rows
        groups_B: torch.Tensor = torch.arange(first, first + rows, device=trainer.accelerator.device) // size
        return groups_B

    def _score(self, call_next: Next, /, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        groups_B = self.of_generation(len(inputs))
        with self.under_way(groups_B):
            output = call_next(inputs, *args, **kwargs)
        rows = len(output["completion_ids"])  # somebody's own scoring may return more or fewer
        return {**output, KEY: groups_B} if rows == len(groups_B) else output

    def _loss(self, call_next: Next, /, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = inputs if isinstance(inputs, Mapping) else {}
        with self.under_way(batch.get(KEY), batch.get(KNOWN)):
            return call_next(model, inputs, *args, **kwargs)

    @contextmanager
    def under_way(self, groups_B: torch.Tensor | None, known_B: torch.Tensor | None = None) -> Iterator[None]:
        """A context in which `current` is `groups_B`, and `known` is `known_B`."""
        before, self.current, self.known = (self.current, self.known), groups_B, known_B
        try:
            yield
        finally:
            self.current, self.known = before


def groups_of(trainer: Any) -> Groups:
    """The `Groups` of a trainer that speed-ups are being put on."""
    groups: Groups = getattr(trainer, _ATTRIBUTE)
    return groups


def in_groups(trainer: Any, rows: int) -> AbstractContextManager[None]:
    """A context in which a generation of so many rows, by itself, has its groups; nothing where no speed-up is on."""
    groups: Groups | None = getattr(trainer, _ATTRIBUTE, None)
    return nullcontext() if groups is None else groups.under_way(groups.of_generation(rows))
