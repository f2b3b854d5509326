"""Completions by trained weights, written as the trainer's evaluation writes them: by `generate`, or by vLLM.

A `trl.GRPOTrainer` that never trains makes the prompts' ids, samples and decodes, so that images, chat template, types
and the way of an adapter into vLLM are those of the run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.hardware.seeded import seeded
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.records.trial import TRIAL_ARGUMENTS
from grpo_autotune.rollout.colocate.placeholders import collapsed
from grpo_autotune.seams import mixed_image_rows
from grpo_autotune.seams.layers import AttributeSlot, wrap
from grpo_autotune.seams.trainer_access import end_tokens
from grpo_autotune.speedups.batches.groups import in_groups
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.train.arguments import as_config_errors, grpo_arguments, suppress_image_token, unlocked_engine
from grpo_autotune.train.eval_sampling import greedy_generation
from grpo_autotune.train.runs.resumable import ResumableTrainer
from grpo_autotune.trained.load import load_trained
from grpo_autotune.trained.prompts import prompt_of
from grpo_autotune.trained.source import Trained

Row = Mapping[str, Any]

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "seed")
"""Keys of `grpo` that decide on completions, beside `generation_kwargs`."""
KEPT = ("bf16", "fp16", "use_cpu", "cache_implementation", "chat_template_kwargs", "pad_to_multiple_of")
"""Others that stay as they are; what distributes, logs and saves does not."""
SPEED_UPS = ("shared_prefill", "merge_for_generation")


class Answer(NamedTuple):
    """One completion."""

    prompt: str  # the text that the model read, an image as one placeholder
    text: str
    completion: Any  # as TRL hands it to rewards
    ids: list[int]
    truncated: bool  # True if the limit of tokens ended it


def generating(config: RunConfig, *, in_vllm: bool, longest: int | None) -> RunConfig:
    """The configuration of an engine: the run's own sampling, at most `longest` tokens. `generation_kwargs` are left
    out, and told, where another engine than the run's generates."""
    grpo = {name: config.grpo[name] for name in KEPT if name in config.grpo}
    grpo |= {name: grpo_value(name, config) for name in SAMPLED} | {"use_vllm": in_vllm}
    if longest is not None:
        grpo["max_completion_length"] = longest
    further = config.grpo.get("generation_kwargs")
    if further and config.use_vllm != in_vllm:
        say("grpo.generation_kwargs are those of the other engine: left out")
    elif further:
        grpo["generation_kwargs"] = json.loads(further) if isinstance(further, str) else further
    here = {"mode": "colocate", "server_gpus": None, "sleep_level": None, "enable_sleep_mode": None}
    return config.model_copy(update={"grpo": grpo, "vllm": config.vllm.model_copy(update=here)})


class Engine:
    """An engine for `prompts` rows at once, `n` completions each, with a configuration as `generating` has it.

    Raises:
        ConfigError: The weights cannot be loaded, or vLLM does not take them or a key.
    """

    def __init__(
        self, trained: Trained, config: RunConfig, processor: Any, rows: Any, *, n: int, prompts: int, greedy: bool
    ) -> None:
        group = max(2, n)  # TRL trains on no less
        size = {"num_generations": group, "per_device_train_batch_size": prompts * group, "beta": 0.0}
        quiet = {**TRIAL_ARGUMENTS, "gradient_checkpointing": False, "output_dir": str(trained.path)}
        arguments = grpo_arguments(config, output_dir="", reward_weights=[1.0], overrides={**quiet, **size}).grpo
        model = load_trained(trained)
        suppress_image_token(arguments, processor, model)
        with as_config_errors("grpo"), unlocked_engine(config):
            self._trainer = trainer = ResumableTrainer(
                model=model,
                reward_funcs=[_unscored],
                args=arguments,
                train_dataset=rows,
                processing_class=processor,
            )
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(callback)
        self._n, self._greedy, self._seeds = n, greedy, list[int]()
        trainer.num_generations_eval = n
        trainer.model.eval()
        self._ends = {*end_tokens(trainer), trainer._tokenizer.pad_token_id}
        self._image_id = getattr(processor, "image_token_id", None)
        if config.use_vllm:
            wrap(AttributeSlot(trainer.vllm_generation.llm, "generate"), self._with_seeds)
        else:
            mixed_image_rows.mend(trainer)
            speed_up(trainer, [] if config.speedups == "none" else [*SPEED_UPS])

    def write(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Answer]:
        """The completions of the first row, of the second, and so on. The same rows with the same seeds, which are `n`
        apart, have the same ones."""
        trainer, n = self._trainer, self._n
        self._seeds = [seed for seed in seeds for _ in range(n)]
        prompts = [prompt for row in rows for prompt in [prompt_of(row, trainer.processing_class)] * n]
        with ExitStack() as inside:
            inside.enter_context(as_config_errors("infer"))
            inside.enter_context(seeded(seeds[0], trainer.accelerator.device))
            if self._greedy:
                inside.enter_context(greedy_generation(trainer))
            inside.enter_context(in_groups(trainer, len(prompts)))
            prompt_ids, ids, _, completions, *_ = trainer._generate(prompts)
        return [self._answer(*each) for each in zip(prompt_ids, ids, completions, strict=True)]

    def _answer(self, prompt_ids: Sequence[int], ids: list[int], completion: Any) -> Answer:
        read = prompt_ids if self._image_id is None else collapsed(prompt_ids, self._image_id)
        text = completion if isinstance(completion, str) else str(completion[0].get("content", ""))
        truncated = not ids or ids[-1] not in self._ends
        return Answer(self._trainer._tokenizer.decode(read), text, completion, ids, truncated)

    def _with_seeds(self, call_next: Callable[..., Any], /, prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        """`LLM.generate`, its rows with the seeds of their prompts."""
        params = [sampling_params.clone() for _ in prompts]
        for one, seed in zip(params, self._seeds, strict=True):
            one.seed = seed
        return call_next(prompts, sampling_params=params, **kwargs)


def _unscored(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]
