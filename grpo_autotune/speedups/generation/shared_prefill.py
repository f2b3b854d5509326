"""`generate` reads each group's prompt once: the G rows of a group go on from copies of one prompt's cache.

TRL hands transformers G copies of each prompt, images included, and the vision tower and the prompt's forward run on
all of them. Which rows share a prompt is carried in the generation (`groups`); that they do is checked, pixels too, and
a batch where they do not is generated as TRL would.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid

from grpo_autotune.hardware.seeded import seeded
from grpo_autotune.seams.layers import INNER, Next
from grpo_autotune.seams.mixed_image_rows import without_empty
from grpo_autotune.seams.ranks import InStep, forward_in_step, most, sharded
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.groups import groups_of
from grpo_autotune.speedups.batches.rows import take, widened
from grpo_autotune.speedups.conditions import GENERATION, active_noise, in_parts
from grpo_autotune.speedups.generation.decoding import Decoder
from grpo_autotune.speedups.generation.step import Capture, Unsupported, cuda_graph
from grpo_autotune.speedups.selfcheck import SelfCheck

CHECKED_TOKENS = 3
PLAIN = {
    "num_beams": 1, "use_cache": True, "return_dict_in_generate": False, "token_healing": False,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0,
}  # fmt: skip
"""Settings of generation whose only value that the loop knows is this one, or none."""

UNKNOWN = ("prefill_chunk_size", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers", "watermarking_config")
"""Settings that ask for another loop, or for scores that depend on the prompt's rows."""

BY_STEP = ("logits_processor", "stopping_criteria")
"""What a layer further out may add to a call. It is asked at each step about all rows, which are more than those of the
self-check, so that this one leaves it out."""


class SharedPrefill:
    """The speed-up; `decode: eager` calls the model for each token, `graph`, on CUDA, replays a graph that was captured
    for the number of rows and the bucket of tokens."""

    name = "shared_prefill"
    summary = (
        "generate reads each group's prompt once, writes tokens into a cache with room, and drops rows that are done"
    )
    stands_for = (*GENERATION, "_generate_single_turn", "model.generate", "model.forward")

    def __init__(self, decode: str = "eager") -> None:
        self.capture = cuda_graph if decode == "graph" else None

    def applies(self, trainer: Any) -> str | None:
        """None where transformers generates from whole prompts, token by token."""
        if trainer.use_vllm:
            return "grpo.use_vllm: the engine shares prompts itself"
        if trainer.use_transformers_continuous_batching:
            return "grpo.use_transformers_continuous_batching generates without prompts in step"
        if trainer.rollout_func is not None or trainer.tools or trainer.environment_factories is not None:
            return "rollout_func, tools or environment_factory: generation goes on from more than the prompts"
        if (reason := in_parts(trainer)) is not None:
            return reason
        if (noise := active_noise(trainer)) is not None:
            return f"{noise}: TRL generates in train mode, and draws other numbers for the prompt of each completion"
        if self.capture is not None and trainer.accelerator.device.type != "cuda":
            return "speedups: decode: graph needs a CUDA device"
        if self.capture is not None and sharded(trainer):
            return "speedups: decode: graph cannot replay a step that gathers weights from other ranks"
        return _why_another_loop(trainer.generation_config)

    def install(self, trainer: Any) -> Installed:
        installed = _Sharing(self.name, trainer, self.capture)
        installed.handles += wrap_seams(trainer, INNER, turn=installed.turn, model_generate=installed.generate)
        return installed


def _why_another_loop(config: Any) -> str | None:
    if config.cache_implementation not in (None, "dynamic"):
        return f"grpo.cache_implementation is {config.cache_implementation}: its rows cannot be copied"
    for name, value in PLAIN.items():
        if getattr(config, name, None) not in (None, value):
            return f"grpo.generation_kwargs: {name} is {getattr(config, name)}"
    for name in UNKNOWN:
        if getattr(config, name, None) is not None:
            return f"grpo.generation_kwargs: {name} is set"
    return None


class _Sharing(Installed):
    """Layers of one trainer, and what they saved."""

    def __init__(self, name: str, trainer: Any, capture: Capture | None) -> None:
        super().__init__(name)
        self.trainer, self._capture = trainer, capture
        self._checks = {with_images: SelfCheck(self, InStep(trainer)) for with_images in (False, True)}
        self._turn: tuple[torch.Tensor, list[int] | None] | None = None
        # rows generated, prompts read for them, and rows times steps that the model ran and would have run
        self.counts = {"rows": 0.0, "prompts": 0.0, "row_steps": 0.0, "row_steps_of_plain": 0.0}

    def turn(self, call_next: Next, /, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Know the groups and the number of images of the rows that are about to be generated on."""
        groups_B = groups_of(self.trainer).current
        if groups_B is not None and len(groups_B) == len(prompt_ids):
            self._turn = groups_B, None if images is None else [len(row) if row else 0 for row in images]
        try:
            return call_next(prompt_ids, images, *args, **kwargs)
        finally:
            self._turn = None

    def generate(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        turn, config = self._turn, kwargs.get("generation_config")
        in_step = forward_in_step(self.trainer)
        if sharded(self.trainer) and not in_step:  # TRL has gathered the weights: each rank ends by itself
            call_next = partial(call_next, synced_gpus=False)
        if self.fell_back or turn is None or args or config is None or "custom_generate" in kwargs:
            return call_next(*args, **kwargs)
        fields = {name: value for name, value in kwargs.items() if name not in ("generation_config", *BY_STEP)}
        by_step = {name: kwargs[name] for name in BY_STEP if name in kwargs}
        first_rows, prompt_of_row = _first_rows(turn[0])
        batch = fields if turn[1] is None else {**fields, "num_images": turn[1]}
        samples = _samples(batch, first_rows)
        told = [not _alike(batch, first_rows, prompt_of_row), *(kind in samples for kind in self._checks)]
        differ, *kinds = most(told, self.trainer, in_step)
        if differ:
            return call_next(**kwargs)
        for with_images in compress(self._checks, kinds):  # of a rank in step, even where this one has none of a kind
            plain, shared, again = self._ways(call_next, batch, samples.get(with_images, first_rows[0]), config)
            if not self._checks[with_images].run(plain, shared, self.trainer.model.dtype, "scores", again):
                return call_next(**kwargs)
        prompts = _inputs(take(batch, first_rows))
        decoder = self._decoder(torch.tensor(prompt_of_row))
        try:
            ids = call_next(**prompts, generation_config=config, custom_generate=decoder, **by_step)
        except Unsupported as error:
            self.fall_back(str(error))
            return call_next(**kwargs)
        self.counts["rows"] += len(prompt_of_row)
        self.counts["prompts"] += len(first_rows)
        self.counts["row_steps"] += decoder.row_steps
        self.counts["row_steps_of_plain"] += decoder.steps * len(prompt_of_row)
        return ids

    def _decoder(self, prompt_of_row: torch.Tensor, record: list[torch.Tensor] | None = None) -> Decoder:
        any_rank = InStep(self.trainer).any if forward_in_step(self.trainer) else None
        return Decoder(prompt_of_row, record, self._capture, any_rank=any_rank)

    def _ways(
        self, call_next: Next, batch: dict[str, Any], row: int, config: Any
    ) -> tuple[Callable[[], torch.Tensor], ...]:
        """Scores of the first tokens of two completions of one row's prompt, by itself and behind one more column of
        padding: as TRL gets them, shared, and as TRL gets them with the two in each other's place."""
        device = batch["input_ids"].device
        config = copy.deepcopy(config)
        config.max_new_tokens = min(CHECKED_TOKENS, config.max_new_tokens or CHECKED_TOKENS)
        if config.min_new_tokens is not None:
            config.min_new_tokens = min(config.min_new_tokens, config.max_new_tokens)

        told = copy.deepcopy(config)
        told.return_dict_in_generate = told.output_logits = True
        once, twice = (
            (inputs, widened(inputs, config.pad_token_id or 0))
            for inputs in (_inputs(take(batch, rows)) for rows in ([row], [row, row]))
        )

        def plain(*widths: dict[str, Any]) -> torch.Tensor:
            scores: list[torch.Tensor] = []
            for inputs in widths:
                with seeded(0, device):
                    scores += call_next(**inputs, generation_config=told).logits
            return torch.stack(scores)

        def shared() -> torch.Tensor:
            record: list[torch.Tensor] = []
            for inputs in once:
                decoder = self._decoder(torch.tensor([0, 0]), record)
                with seeded(0, device):
                    call_next(**inputs, generation_config=config, custom_generate=decoder)
            return torch.stack(record)

        return partial(plain, *twice), shared, partial(plain, *reversed(twice))


def _first_rows(groups_B: torch.Tensor) -> tuple[list[int], list[int]]:
    """The first row of each group, and for each row which of those groups it is in."""
    first_rows: dict[int, int] = {}
    for row, group in enumerate(groups_B.tolist()):
        first_rows.setdefault(group, row)
    order = {group: index for index, group in enumerate(first_rows)}
    return list(first_rows.values()), [order[group] for group in groups_B.tolist()]


def _samples(batch: dict[str, Any], rows: list[int]) -> dict[bool, int]:
    """The first of these rows without images and the first with some, by whether it has some."""
    images = batch.get("num_images")
    kinds = [bool(images[row]) if images else "pixel_values" in batch for row in rows]
    return {kind: rows[kinds.index(kind)] for kind in sorted(set(kinds))}


def _alike(batch: dict[str, Any], first_rows: list[int], prompt_of_row: list[int]) -> bool:
    """True if all rows of each group have the same ids, masks and pixels."""
    rows = len(prompt_of_row)
    if "pixel_values" in batch and "num_images" not in batch:
        return False
    for name, value in split_pixel_values_by_grid(batch).items():
        if name != "num_images" and (
            len(value) != rows or (isinstance(value, torch.Tensor) and name == "pixel_values")
        ):
            return False
        if not all(_equal(value[row], value[first_rows[prompt]]) for row, prompt in enumerate(prompt_of_row)):
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return without_empty({name: value for name, value in batch.items() if name != "num_images"})
