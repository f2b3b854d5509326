"""The layers that FSDP2 shards a model by, and what is no unit of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.errors import ConfigError
from grpo_autotune.seams.fully_sharded import fit, gathers, mend, units, whole


class DecoderLayer(torch.nn.Linear):
    """As the model names it."""


class VisionBlock(torch.nn.Linear):
    """The same."""


def model(*names: str) -> Any:
    parts = torch.nn.Sequential(DecoderLayer(2, 2), VisionBlock(2, 2), torch.nn.Linear(2, 2))
    parts._no_split_modules = set(names)
    return parts


def test_layers_are_those_that_the_model_names_and_has() -> None:
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    fit(plugin, model("DecoderLayer", "VisionBlock", "AudioLayer"))
    assert plugin.transformer_cls_names_to_wrap == ["DecoderLayer", "VisionBlock"]
    plugin.transformer_cls_names_to_wrap = ["VisionBlock"]
    fit(plugin, model("DecoderLayer"))
    assert plugin.transformer_cls_names_to_wrap == ["VisionBlock"]


def test_a_layer_that_is_not_there_is_one_line() -> None:
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["DecodrLayer"])
    with pytest.raises(ConfigError, match=r"cls_to_wrap: the model has no layer DecodrLayer\. Nearest: DecoderLayer"):
        fit(plugin, model("DecoderLayer"))


def test_a_model_that_nobody_shards_is_left_alone() -> None:
    plain, weight = model(), torch.ones(2)
    assert list(units(plain)) == [] and not gathers(plain) and whole(weight) is weight
    mend(plain)
    assert not plain._forward_pre_hooks
    plain[1].weight.ds_id = 0  # as ZeRO-3 marks the weights that it has cut
    assert gathers(plain)
