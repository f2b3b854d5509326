"""Log-probs that TRL's loss asks the model for, and several such calls put together as one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from grpo_autotune.seams.trainer_access import BOTH_KEYS
from grpo_autotune.speedups.batches.passes import Row

Joining = Callable[[list[torch.Tensor]], torch.Tensor]


class Request(NamedTuple):
    """Log-probs that TRL asks for."""

    input_ids: torch.Tensor  # (B, P + C)
    attention_mask: torch.Tensor  # the same
    completion_width: int  # C
    others: dict[str, Any]  # the other arguments
    group: torch.Tensor | None  # of each row, where it is known
    known: torch.Tensor | None = None  # the column `groups.KNOWN` of the rows, where they have it

    @property
    def kind(self) -> frozenset[tuple[str, Any]]:
        """The inputs that must be equal for two requests to go together."""
        groups = ("group", self.group is None)
        return frozenset({groups, *((key, _layout(value)) for key, value in self.others.items())})


def rows_of(asked: Sequence[Request]) -> list[list[Row]]:
    """The rows of each in tokens, where the host does not know them read from the device at once; where groups are not
    known, a row is one of its own."""
    known = _column([one.known for one in asked])
    if known is None:
        group = _column([one.group for one in asked])
        prompts = torch.cat([one.attention_mask[:, : -one.completion_width].sum(1) for one in asked])
        completions = torch.cat([one.attention_mask[:, -one.completion_width :].sum(1) for one in asked])
        numbers = torch.arange(len(prompts), device=prompts.device) if group is None else group
        known = torch.stack([numbers, prompts, completions], dim=1)
    rows = iter(known[:, :3].tolist())
    return [[Row(*next(rows)) for _ in range(len(one.input_ids))] for one in asked]


def joined(asked: Sequence[Request]) -> Request:
    """One call for all rows, of one `kind`: prompts padded on the left, completions on the right."""
    width = max(one.completion_width for one in asked)
    prompts = max(one.input_ids.shape[1] - one.completion_width for one in asked)

    def widened(values: list[torch.Tensor]) -> torch.Tensor:
        padded = []
        for one, value in zip(asked, values, strict=True):
            right = width - one.completion_width
            padded.append(nn.functional.pad(value, (prompts + width - right - value.shape[1], right)))
        return torch.cat(padded)

    others = {
        key: _together([one.others[key] for one in asked], widened if key in BOTH_KEYS else torch.cat)
        for key in asked[0].others
    }
    ids, mask = ([getattr(one, name) for one in asked] for name in ("input_ids", "attention_mask"))
    group, known = (_column([getattr(one, name) for one in asked]) for name in ("group", "known"))
    return Request(widened(ids), widened(mask), width, others, group, known)


def _column(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """A column of all rows; None where some have it not."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def _layout(value: Any) -> Any:
    """The layout that two values must share to be put together."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim, tuple(value.shape[1:]) if value.ndim > 2 else ()
    return "list" if isinstance(value, list) else value


def _together(values: list[Any], joining: Joining) -> Any:
    """One argument for several micro batches: tensors and lists by row, a setting as it is."""
    if isinstance(values[0], torch.Tensor):
        return joining(values)
    return [item for value in values for item in value] if isinstance(values[0], list) else values[0]
