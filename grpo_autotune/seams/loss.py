"""TRL's loss: the divisor of each loss type, and the terms that depend on how a step is split into micro batches.

Read off `_compute_loss` and `__init__` of trl/trainer/grpo_trainer.py, TRL 1.16. Where the divisor does not depend on
the rows of the micro batch, the sum over equal micro batches of an optimizer step is the same however its rows are
dealt. A loss type that is not in the table is taken to depend on them.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Divisor = Literal["rows", "micro-batch tokens", "generation tokens"]

DIVISORS: dict[str, Divisor] = {
    "grpo": "rows",
    "sapo": "rows",
    "dr_grpo": "rows",  # times max_completion_length, a constant
    "luspo": "rows",
    "bnpo": "micro-batch tokens",
    "dapo": "generation tokens",
    "cispo": "generation tokens",
    "vespo": "generation tokens",
}
"""`loss_type` -> the number that the summed loss of a micro batch is divided by."""

LOSS_KEYS = ("loss_type", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "router_aux_loss_coef")
"""The keys of `GRPOConfig` that decide it."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of experts in a config.json; absent or 0 in a dense model."""


class Term(NamedTuple):
    """A part of the loss that depends on the micro batch."""

    name: str  # as a sentence names it
    reason: str  # names the configuration's key and the dependence


def micro_batch_terms(
    loss_type: str, *, top_entropy_quantile: float = 1.0, entropy_bonus: bool = False, aux_loss: bool = False
) -> tuple[Term, ...]:
    """The terms of a loss that depend on how a step is split into micro batches; empty where none does. The threshold
    of `top_entropy_quantile`, a share of tokens, is a micro batch's below 1; the entropy bonus and the router's
    auxiliary loss are means over a micro batch."""
    terms: list[Term] = []
    divisor = DIVISORS.get(loss_type)
    if divisor in (None, "micro-batch tokens"):
        known = f"grpo.loss_type {loss_type} divides by the tokens of each micro batch"
        unknown = f"grpo.loss_type {loss_type} is not known to be independent of the micro batch"
        terms.append(Term(f"the loss type {loss_type}", unknown if divisor is None else known))
    if top_entropy_quantile < 1.0:
        terms.append(
            Term("top_entropy_quantile", "grpo.top_entropy_quantile takes its threshold from each micro batch")
        )
    if entropy_bonus:
        reason = "grpo.entropy_coef or grpo.use_adaptive_entropy takes a mean over each micro batch"
        terms.append(Term("the entropy bonus", reason))
    if aux_loss:
        reason = "grpo.router_aux_loss_coef takes a mean over each micro batch"
        terms.append(Term("the experts' balance term", reason))
    return tuple(terms)


def micro_batch_terms_of(trainer: Any) -> tuple[Term, ...]:
    """The same for a `trl.GRPOTrainer`."""
    return micro_batch_terms(
        trainer.loss_type,
        top_entropy_quantile=trainer.top_entropy_quantile,
        entropy_bonus=trainer._entropy_bonus_enabled,
        aux_loss=trainer.aux_loss_enabled,
    )


def micro_batch_terms_of_keys(grpo: Mapping[str, Any], model_config: Mapping[str, Any]) -> tuple[Term, ...]:
    """The same for a configuration: values of `LOSS_KEYS`, of which all but `loss_type` may be absent or None for TRL's
    default, and the model's config.json, empty where it is not known."""
    quantile = grpo.get("top_entropy_quantile")
    return micro_batch_terms(
        grpo["loss_type"],
        top_entropy_quantile=1.0 if quantile is None else quantile,
        entropy_bonus=bool(grpo.get("entropy_coef") or grpo.get("use_adaptive_entropy")),
        aux_loss=has_aux_loss(model_config, grpo.get("router_aux_loss_coef")),
    )


def has_aux_loss(model_config: Mapping[str, Any], coefficient: float | None) -> bool:
    """True if the router's auxiliary loss is on, by TRL's rule: the model can return router logits, and the coefficient
    is not 0; that of the model where none is given, 0 where the model declares none. A config.json as published leaves
    out what its class sets by default: a mixture of experts that says nothing about router logits is taken to have
    them, with a coefficient other than 0."""
    text = model_config.get("text_config") or model_config
    if "output_router_logits" in text:
        default: float | None = text.get("router_aux_loss_coef", 0.0)
    elif any(text.get(key) for key in EXPERT_KEYS):
        default = text.get("router_aux_loss_coef")
    else:
        return False
    return (default if coefficient is None else coefficient) != 0.0
