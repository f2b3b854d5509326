"""Completion lengths fixed by row and seed, so that trials generate the same amount whatever their batch is split into.

A row is known by the place of its prompt in the stream of distinct prompts and by its number within the group. TRL's
`RepeatSampler` draws one permutation of the data from `seed` alone and cuts it into generations of
`generation_batch_size / num_generations` prompts, so the stream is the same for every micro batch, accumulation and
group size until the first epoch ends (a last incomplete generation is dropped there, so that streams of different
generation sizes part).

With `generate` a logits processor forbids the end of sequence before a row's length and forces it there. vLLM takes a
length for each request; its completions end without an end-of-sequence token then, so TRL counts them as truncated.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from grpo_autotune.seams.layers import AttributeSlot, Handle, Next, take_off, wrap
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import end_tokens

LEFT_FREE = "completion lengths were left free"


def length_of(lengths: Sequence[int], seed: int, prompt: int, member: int, seen: Sequence[Sequence[int]] = ()) -> int:
    """The length of a row: the one that was seen, else one of `lengths`, the same for the same three numbers."""
    if prompt < len(seen) and member < len(seen[prompt]):
        return seen[prompt][member]
    return random.Random(f"{seed}/{prompt}/{member}").choice(lengths)


class FixedLengths:
    """Draws the length of each completion that `trainer` samples in training from `lengths`, until `remove`: in tokens,
    the end-of-sequence token included; at `max_completion_length` or above it a completion is cut there and has none.
    Those of the first prompts' completions are `seen`, one list per prompt."""

    def __init__(self, trainer: Any, lengths: Sequence[int], seed: int, seen: Sequence[Sequence[int]] = ()) -> None:
        self._trainer, self._lengths, self._seed, self._seen = trainer, list(lengths), seed, seen
        self._first_row = 0
        self._wanted: list[int] | None = None
        self._group = 1
        self.notes: list[str] = []  # the reason that lengths are free, where they cannot be fixed
        self._handles: list[Handle] = []
        if (reason := why_free(trainer)) is not None:
            self.notes.append(f"{LEFT_FREE}: {reason}")
            return
        self._handles += wrap_seams(trainer, turn=self._turn)
        if trainer.use_vllm:
            self._handles.append(wrap(AttributeSlot(trainer.vllm_generation.llm, "generate"), self._requests))
            self.notes.append("vLLM's completions end by length, so that TRL counts each as truncated")
        else:
            self._handles += wrap_seams(trainer, model_generate=self._generate)

    def remove(self) -> None:
        take_off(self._handles)

    def _turn(self, call_next: Next, /, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """One generation of this rank's rows; those of evaluation are left as they are."""
        if not self._trainer.model.training:
            return call_next(prompt_ids, *args, **kwargs)
        accelerator, rows = self._trainer.accelerator, len(prompt_ids)
        self._group = self._trainer.num_generations
        self._wanted = self._rows(accelerator.process_index, rows)
        try:
            return call_next(prompt_ids, *args, **kwargs)
        finally:
            self._wanted = None
            self._first_row += rows * accelerator.num_processes

    def _rows(self, rank: int, rows: int) -> list[int]:
        first, longest = self._first_row + rank * rows, self._trainer.max_completion_length
        places = [divmod(row, self._group) for row in range(first, first + rows)]
        return [min(longest, length_of(self._lengths, self._seed, *place, self._seen)) for place in places]

    def _generate(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        if self._wanted is not None:
            ends = _Ends(self._wanted, end_tokens(self._trainer), self._trainer.max_completion_length)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), ends])
        return call_next(*args, **kwargs)

    def _requests(self, call_next: Next, /, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
        """Give each request its length; under tensor parallelism the rows of all ranks of the group are here."""
        wanted = self._wanted
        if wanted is not None and sampling_params is not None:
            ranks, rest = divmod(len(prompts), len(wanted))
            if getattr(sampling_params, "n", 1) != 1:
                self.notes = [f"{LEFT_FREE}: one request holds several completions"]
            elif ranks and not rest:  # anything else is no generation of TRL's: a check asks the engine, too
                first = self._trainer.accelerator.process_index // ranks * ranks
                wanted = [length for rank in range(first, first + ranks) for length in self._rows(rank, len(wanted))]
                sampling_params = [_of_length(sampling_params, length) for length in wanted]
        return call_next(prompts, sampling_params=sampling_params, **kwargs)


def why_free(trainer: Any) -> str | None:
    """Reason that this trainer's lengths cannot be fixed row by row; None where they can."""
    if getattr(trainer, "rollout_func", None) is not None:
        return "a rollout function generates them"
    if getattr(trainer, "tools", None):
        return "tool calls make several turns of one completion"
    if trainer.use_vllm and not hasattr(trainer.vllm_generation, "llm"):
        return "a vLLM server takes one length for a whole group"
    if getattr(trainer, "use_transformers_continuous_batching", False):
        return "continuous batching takes one length for all"
    return None


def lengths_seen(trainer: Any, generations: Sequence[Sequence[int]]) -> list[list[int]]:
    """Lengths of a run's completions by prompt, for `FixedLengths(seen=...)` in others, from those of each generation's
    rows on this rank, from the first on; empty where they tell nothing."""
    if trainer.accelerator.num_processes > 1 or trainer.use_vllm or why_free(trainer) is not None:
        return []  # vLLM's completions of a fixed length have no end of sequence, so that TRL takes them for others
    rows, group = [length for generation in generations for length in generation], trainer.num_generations
    return [rows[first : first + group] for first in range(0, len(rows), group)]


def _of_length(params: Any, length: int) -> Any:
    fixed = params.clone()
    fixed.max_tokens = min(length, params.max_tokens)
    fixed.ignore_eos = True
    return fixed


class _Ends(LogitsProcessor):  # type: ignore[misc]
    """Forbids the end of sequence before each row's length, and forces it there."""

    def __init__(self, lengths: Sequence[int], eos_ids: Sequence[int], longest: int) -> None:
        self._last = torch.tensor([length - 1 if length < longest else longest for length in lengths])  # (B,)
        self._eos = list(eos_ids)
        self._prompt: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores (B, V) of the next token."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
            self._last = self._last.to(scores.device)
        ends_B = input_ids.shape[1] - self._prompt >= self._last
        scores = scores.clone()
        scores[:, self._eos] = float("-inf")
        scores[ends_B] = float("-inf")
        scores[ends_B, self._eos[0]] = 0.0
        return scores
