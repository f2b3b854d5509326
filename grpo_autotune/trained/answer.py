"""The answer that a server of trained weights has to give: the trainer's own greedy tokens to one held-out prompt."""

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel

from grpo_autotune.errors import AutotuneError, ConfigError
from grpo_autotune.train.runs.quiet import quieten
from grpo_autotune.trained.agreement import Answer
from grpo_autotune.trained.load import free_memory, load_trained, load_trained_processor
from grpo_autotune.trained.prompts import first_prompts, inputs_of, template_options
from grpo_autotune.trained.source import Trained

TOKENS = 16
PROMPTS = 4
FIXED = "The answer to the question is"
"""Asked where there is no data."""


def trainers_answer(trained: Trained, say: Callable[[str], None]) -> Answer:
    """The trained model's greedy answer, of a few held-out prompts to the one at which it is farthest from its base; to
    training prompts where none are held out, and to a fixed text where there is no data. The model is gone from memory
    afterwards. ConfigError as `load_trained`."""
    quieten(bars=False)
    model, processor = load_trained(trained), load_trained_processor(trained)
    try:
        prompts = _prompts(trained, processor, say)
    except AutotuneError as error:
        say(f"a fixed text is asked, since there is no data to ask of: {error}")
        prompts = [("a fixed text", FIXED)]
    options = template_options(trained.config)
    answers = [_answer(model, inputs_of(prompt, processor, options), place, prompt) for place, prompt in prompts]
    del model
    free_memory()
    return max(answers, key=lambda answer: answer.apart)


def _prompts(trained: Trained, processor: Any, say: Callable[[str], None]) -> list[tuple[str, Any]]:
    """The first held-out prompts as TRL has them, pictures in their places, and the source of each."""
    if trained.config is None:
        raise ConfigError("the folder is not in a run", where=str(trained.path))
    prompts, kind = first_prompts(trained.config, processor, PROMPTS, say)
    return [(f"{kind} row {row} of {trained.config.data.path}", prompt) for row, prompt in enumerate(prompts)]


@torch.no_grad()
def _answer(model: Any, inputs: Any, place: str, prompt: Any) -> Answer:
    inputs, ids = inputs.to(model.device), inputs["input_ids"][0].tolist()
    tokens, logps = _steps(model, inputs, [])
    base = None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = _steps(model, inputs, tokens)[1]
    dtype = str(model.dtype).removeprefix("torch.")
    return Answer(place, _asked(prompt, ids), ids, tokens, logps, base, dtype)


def _steps(model: Any, inputs: Any, forced: list[int]) -> tuple[list[int], list[float]]:
    """Tokens of a greedy generation, or those `forced`, and the log-prob of each, in nats."""
    length = inputs["input_ids"].shape[1]
    how: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": len(forced) or TOKENS}
    if forced:
        how["prefix_allowed_tokens_fn"] = lambda _, ids: [forced[len(ids) - length]]
    out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    tokens = out.sequences[0, length:].tolist()
    logps = [torch.log_softmax(step[0].float(), -1)[token] for step, token in zip(out.logits, tokens, strict=True)]
    return tokens, [float(logp) for logp in logps]


def _asked(prompt: Any, ids: list[int]) -> dict[str, Any]:
    """A prompt in a request of the OpenAI interface."""
    if isinstance(prompt, str):
        return {"prompt": ids}
    return {"messages": [{**turn, "content": _content(turn["content"])} for turn in prompt]}


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a turn; a picture without loss in the request itself."""
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    file = io.BytesIO()
    part["image"].convert("RGB").save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
