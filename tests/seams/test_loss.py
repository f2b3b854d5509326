"""One fact for all who ask: does TRL's loss depend on the split into micro batches?"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.seams.loss import (
    DIVISORS,
    LOSS_KEYS,
    Divisor,
    has_aux_loss,
    micro_batch_terms,
    micro_batch_terms_of,
    micro_batch_terms_of_keys,
)

QWEN3_MOE = {"num_experts": 128, "output_router_logits": False, "router_aux_loss_coef": 0.001}
DEEPSEEK = {"n_routed_experts": 64, "output_router_logits": False}
"""As transformers writes them: DeepSeek V3 declares no coefficient, which TRL takes as 0."""


def names(**keys: Any) -> list[str]:
    return [term.name for term in micro_batch_terms_of_keys({"loss_type": "dapo", **keys}, {})]


def test_the_table_is_trls() -> None:
    import trl.trainer.grpo_trainer as module

    source = inspect.getsource(module.GRPOTrainer._compute_loss)
    branches = re.findall(
        r'if self\.loss_type (?:in \[([^\]]*)\]|== ("\w+")):\n(?: +#.*\n)* +(loss|normalizer) = ', source
    )
    named = {name for many, one, _ in branches for name in re.findall(r"\w+", many or one)}
    assert named == set(DIVISORS)
    assert set(DIVISORS.values()) == set(get_args(Divisor))
    assert set(LOSS_KEYS) <= set(grpo_keys())


@pytest.mark.parametrize("loss_type", DIVISORS)
def test_every_loss_type(loss_type: str) -> None:
    assert bool(micro_batch_terms(loss_type)) == (loss_type == "bnpo")


def test_an_unknown_loss_depends_on_it() -> None:
    (term,) = micro_batch_terms("newest")
    assert term.name == "the loss type newest"
    assert term.reason == "grpo.loss_type newest is not known to be independent of the micro batch"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"loss_type": "bnpo"}, ["the loss type bnpo"]),
        ({"top_entropy_quantile": 1.0}, []),
        ({"top_entropy_quantile": None}, []),
        ({"top_entropy_quantile": 0.2}, ["top_entropy_quantile"]),
        ({"entropy_coef": 0.0}, []),
        ({"entropy_coef": 0.01}, ["the entropy bonus"]),
        ({"use_adaptive_entropy": True}, ["the entropy bonus"]),
        ({"loss_type": "bnpo", "entropy_coef": 0.1}, ["the loss type bnpo", "the entropy bonus"]),
        ({"router_aux_loss_coef": 0.1}, []),  # a dense model has no such loss
    ],
)
def test_the_keys_of_a_configuration(keys: dict[str, Any], expected: list[str]) -> None:
    assert names(**keys) == expected


@pytest.mark.parametrize(
    ("model", "coefficient", "on"),
    [
        ({}, None, False),
        ({"num_experts": 0}, None, False),
        (QWEN3_MOE, None, True),
        (QWEN3_MOE, 0.0, False),
        ({"text_config": QWEN3_MOE}, None, True),
        ({**QWEN3_MOE, "router_aux_loss_coef": 0.0}, None, False),
        ({**QWEN3_MOE, "router_aux_loss_coef": 0.0}, 0.01, True),
        (DEEPSEEK, None, False),
        (DEEPSEEK, 0.01, True),
        ({"num_local_experts": 8}, None, True),  # a published config.json without its class's defaults
        ({"num_local_experts": 8}, 0.0, False),
        ({"n_routed_experts": 64}, None, True),
        ({"n_routed_experts": 64, "router_aux_loss_coef": 0.0}, None, False),
    ],
)
def test_the_routers_auxiliary_loss(model: dict[str, Any], coefficient: float | None, on: bool) -> None:
    assert has_aux_loss(model, coefficient) is on
    terms = micro_batch_terms_of_keys({"loss_type": "dapo", "router_aux_loss_coef": coefficient}, model)
    assert [term.name for term in terms] == (["the experts' balance term"] if on else [])


@pytest.mark.parametrize("model", ["Qwen3MoeConfig", "DeepseekV3Config", "Qwen3Config"])
@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_a_configuration_and_its_trainer_say_the_same(model: str, coefficient: float | None) -> None:
    import json

    import transformers

    config = getattr(transformers, model)()
    given = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    trainer = SimpleNamespace(
        loss_type="dapo",
        top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=hasattr(config, "output_router_logits") and given != 0.0,
    )
    written = json.loads(config.to_json_string(use_diff=False))
    keys = {"loss_type": "dapo", "router_aux_loss_coef": coefficient}
    assert micro_batch_terms_of_keys(keys, written) == micro_batch_terms_of(trainer)
