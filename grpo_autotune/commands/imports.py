"""Preparations before transformers and TRL are imported."""

from __future__ import annotations

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import say
from grpo_autotune.knobs.context import model_config
from grpo_autotune.rollout.server.process import Weights, weights_of
from grpo_autotune.seams.torchvision_compat import ensure_torchvision, tell_once


def mend_torchvision() -> None:
    """Make torchvision importable beside a torch it was not built for, and say so once per environment."""
    finding = ensure_torchvision()
    if finding is not None:
        tell_once(finding, say)


def served_weights(config: RunConfig) -> Weights:
    """The weights that a run's server serves, built or downloaded first where they are missing.

    Raises:
        ConfigError: There is no such model.
    """
    return weights_of(config, _source, model_config)


def _source(config: RunConfig) -> str:
    from grpo_autotune.train.models.load import model_source

    return model_source(config, say)
