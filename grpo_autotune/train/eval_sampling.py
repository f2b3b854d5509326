"""Sampling of its own for a trainer's evaluation: greedy, or with another temperature or choice of tokens."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from grpo_autotune.config.sections.sampled import EvalSampling
from grpo_autotune.seams.layers import AttributeSlot, wrap

GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}  # without its warnings


def evaluate_with(trainer: Any, sampling: EvalSampling, say: Callable[[str], None]) -> None:
    """Let every evaluation of a trainer sample by these settings."""
    values = sampling.model_dump(exclude_none=True)
    if values.get("temperature") == 0 and trainer.num_generations_eval > 1:
        count = trainer.num_generations_eval
        say(f"eval_sampling is greedy, so a prompt's {count} completions are alike: set grpo.num_generations_eval to 1")

    def loop(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with sampling_by(trainer, values):
            return call_next(*args, **kwargs)

    wrap(AttributeSlot(trainer, "evaluation_loop"), loop)


@contextmanager
def sampling_by(trainer: Any, values: Mapping[str, Any], completions: int | None = None) -> Iterator[None]:
    """Generation by these settings inside, whatever generates, a temperature of 0 being greedy; `completions` of each
    prompt in evaluation, if given."""
    if trainer.use_vllm:
        holder = trainer.vllm_generation
        others = {name: value for name, value in holder.generation_kwargs.items() if name not in values}
        changes = {**values, "generation_kwargs": others}
    else:
        holder = trainer
        settings = copy.deepcopy(trainer.generation_config)
        settings.update(**{**values, **(GREEDY if values.get("temperature") == 0 else {})})
        changes = {"generation_config": settings}
    before, count = {name: getattr(holder, name) for name in changes}, trainer.num_generations_eval
    try:
        trainer.num_generations_eval = completions or count
        vars(holder).update(changes)
        yield
    finally:
        trainer.num_generations_eval = count
        vars(holder).update(before)


def greedy_generation(trainer: Any) -> AbstractContextManager[None]:
    """One completion of each prompt inside, of the most likely tokens: further ones would be alike."""
    return sampling_by(trainer, {"temperature": 0.0}, completions=1)
