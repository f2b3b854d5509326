"""What is told of a prepared trainer that should share its model, and of a checkpoint that another sharding saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_autotune.errors import ConfigError, EnvironmentProblem
from grpo_autotune.runs.checkpoints import saved_by, seal
from grpo_autotune.seams.sharding import SHARDING, check_sharded, sharding_fact
from grpo_autotune.train.runs.reshard import fit_checkpoint


def prepared(*, stage: int | None = None, ranks: int = 2, part: int = 2, **args: Any) -> Any:
    """A trainer of 8 numbers, 4 of them trained, after its preparation: DeepSpeed's engine where there is a `stage`,
    and `part` numbers in the optimizer of this rank."""
    model = torch.nn.Linear(4, 2, bias=False)
    frozen = torch.nn.Linear(4, 1, bias=False).requires_grad_(False)
    model.add_module("frozen", frozen)
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(single_partition_of_fp32_groups=[torch.zeros(part)]),
        zero_optimization_stage=lambda: stage,
    )
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(
        num_processes=ranks,
        device=torch.device("cpu"),
        state=SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=None),
    )
    return SimpleNamespace(
        model=model,
        model_wrapped=model if stage is None else engine,
        accelerator=accelerator,
        args=SimpleNamespace(deepspeed=None, fsdp=None, world_size=ranks, sync_ref_model=False, **args),
        is_fsdp_enabled=False,
    )


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in SHARDING.values():
        monkeypatch.delenv(variable, raising=False)


def test_a_run_says_what_is_shared() -> None:
    told = "ZeRO-2 over 2 processes: each holds 100% of the parameters and 50% of the optimizer's state"
    assert sharding_fact(prepared(stage=2, part=4)) == {"sharding": told}
    assert str(check_sharded(prepared(stage=3, ranks=1, part=8))) == "ZeRO-3 in one process, which holds everything"
    assert check_sharded(prepared()) is None and sharding_fact(prepared()) == {}


@pytest.mark.parametrize("variable", SHARDING.values())
def test_sharding_that_did_not_come_about_is_an_error(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(EnvironmentProblem, match=f"{variable}: sharding was asked for, and each of 2 processes"):
        check_sharded(prepared())
    with pytest.raises(EnvironmentProblem, match=variable):  # an engine whose optimizer has everything on each rank
        check_sharded(prepared(stage=2, part=8))
    assert check_sharded(prepared(ranks=1)) is None


def saved(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_checkpoint_tells_who_saved_it(tmp_path: Path) -> None:
    two, three = ("global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt")
    states = [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)]
    assert saved_by(saved(tmp_path / "two", two, *states)) == ("ZeRO-1 or 2", 3)
    assert saved_by(saved(tmp_path / "three", three, *states)) == ("ZeRO-3", 3)
    seal(saved(tmp_path / "plain", "optimizer.pt"), 4, 64)
    assert saved_by(tmp_path / "plain") == ("no sharding", 4)
    assert saved_by(saved(tmp_path / "zero", two)).kind == "ZeRO-0"
    fit_checkpoint(prepared(stage=1, ranks=3), tmp_path / "two")
    fit_checkpoint(prepared(), tmp_path / "plain")
    for trainer, place in ((prepared(), "two"), (prepared(stage=3), "two"), (prepared(stage=2), "plain")):
        with pytest.raises(ConfigError, match="which cannot read its state") as caught:
            fit_checkpoint(trainer, tmp_path / place)
        assert "\n" not in str(caught.value)
