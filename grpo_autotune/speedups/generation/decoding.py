"""Generation for groups of rows that share a prompt: each prompt is read once, and rows that are done cost nothing.

`decode` takes the place of the loop inside transformers' `generate` (its `custom_generate`), which has prepared
everything for one row per prompt: images encoded, positions, masks, processors. After reading the prompts it goes on
with all rows, each with a copy of its prompt's cache. Tokens are drawn for all rows together, those that are done
included: the random stream is that of TRL's own call, so the same seed gives the same completions.

On a GPU the host does not wait for each token: it looks some tokens late at which rows are done. Where all were done
earlier, the tokens since then are discarded and the random stream is put back. Where a forward needs all ranks, one
whose rows are done goes on with a row, of which it draws nothing, until the others' are.

Legend: U distinct prompts, B rows, A rows that the model still runs, T tokens so far, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessorList

from grpo_autotune.hardware.seeded import random_streams
from grpo_autotune.speedups.generation.step import (
    Capture,
    FixedStep,
    GeneralStep,
    GraphStep,
    Unsupported,
    one_kernel_norms,
    select,
)
from grpo_autotune.speedups.generation.weights import for_decoding, products, replaced
from grpo_autotune.speedups.sdpa import without_cudnn

SHRINK_AT = {"cpu": 0.75}
"""Rows that are done leave the batch once at most this share of its rows is still at work: leaving copies the cache."""

SHRINK_LATE = 0.25
"""The same on other devices, where launches bind and a row costs little."""

LOOK_EVERY = {"cpu": 1, "mps": 1}
"""Tokens between two looks at which rows are done; elsewhere `LOOK_LATE`, as a look makes the device wait. Apple's
random stream cannot be put back by device."""

LOOK_LATE = 8

WORTH_IT = 16
"""New tokens from which weights are laid out for decoding, which takes as long as about three tokens."""


class Decoder:
    """A `custom_generate` for one call of `generate`."""

    def __init__(
        self,
        prompt_of_row: torch.Tensor,  # which of the U prompts each row continues, (B,)
        record: list[torch.Tensor] | None = None,  # gets each step's scores as the model gave them, (B, V)
        capture: Capture | None = None,  # captures a step, for replays in place of calls
        look_every: int | None = None,  # tokens between two looks at which rows are done; None is the device's own
        any_rank: Callable[[bool], bool] | None = None,  # where ranks are in step (`seams.ranks.InStep`)
    ) -> None:
        self.prompt_of_row, self.record, self.capture = prompt_of_row, record, capture
        self.look_every, self.any_rank = 1 if any_rank else look_every, any_rank
        self.steps = self.row_steps = 0  # those of plain generation, and rows times steps that the model ran

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
        longest = stopping_criteria.max_length or generation_config.max_length
        every = self.look_every or LOOK_EVERY.get(input_ids.device.type, LOOK_LATE)
        asked = (type(item).__module__ for item in (*logits_processor, *stopping_criteria))
        if not all(module.startswith(("transformers.", "grpo_autotune.")) for module in asked):
            every = 1  # somebody's own may change something when it is asked about a step too many
        with without_cudnn():
            with products(model) as dtypes:
                state, logits_BV = self._read(model, input_ids, model_kwargs)
            long = longest - input_ids.shape[1] >= WORTH_IT and len(self.prompt_of_row) > 1 and self.any_rank is None
            compared = self.record is not None and self.any_rank is None
            weights = for_decoding(model, dtypes) if long or compared else ()
            with replaced(weights), one_kernel_norms(model):
                process = LogitsProcessorList(_of_rows(processor, self.prompt_of_row) for processor in logits_processor)
                text = _Text(input_ids[self.prompt_of_row], longest, stopping_criteria, every, generation_config)
                return self._write(self._step(model, state, longest), logits_BV, process, text)

    def _read(
        self, model: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Read the prompts; what `generate` carries on and the logits (B, V), for all rows."""
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        state = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        state = select(state, self.prompt_of_row.to(input_ids.device), len(input_ids))
        return state, outputs.logits[:, -1].to(torch.float32)[self.prompt_of_row]

    def _step(self, model: Any, state: dict[str, Any], longest: int) -> GeneralStep:
        if not FixedStep.fits(model, state):
            if self.capture is not None:
                raise Unsupported("decode: graph needs a model whose steps transformers prepares by itself")
            return GeneralStep(model, state)
        if self.capture is None:
            return FixedStep(model, state, longest)
        return GraphStep(model, state, longest, self.capture)

    def _write(self, step: GeneralStep, logits_AV: torch.Tensor, process: Any, text: "_Text") -> torch.Tensor:
        """Draw and run until all rows are done; their ids."""
        rows = len(logits_AV)
        inside = torch.arange(rows, device=logits_AV.device)
        shrink_at = SHRINK_AT.get(logits_AV.device.type, SHRINK_LATE)
        while True:
            logits_BV = _at(logits_AV, inside, rows)
            if self.record is not None:
                self.record.append(logits_BV.clone())
            text.add(process(text.ids, logits_BV))
            left = text.left()
            goes_on = self.any_rank if self.any_rank is not None and self.any_rank(left != 0) else None
            if left == 0:
                if goes_on is not None:
                    self._keep_up(step, text.ids[inside], goes_on)
                self.steps -= text.surplus
                if self.record is not None:
                    del self.record[len(self.record) - text.surplus :]
                return text.ids.clone()
            if left is not None and left <= shrink_at * len(inside):
                kept = text.at_work[inside].nonzero().flatten()
                step.keep(kept, len(inside))
                inside = inside[kept]
            logits_AV = step(text.ids if len(inside) == rows else text.ids[inside])
            self.steps, self.row_steps = self.steps + 1, self.row_steps + len(inside)

    def _keep_up(self, step: GeneralStep, ids_AT: torch.Tensor, any_rank: Callable[[bool], bool]) -> None:
        """Run one row as long as rows of other ranks are at work."""
        step.keep(torch.zeros(1, dtype=torch.long, device=ids_AT.device), len(ids_AT))
        ids_1T = ids_AT[:1]
        while True:
            step(ids_1T)
            if not any_rank(False):
                return
            ids_1T = torch.cat([ids_1T, ids_1T[:, -1:]], dim=1)


class _Text:
    """The ids of the rows so far, (B, T), and which rows are done."""

    def __init__(self, ids_BT: torch.Tensor, longest: int, criteria: Any, every: int, config: Any) -> None:
        rows, self._tokens = ids_BT.shape
        self._ids_BL = torch.empty(rows, longest, dtype=ids_BT.dtype, device=ids_BT.device)
        self._ids_BL[:, : self._tokens] = ids_BT
        self._criteria, self._every, self._config = criteria, every, config
        self.at_work = torch.ones(rows, dtype=torch.long, device=ids_BT.device)  # 1 for each row that goes on
        self.surplus = 0  # steps that were taken back after all rows were done
        self._unread: list[tuple[torch.Tensor, Callable[[], None] | None]] = []

    @property
    def ids(self) -> torch.Tensor:
        return self._ids_BL[:, : self._tokens]

    def add(self, scores_BV: torch.Tensor) -> None:
        """Draw the next token of each row from its scores."""
        self._ids_BL[:, self._tokens] = _draw(scores_BV, self._config, self.at_work)
        self._tokens += 1
        self.at_work = self.at_work & ~self._criteria(self.ids, None)
        keep_stream = self._every > 1 and self._config.do_sample
        self._unread.append((self.at_work.sum(), random_streams() if keep_stream else None))

    def left(self) -> int | None:
        """Rows at work; None while the host does not look. At 0 the text ends where plain generation ends."""
        if len(self._unread) < self._every and self._tokens < self._ids_BL.shape[1]:
            return None
        left = torch.stack([count for count, _ in self._unread]).tolist()
        if left[-1] == 0:
            last = left.index(0)
            self.surplus = len(left) - 1 - last
            stream = self._unread[last][1]
            if self.surplus and stream is not None:
                stream()
            self._tokens -= self.surplus
        self._unread = []
        return int(left[-1])


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
