"""One placeholder per image in every prompt that reaches the engine.

TRL 1.16 hands over prompt ids in which each image's placeholder is expanded already to as many as the image has
tokens; vLLM expands the first one of a run again and leaves the others, so that the model reads a longer prompt than
the one that is trained on (trl#6294). With each run put back to one placeholder, vLLM's expansion gives exactly the
ids that TRL has, and that is checked for every prompt.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.rollout.parts import Part
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

PROMPT_IDS, MEDIA = "prompt_token_ids", "multi_modal_data"
"""Keys of a prompt that TRL hands to `LLM.generate`."""


class OnePlaceholder(Part):
    """The collapsed prompts of a colocated engine; a server gets its images by another way, which is right as it is."""

    def install(self, generation: Any) -> list[Handle]:
        image_id = getattr(generation.processing_class, "image_token_id", None)
        if image_id is None:
            return []

        def generate(call_next: Next, /, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            sent = [collapsed_prompt(prompt, image_id) for prompt in prompts]
            outputs = call_next(sent, *args, **kwargs)
            for given, prompt, output in zip(prompts, sent, outputs, strict=True):
                if prompt is not given:
                    _check_expanded(given[PROMPT_IDS], output.prompt_token_ids, image_id)
            return outputs

        return [wrap(AttributeSlot(generation.llm, "generate"), generate, INNER)]


class ServedImageTokens(Part):
    """The check of a server's images: its processor is elsewhere, and it tells how many tokens it made of each."""

    def install(self, generation: Any) -> list[Handle]:
        image_id = getattr(generation.processing_class, "image_token_id", None)
        if image_id is None:
            return []

        def place(call_next: Next, /, features: Any, prompt_ids: Any) -> Any:
            if features is not None:
                lengths = [at["length"] for at in features["mm_placeholders"]["image"]]
                check_lengths(image_lengths(prompt_ids, image_id), lengths)
            return call_next(features, prompt_ids)

        return [wrap(AttributeSlot(generation, "_place_features"), place, INNER)]


def collapsed_prompt(prompt: Any, image_id: int) -> Any:
    """A prompt of `LLM.generate` with one placeholder per image; the prompt itself where there is nothing to collapse,
    and EnvironmentProblem where its runs of placeholders are not its images."""
    media = prompt.get(MEDIA, {}).get("image") if isinstance(prompt, dict) else None
    if media is None:
        return prompt
    ids = prompt[PROMPT_IDS]
    short = collapsed(ids, image_id)
    images, runs = len(media) if isinstance(media, list) else 1, short.count(image_id)
    if runs != images:
        what = f"a prompt with {images} images has {runs} runs of image placeholders"
        fix = "The chat template must set something between images that follow one another."
        raise EnvironmentProblem(what, where="grpo.use_vllm", fix=fix)
    return prompt if len(short) == len(ids) else {**prompt, PROMPT_IDS: short}


def collapsed(ids: Sequence[int], image_id: int) -> list[int]:
    """`ids` with every run of `image_id` put to one."""
    before = [None, *ids]
    return [token for token, last in zip(ids, before, strict=False) if not token == last == image_id]


def image_lengths(ids: Sequence[int], image_id: int) -> list[int]:
    """Image tokens of each run."""
    return [len(list(run)) for token, run in itertools.groupby(ids) if token == image_id]


def _check_expanded(trained: Sequence[int], generated: Sequence[int], image_id: int) -> None:
    """The ids that the engine generated from must be those that the trainer computes on."""
    if list(trained) == list(generated):
        return
    check_lengths(image_lengths(trained, image_id), image_lengths(generated, image_id))
    raise EnvironmentProblem(
        f"the trainer computes on a prompt of {len(trained)} tokens, and the engine generated from another one of "
        f"{len(generated)}",
        where="grpo.use_vllm",
        fix="This model's image placeholders are not expanded in one place; train it with grpo.use_vllm false.",
    )


def check_lengths(ours: Sequence[int], theirs: Sequence[int]) -> None:
    """ConfigError where an image has another number of tokens for the engine than for the trainer."""
    if list(ours) == list(theirs):
        return
    raise ConfigError(
        f"the trainer's processor makes {list(ours)} tokens of a prompt's images, and the engine's {list(theirs)}",
        where="vllm.mm_processor_kwargs",
        fix="Give both the same image settings: resize the data (data.image_size) instead of changing a processor in "
        "memory, or save the changed processor with the model. Images larger than those of the data that the "
        "trainer was built with need their size there.",
    )
