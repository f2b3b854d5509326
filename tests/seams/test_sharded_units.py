"""The layers that FSDP2 shards a model by, and what is no unit of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from grpo_autotune.errors import ConfigError
from grpo_autotune.seams.fully_sharded import check_output_layer, fit, gathers, units, whole


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
    plain[1].weight.ds_id = 0  # as ZeRO-3 marks the weights that it has cut
    assert gathers(plain)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A group whose other rank is torch's stand-in: `fully_shard` sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("trained", "alone"), [(True, True), (False, True), (True, False)])
def test_an_output_layer_of_its_own_may_not_be_trained(two_ranks: None, trained: bool, alone: bool) -> None:
    """TRL's loss takes its weight past the layer: weights ended 8e-4 apart from plain DDP's after three steps, and as
    DDP's where a norm is in its unit."""
    parts = model("DecoderLayer")
    parts.get_input_embeddings, parts.get_output_embeddings = lambda: parts[0], lambda: parts[2]
    parts[2].requires_grad_(trained)
    mesh = dist.init_device_mesh("cpu", (2,))
    for unit in parts if alone else (parts[0], list(parts[1:])):
        fully_shard(unit, mesh=mesh)
    fully_shard(parts, mesh=mesh)
    if trained and alone:
        with pytest.raises(ConfigError, match="would get wrong gradients"):
            check_output_layer(parts)
    else:
        check_output_layer(parts)
