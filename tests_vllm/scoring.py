"""How far a colocated engine's log-probs are from the trainer's, on completions that the engine samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

SAMPLES, TOKENS = 8, 6
QUESTION = "What is shown? " * 12
"""Longer than a block of `BLOCK` tokens, so that the prefix cache has something to keep."""

BLOCK = 32
"""vLLM's `block_size`: the CPU build's smallest."""


def apart_nats(trainer: Any, images: Sequence[Any] = ()) -> float:
    """Largest difference over the tokens of a few completions of one question with these images.

    Completions with an image's placeholder in them are left out: the trainer would look for its image.
    """
    from vllm import SamplingParams

    inputs, prompt = prompt_of(trainer, images)
    request: dict[str, Any] = {"prompt_token_ids": prompt}
    if images:
        request["multi_modal_data"] = {"image": list(images)}
    sampling = SamplingParams(temperature=1.0, logprobs=0, max_tokens=TOKENS, ignore_eos=True)
    outputs = trainer.vllm_generation.llm.generate([request] * SAMPLES, sampling_params=sampling, use_tqdm=False)
    assert len(outputs[0].prompt_token_ids) == inputs["input_ids"].shape[1] > BLOCK
    found = []
    for output in (output.outputs[0] for output in outputs):
        if not special(trainer) & set(output.token_ids):
            engine = [next(iter(position.values())).logprob for position in output.logprobs]
            found.append(apart(trainer_logps(trainer, inputs, list(output.token_ids)), engine))
    assert found, "every completion has a placeholder in it"
    return max(found)


def prompt_of(trainer: Any, images: Sequence[Any]) -> tuple[dict[str, Any], list[int]]:
    """What the model takes, and the prompt with one placeholder an image, as vLLM takes it."""
    processor = trainer.processing_class
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]
    message = {"role": "user", "content": content if images else QUESTION}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    tokenizer = getattr(processor, "tokenizer", processor)
    if images:
        return dict(processor(text=[text], images=[list(images)], return_tensors="pt")), tokenizer(text)["input_ids"]
    return dict(tokenizer([text], return_tensors="pt")), tokenizer(text)["input_ids"]


def special(trainer: Any) -> set[int]:
    """Tokens that are no text."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def trainer_logps(trainer: Any, inputs: dict[str, Any], completion: list[int]) -> list[float]:
    """The trainer's log-probs of a completion."""
    tail = torch.tensor([completion])
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tail], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(tail)], dim=1)
    with torch.no_grad():
        logits = trainer.model(**whole).logits[0, -len(completion) - 1 : -1]
    logps: list[float] = logits.log_softmax(-1).gather(-1, tail[0][:, None])[:, 0].tolist()
    return logps


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    """Largest difference."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
