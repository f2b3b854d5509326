"""The trainer's own log-probs of sampled tokens, as its model gives them and as the engine's sampling would.

Only where the two differ, or where TRL computed none: a few rows of a generation, and the first tokens of each, are run
through the model once more with all their logits.

Shapes: B rows of a generation, P prompt tokens, C completion tokens, R and K those rows and tokens that are looked at.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from grpo_autotune.rollout.fidelity.check_text import undisturbed
from grpo_autotune.rollout.fidelity.sampling import PLAIN, log_probs
from grpo_autotune.seams.trainer_access import BOTH_KEYS, IMAGE_KEYS

ROWS = 4
TOKENS = 128


class Rescored(NamedTuple):
    """Log-probs (R, K) of the model at the trainer's temperature, and in the distribution the engine drew from."""

    plain: torch.Tensor
    drawn: torch.Tensor


def rescore(trainer: Any, output: Mapping[str, Any], given: Mapping[str, float]) -> Rescored:
    """Score the first rows of a generation (TRL's own batch, before it is shuffled) with the trainer's model."""
    prompt_BP, completion_BC = output["prompt_ids"], output["completion_ids"]
    rows, keep = min(ROWS, len(prompt_BP)), min(TOKENS, completion_BC.shape[1])
    length = prompt_BP.shape[1] + keep
    ids = torch.cat([prompt_BP, completion_BC], dim=1)[:rows, :length]
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)[:rows, :length]
    media = {key: output[key] for key in IMAGE_KEYS if output.get(key) is not None}
    media |= {key: output[key][:, :length] for key in BOTH_KEYS if output.get(key) is not None}
    stand_in = _StandIn(trainer, keep, given)
    method = type(trainer)._get_per_token_logps_and_entropies  # without what speed-ups put on the instance
    with undisturbed(trainer, dropout=True):
        plain, drawn, _ = method(trainer, stand_in, ids, mask, keep, batch_size=1, compute_entropy=True, **media)
    return Rescored(plain, drawn)


class _Scored(NamedTuple):
    log_probs: torch.Tensor
    entropy: torch.Tensor


class _StandIn:
    """Stands where TRL's method calls the model with one row, and keeps two numbers a token of all its logits."""

    def __init__(self, trainer: Any, keep: int, given: Mapping[str, float]) -> None:
        self.model, self.keep, self.given = trainer.model, keep, given
        self.plain = PLAIN | {"temperature": float(trainer.temperature)}

    def __call__(self, *, labels: Any, fused_lm_head: bool, **inputs: Any) -> _Scored:
        logits_KV = self.model(**inputs, use_cache=False, logits_to_keep=self.keep + 1).logits[0, :-1]
        ids, mask = inputs["input_ids"][0], inputs["attention_mask"][0]
        tokens_K = ids[-self.keep :]
        prompt = ids[: -self.keep][mask[: -self.keep].bool()].tolist()
        plain, drawn = (log_probs(logits_KV, tokens_K, prompt, given) for given in (self.plain, self.given))
        return _Scored(plain[None], drawn[None])
