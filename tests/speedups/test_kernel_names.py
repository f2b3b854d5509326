"""FlashAttention by whichever name: served, searched and priced alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grpo_autotune.predict.speedups import effective
from grpo_autotune.speedups.base import kernel_name
from grpo_autotune.speedups.shared_prefix.applies import why_not
from grpo_autotune.speedups.shared_prefix.attention import Split
from tests.support.sample_records import trainer_facts
from tests.support.trainers import make_trainer

FLASH = {
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "kernels-community/flash-attn": "flash_attention_2",
    "kernels-community/flash-attn2": "flash_attention_2",
    "kernels-community/flash-attn2@v1.0:flash_attn_func": "flash_attention_2",
    "kernels-community/flash-attn3": "flash_attention_3",
    "kernels-community/vllm-flash-attn3": "flash_attention_3",
    "kernels-community/aiter-flash-attn": "flash_attention_2",
}
OTHERS = {
    None: "sdpa",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex_attention": "flex_attention",
    "kernels-community/metal-flash-sdpa": "kernels-community/metal-flash-sdpa",
    "kernels-community/flash-mla": "kernels-community/flash-mla",
    "kernels-community/flash-attn4": "flash_attention_4",
}


@pytest.mark.parametrize(("name", "kernel"), (FLASH | OTHERS).items())
def test_kernels_have_one_name(name: str | None, kernel: str) -> None:
    assert kernel_name(name) == kernel


def test_transformers_puts_these_in_the_place_of_a_package_that_is_missing() -> None:
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    assert {kernel_name(name) for name in FLASH_ATTN_KERNEL_FALLBACK.values()} <= {
        *FLASH_ATTN_KERNEL_FALLBACK, "flash_attention_2",
    }  # fmt: skip


@pytest.mark.parametrize("name", FLASH)
def test_a_flash_kernel_is_given_no_mask(name: str) -> None:
    masks = []

    def attention(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return query.transpose(1, 2), None

    span = SimpleNamespace(start=0, prompt=3, prompt_end=3, begin=3, end=7, rows=2, width=2, spread=None, back=None)
    layout = SimpleNamespace(spans=[span], masks={}, source=torch.zeros(1))
    states = tuple(torch.zeros(1, 1, 7, 4) for _ in range(3))
    Split(name)(attention, None, states, layout, {})
    assert masks == [None, None]
    Split("sdpa")(attention, None, states, layout, {})
    assert masks[2] is None and masks[3].shape == (1, 1, 2, 5)


def test_it_is_served_and_predicted_as_served(tiny, tmp_path, text_rows) -> None:
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    config = SimpleNamespace(speedups="auto", grpo={})
    for name in (*FLASH, *OTHERS):
        trainer.model.get_base_model().config._attn_implementation_internal = name
        served = kernel_name(name) in ("sdpa", "flash_attention_2", "flash_attention_3")
        if name is not None:
            assert (why_not(trainer) is None) == served, name
        facts = trainer_facts(attn_implementation=name)
        assert ("shared_prefix" in effective(config, facts)) == served, name
