"""Effect of the sampling parameters on a distribution, computed from logits as vLLM does it.

vLLM gives back the log-probs of the distribution that it drew from. TRL asks for exactly that, since its importance
weights need them; to see whether engine and trainer hold the same *model*, the same steps are applied to the trainer's
logits: penalties, temperature, `min_p`, `top_k`, `top_p` (vllm/v1/sample/sampler.py).

Shapes: T tokens of one completion, V words of the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grpo_autotune.rollout.options import GREEDY

PLAIN: dict[str, float] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
OTHERS = ("logit_bias", "bad_words", "allowed_token_ids", "structured_outputs", "min_tokens", "logits_processors")
"""Parameters that change a distribution too, and whose effect is not computed here."""


def parameters(source: Any) -> dict[str, float]:
    """The numbers of `PLAIN` that a `SamplingParams` or a mapping holds, plain ones where it has none."""
    asked = {name: _get(source, name) for name in PLAIN}
    given = {name: plain if asked[name] is None else float(asked[name]) for name, plain in PLAIN.items()}
    return given | {"top_k": max(0.0, given["top_k"])}


def others(source: Any) -> list[str]:
    """Names of `OTHERS` that are set."""
    return [name for name in OTHERS if _get(source, name)]


def _get(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def not_plain(given: Mapping[str, float]) -> dict[str, float]:
    """The parameters that are not plain sampling."""
    return {name: value for name, value in given.items() if value != PLAIN[name]}


def differences(engine: Mapping[str, float], trainer: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Parameters that the two do not share: (the engine's, the trainer's)."""
    return {name: (engine[name], trainer[name]) for name in PLAIN if not math.isclose(engine[name], trainer[name])}


def shapes(given: Mapping[str, float], temperature: float) -> bool:
    """True if sampling with `given` gives other log-probs than a softmax at `temperature`."""
    return any(value != PLAIN[name] for name, value in given.items() if name != "temperature") or not math.isclose(
        given["temperature"], temperature
    )


def log_probs(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, prompt: Sequence[int], given: Mapping[str, float]
) -> torch.Tensor:
    """Log-probs (T,) of the tokens in the distribution that vLLM draws from, by the model's logits (T, V), each row
    before its token, and parameters as `parameters` gives them. Penalties count the prompt's token ids.

    A token outside the part of the distribution that is kept gets the number it would have if it were inside."""
    logits_TV = _penalised(logits_TV.float(), tokens_T, prompt, given)
    if given["temperature"] < GREEDY:
        return _pick(logits_TV, tokens_T) - logits_TV.logsumexp(dim=-1)
    logits_TV = logits_TV / given["temperature"]
    return _pick(logits_TV, tokens_T) - _truncated(logits_TV, given).logsumexp(dim=-1)


def _pick(values_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    return values_TV.gather(-1, tokens_T[:, None])[:, 0]


def _penalised(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, prompt: Sequence[int], given: Mapping[str, float]
) -> torch.Tensor:
    """Repetition penalty over prompt and output, frequency and presence penalty over the output so far."""
    repetition, presence, frequency = (given[f"{name}_penalty"] for name in ("repetition", "presence", "frequency"))
    if (repetition, presence, frequency) == (1.0, 0.0, 0.0):
        return logits_TV
    before_TV = torch.zeros_like(logits_TV)
    before_TV.scatter_(-1, tokens_T[:, None], 1.0)
    counts_TV = before_TV.cumsum(dim=0) - before_TV
    in_prompt_V = torch.zeros_like(logits_TV[0], dtype=torch.bool)
    in_prompt_V[torch.as_tensor(prompt, dtype=torch.long, device=logits_TV.device)] = True
    seen_TV = in_prompt_V[None] | (counts_TV > 0)
    repeated_TV = torch.where(logits_TV > 0, logits_TV / repetition, logits_TV * repetition)
    logits_TV = torch.where(seen_TV, repeated_TV, logits_TV)
    return logits_TV - frequency * counts_TV - presence * (counts_TV > 0)


def _truncated(logits_TV: torch.Tensor, given: Mapping[str, float]) -> torch.Tensor:
    """Logits with minus infinity outside the part that `min_p`, `top_k` and `top_p` keep, in vLLM's order."""
    from transformers.generation import logits_process

    if given["min_p"] > 0.0:
        logits_TV = logits_process.MinPLogitsWarper(given["min_p"])(None, logits_TV)
    if given["top_k"] > 0:
        logits_TV = logits_process.TopKLogitsWarper(int(given["top_k"]))(None, logits_TV)
    if given["top_p"] < 1.0:
        logits_TV = logits_process.TopPLogitsWarper(given["top_p"])(None, logits_TV)
    return logits_TV
