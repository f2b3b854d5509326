"""A cache with room for the tokens to come: a step writes its token into it, and copies nothing else.

transformers' `DynamicLayer` concatenates: each token reads and writes the whole cache of its layer once more.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

BUCKET = 256
"""Tokens by which the room grows; a CUDA graph is captured for each, and its attention reads at most these in vain."""

ALIGNED = 8
"""Tokens that the room is a multiple of: masked attention on a GPU reads masks in such pieces."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (rows, heads, tokens, width), the first tokens of tensors that hold more, `longest`
    of them at most.

    `place` is the index of the next token on the device, shape (1,), where all shapes are to stay as they are: states
    are written there, and the whole room is handed to attention. None where the host counts tokens."""

    def __init__(self, layer: DynamicLayer, longest: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._room: tuple[torch.Tensor, ...] = (layer.keys, layer.values)
        self.keys, self.values = self._room
        self.longest = longest
        self.place: torch.Tensor | None = None

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.place is not None:
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room.index_copy_(2, self.place, states)
            return self._room[0], self._room[1]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.reserve(end)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def reserve(self, tokens: int) -> int:
        """Make room for `tokens` in whole buckets; the room that there is."""
        if tokens > self._room[0].shape[2]:
            room = max(tokens, min(self.longest, -(-tokens // BUCKET) * BUCKET))
            self._room = tuple(_with_room(states, room) for states in self._room)
        return int(self._room[0].shape[2])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        held = self.get_seq_length()
        self._room = tuple(states.index_select(0, indices) for states in self._room)
        self.keys, self.values = (states[:, :, :held] for states in self._room)


def _with_room(states: torch.Tensor, room: int) -> torch.Tensor:
    rows, heads, held, width = states.shape
    larger = states.new_zeros(rows, heads, room, width)  # zeros: what a mask hides must be a number
    larger[:, :, :held] = states
    return larger


def make_room(cache: DynamicCache, longest: int) -> bool:
    """Put a `RoomyLayer` in place of each layer that sees the whole text; True where that is all of them."""
    longest = -(-longest // ALIGNED) * ALIGNED
    cache.layers = [RoomyLayer(layer, longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)
