"""A key that needs a package which is not installed is refused under its own name."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_autotune.config import packages
from grpo_autotune.config.packages import check_packages
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import EnvironmentProblem


def config(**sections: Any) -> RunConfig:
    model = {"name_or_path": "m"} | sections.pop("model", {})
    return RunConfig.from_dict({"model": model, "data": {"path": "d"}, "rewards": [{"name": "r"}], **sections})


NEEDS: list[tuple[dict[str, Any], str]] = [
    ({"grpo": {"use_vllm": True}}, "grpo.use_vllm: true needs the package vllm, which"),
    ({"model": {"load_in_4bit": True}, "peft": {}}, "model.load_in_4bit: true needs the package bitsandbytes"),
    ({"grpo": {"use_liger_kernel": True}}, "grpo.use_liger_kernel: true needs the package liger_kernel"),
    (
        {"model": {"attn_implementation": "flash_attention_2"}},
        "model.attn_implementation: flash_attention_2 needs the package flash_attn, which is not installed. "
        "Install it (pip install flash-attn), or write sdpa.",
    ),
    (
        {"model": {"attn_implementation": "flash_attention_3"}},
        "model.attn_implementation: flash_attention_3 needs the package kernels, which is not installed. "
        "Install it (pip install kernels), or write sdpa.",
    ),
    ({"grpo": {"deepspeed": "zero3"}}, "grpo.deepspeed: this key needs the package deepspeed, which"),
    (
        {"model": {"attn_implementation": "kernels-community/flash-attn3"}},
        "model.attn_implementation: kernels-community/flash-attn3 needs the package kernels",
    ),
    ({"grpo": {"report_to": ["none", "wandb"]}}, "grpo.report_to: wandb needs the package wandb"),
    ({"grpo": {"optim": "paged_adamw_8bit"}}, "grpo.optim: paged_adamw_8bit needs the package bitsandbytes"),
]


@pytest.mark.parametrize(("sections", "expected"), NEEDS)
def test_a_missing_package_is_named_with_its_key(
    sections: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nothing_installed:
        nothing_installed.setattr(packages.importlib.util, "find_spec", lambda package: None)
        with pytest.raises(EnvironmentProblem) as caught:
            check_packages(config(**sections), {})
    assert str(caught.value).startswith(expected)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda package: object())
    check_packages(config(**sections), {})


def test_a_run_that_reports_nowhere_needs_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda package: None)
    check_packages(config(grpo={"report_to": "wandb", "optim": "adamw_torch"}), {"report_to": "none"})
    check_packages(config(model={"attn_implementation": "sdpa"}), {})
