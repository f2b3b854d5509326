"""Generation for groups of rows that share a prompt: each prompt is read once, and rows that are done cost nothing.

`decode` takes the place of the loop inside transformers' `generate` (its `custom_generate`), which has prepared
everything for one row per prompt: images encoded, positions, masks, processors. After reading the prompts it goes on
with all rows, each with a copy of its prompt's cache. Tokens are drawn for all rows together, those that are done
included: the random stream is that of TRL's own call, so the same seed gives the same completions.

Legend: U distinct prompts, B rows, A rows that the model still runs, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

SHRINK_AT = 0.75
"""Rows that are done leave the batch once at most this share of its rows is still at work: leaving copies the cache."""

CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache whose rows can be selected without loss."""

PROMPT_ONLY = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)
"""What the model takes with the prompt and never again."""


class Unsupported(RuntimeError):
    """The model keeps something in its cache, or wants something at each step, whose rows are not known here."""


class Decoder:
    """A `custom_generate` for one call of `generate`.

    Args:
        prompt_of_row: Which of the U prompts each row continues, shape (B,).
        record: Gets each step's scores as the model gave them, shape (B, V); None keeps none.
    """

    def __init__(self, prompt_of_row: torch.Tensor, record: list[torch.Tensor] | None = None) -> None:
        self.prompt_of_row, self.record = prompt_of_row, record
        self.steps = self.row_steps = 0

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """As `GenerationMixin._sample`; ids of U prompts in, ids of B rows out."""
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        ids_B = input_ids[self.prompt_of_row]
        process = LogitsProcessorList(_of_rows(processor, self.prompt_of_row) for processor in logits_processor)
        state = _select(state, self.prompt_of_row.to(input_ids.device), len(input_ids))
        logits_AV = outputs.logits[:, -1].to(torch.float32)[self.prompt_of_row]
        del outputs, inputs
        at_work = torch.ones(len(ids_B), dtype=torch.long, device=ids_B.device)
        inside = torch.arange(len(ids_B), device=ids_B.device)
        while True:
            logits_BV = _at(logits_AV, inside, len(ids_B))
            if self.record is not None:
                self.record.append(logits_BV.clone())
            scores_BV = process(ids_B, logits_BV)
            tokens_B = _draw(scores_BV, generation_config, at_work)
            ids_B = torch.cat([ids_B, tokens_B[:, None]], dim=-1)
            at_work = at_work & ~stopping_criteria(ids_B, None)
            left = int(at_work.sum())
            if not left:
                return ids_B
            if left <= SHRINK_AT * len(inside):
                kept = at_work[inside].nonzero().flatten()
                state, inside = _select(state, kept, len(inside)), inside[kept]
            inputs = model.prepare_inputs_for_generation(ids_B[inside], next_sequence_length=1, **state)
            outputs = model(**inputs, return_dict=True)
            self.steps, self.row_steps = self.steps + 1, self.row_steps + len(inside)
            state = model._update_model_kwargs_for_generation(outputs, state)
            logits_AV = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)


def _of_rows(processor: Any, prompt_of_row: torch.Tensor) -> Any:
    """A processor made for U prompts, for B rows: one of them remembers how far each prompt is padded."""
    ignored_U = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored_U, torch.Tensor):
        return processor
    bound = copy.copy(processor)
    bound.prompt_ignore_length = ignored_U[prompt_of_row.to(ignored_U.device)]
    return bound


def _at(logits_AV: torch.Tensor, inside: torch.Tensor, rows: int) -> torch.Tensor:
    """(A, V) -> (B, V): rows that have left get zeros, so that all B rows take part in the draw."""
    if len(inside) == rows:
        return logits_AV
    logits_BV = logits_AV.new_zeros(rows, logits_AV.shape[1])
    logits_BV[inside] = logits_AV
    return logits_BV


def _draw(scores_BV: torch.Tensor, generation_config: Any, at_work: torch.Tensor) -> torch.Tensor:
    """The next token of each row as `GenerationMixin._sample` draws it; padding for rows that are done."""
    if generation_config.do_sample:
        chances_BV = torch.nn.functional.softmax(scores_BV, dim=-1)
        tokens_B = torch.multinomial(chances_BV, num_samples=1).squeeze(1)
    else:
        tokens_B = torch.argmax(scores_BV, dim=-1)
    padding = generation_config._pad_token_tensor
    return tokens_B if padding is None else tokens_B * at_work + padding.to(tokens_B.device) * (1 - at_work)


def _select(state: Mapping[str, Any], rows: torch.Tensor, before: int) -> dict[str, Any]:
    """The state that `generate` carries from step to step, for the given rows out of `before`.

    Raises:
        Unsupported: Something in it is not known to have rows, or none.
    """
    selected: dict[str, Any] = {}
    for name, value in state.items():
        if name in PROMPT_ONLY:
            continue
        if isinstance(value, torch.Tensor) and value.ndim:
            selected[name] = _select_tensor(name, value, rows, before)
        elif isinstance(value, DynamicCache) and all(type(layer) in CACHE_LAYERS for layer in value.layers):
            value.batch_select_indices(rows)
            selected[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            selected[name] = value
        else:
            raise Unsupported(f"`{name}` ({type(value).__name__}) of the model is not known to be made of rows")
    return selected


def _select_tensor(name: str, value: torch.Tensor, rows: torch.Tensor, before: int) -> torch.Tensor:
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] != before:
        if value.shape[axis] == 1:
            return value
        raise Unsupported(f"`{name}` of the model has shape {tuple(value.shape)} for {before} rows")
    return value.index_select(axis, rows.to(value.device))
