"""The forms of attention over a shared prompt: they agree, and which is taken is what was measured.

FlexAttention runs here without its fused kernel, and with torch's own refusal of gradients on a CPU lifted: the same
masks and the same formula, computed slowly.
"""

from __future__ import annotations

import pytest

from tests.speedups.test_shared_prefix import EXACT, GROUPS, assert_exact, other_model
from tests.support.exactness import apart, differences, generation, loss_and_gradients, ready

from grpo_autotune.speedups.shared_prefix import speedup, choice  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.shared_prefix.attention import Split  # isort: skip
from grpo_autotune.speedups.sdpa import without_cudnn  # isort: skip
from grpo_autotune.speedups.shared_prefix.flex import Flex, _looks, block_mask, compiled_for_all_shapes  # isort: skip
from grpo_autotune.speedups.shared_prefix.choice import Choice, candidates  # isort: skip
from grpo_autotune.speedups.shared_prefix.layout import batch_of, layout_of  # isort: skip
import torch  # isort: skip
from torch._dynamo.exc import FailOnRecompileLimitHit  # isort: skip
from torch._dynamo.utils import counters  # isort: skip
from torch.nn.attention import flex_attention as torch_flex  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # isort: skip


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *states: None)
    torch._dynamo.reset()


@pytest.fixture
def rows():
    return [
        {"prompt": [{"role": "user", "content": f"What is {'two plus ' * (4 * row)}three?"}], "answer": str(row)}
        for row in range(4)
    ]


class Clock:
    """Ten seconds a look, and what kernels add."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def kernel(clock: Clock, seconds: float):
    """FlexAttention that takes so many seconds more than nothing."""

    def attend(*states, **kwargs):
        clock.now += seconds
        return torch_flex.flex_attention(*states, **kwargs)

    return attend


def with_form(trainer, form: Flex, clock):
    """The trainer's speed-ups, with `form` offered as if it ran on CUDA."""
    speedups = speed_up(trainer, "shared_prefix")
    speedups._installed["shared_prefix"].forms = Choice(form, clock)
    return speedups


def reason(speedups) -> str:
    return next(row.reason for row in speedups.table() if row.name == "shared_prefix")


@pytest.mark.parametrize(
    ("wanted", "tried"),
    [
        ("auto", False),
        ("shared_prefix", False),
        ([{"name": "shared_prefix"}], False),
        ([{"name": "shared_prefix", "form": "split"}], False),
        ([{"name": "shared_prefix", "form": "flex"}], True),
    ],
)
def test_flex_attention_is_tried_where_it_is_asked_for(tiny, tmp_path, rows, monkeypatch, wanted, tried):
    trainer = ready(tiny("qwen3"), rows, tmp_path, beta=0.05, **GROUPS)
    monkeypatch.setattr(speedup, "candidates", lambda device, form: candidates(torch.device("cuda"), form))
    speedups = speed_up(trainer, wanted)
    assert ("FlexAttention is timed on the first batch" in reason(speedups)) is tried
    speedups.remove()
    monkeypatch.undo()
    words = "FlexAttention needs CUDA, and this is cpu"
    assert (words in reason(speed_up(trainer, wanted))) is tried


def layout_of_lengths(prompts, completions):
    """A layout of ragged groups: a prompt of so many tokens each, and completions of so many."""
    wide, long = max(prompts), max(max(group) for group in completions)
    pairs = [(group, length) for group, lengths in enumerate(completions) for length in lengths]
    mask = torch.zeros(len(pairs), wide + long, dtype=torch.long)
    for row, (group, length) in enumerate(pairs):
        mask[row, wide - prompts[group] : wide + length] = 1
    groups = torch.tensor([group for group, _ in pairs])
    ids = mask * (groups[:, None] + 1)
    return layout_of(batch_of(ids, mask, long, groups, {}), range(len(pairs)))


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [([5], [[4, 4, 4]]), ([7, 3], [[5, 1, 2], [6, 0]]), ([140, 12], [[130, 9], [20, 20, 3]])],
)
def test_both_forms_compute_the_same(prompts, completions, window):
    layout = layout_of_lengths(prompts, completions)
    generator = torch.Generator().manual_seed(0)
    states = tuple(
        torch.randn(1, heads, layout.tokens, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    given = (sdpa_attention_forward, module, states, layout, {"scaling": 0.3, "sliding_window": window})
    wanted = Split("sdpa")(*given)
    form = Flex(torch_flex.flex_attention)
    found = form(*given)
    assert form.failed is None
    assert torch.allclose(found, wanted, atol=1e-6)
    weight = torch.randn(wanted.shape, generator=generator)
    for ours, theirs in zip(
        *(torch.autograd.grad((out * weight).sum(), states) for out in (found, wanted)), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=EXACT)


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("qwen3_vl", True), ("qwen2_5_vl", False), ("mistral", True), ("gemma3_text", False)]
)
def test_a_model_scores_and_trains_the_same(tiny, tmp_path, picture_rows, rows, monkeypatch, kind, checkpointing):
    """Heads that share keys, and windows shorter than the prompt in all layers or in some."""
    monkeypatch.setattr(speedup, "candidates", lambda device, form: [Flex(torch_flex.flex_attention)])
    monkeypatch.setattr(choice, "MARGIN", 0.0)
    model = tiny(kind) if kind.startswith("qwen") else other_model(kind, tmp_path)

    def build():
        data = picture_rows if kind.endswith("vl") else rows
        return ready(model, data, tmp_path, beta=0.05, gradient_checkpointing=checkpointing, **GROUPS)

    found = differences(build, "shared_prefix")
    assert_exact(found)
    assert found["fact.flex_passes"] == found["fact.shared_passes"] > 0


def test_autocast_to_bfloat16_is_as_far_from_float32_as_plain_trl(tiny, tmp_path, picture_rows, monkeypatch):
    monkeypatch.setattr(speedup, "candidates", lambda device, form: [Flex(torch_flex.flex_attention)])
    monkeypatch.setattr(choice, "MARGIN", 0.0)
    exact, plain, fast = (
        ready(tiny("qwen3_vl"), picture_rows, tmp_path, lora=False, beta=0.05, bf16=bf16, **GROUPS)
        for bf16 in (False, True, True)
    )
    speedups = speed_up(fast, "shared_prefix")
    batch = {**generation(exact), "group_id": torch.arange(8) // 4}
    wanted, coarse, found = (loss_and_gradients(trainer, batch)[1] for trainer in (exact, plain, fast))
    by_autocast = max(apart(coarse[name], wanted[name]) for name in wanted)
    assert max(apart(found[name], wanted[name]) for name in wanted) < 2 * by_autocast
    assert speedups.facts()["shared_prefix"]["flex_passes"] == 1


def test_under_autocast_states_of_two_dtypes_become_one():
    layout = layout_of_lengths([5], [[4, 4]])
    query, key, value = (torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = Flex(torch_flex.flex_attention)(
            sdpa_attention_forward, None, (query, key, value.bfloat16()), layout, {}
        )
    assert found is not None and found.dtype == torch.bfloat16


@pytest.mark.parametrize(("seconds", "taken"), [(-5.0, True), (5.0, False)])
def test_the_faster_form_is_taken(tiny, tmp_path, rows, seconds, taken):
    clock = Clock()
    trainer = ready(tiny("qwen3"), rows, tmp_path, beta=0.05, **GROUPS)
    speedups = with_form(trainer, Flex(kernel(clock, seconds)), clock)
    assert reason(speedups).endswith("FlexAttention is timed on the first batch of each size")
    batch = generation(trainer)
    before = torch.get_rng_state()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    assert len(speedups._installed["shared_prefix"].forms.timed) == 2
    assert torch.equal(torch.get_rng_state(), before)  # timing draws nothing, and leaves no gradient
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    loss.backward()
    facts = speedups.facts()["shared_prefix"]
    assert facts["shared_passes"] == 2 and facts["flex_passes"] == (2 if taken else 0)
    assert facts["flex_times_faster"] == pytest.approx(2.0 if taken else 2 / 3)
    assert ("2.00x in a training pass" if taken else "0.67x in a training pass") in reason(speedups)


class Breaks:
    """A kernel that cannot be compiled, from its nth call on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *states, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no kernel image\nfor this device")
        return torch_flex.flex_attention(*states, **kwargs)


def without_mask(query, key, value, **kwargs):
    return torch_flex.flex_attention(query, key, value, **{**kwargs, "block_mask": None})


BROKEN = {
    "at once": (lambda: Breaks(0), "RuntimeError: no kernel image"),
    "while it trains": (lambda: Breaks(choice.WARMUP + choice.ROUNDS + 1), "no kernel image"),
    "not the same": (lambda: without_mask, "it is off by"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_fails_is_told_once_and_left(tiny, tmp_path, rows, monkeypatch, caplog, name):
    make, words = BROKEN[name]
    monkeypatch.setattr(speedup, "candidates", lambda device, form: [Flex(make())])
    monkeypatch.setattr(choice, "MARGIN", 0.0)
    found = differences(lambda: ready(tiny("qwen3"), rows, tmp_path, beta=0.05, **GROUPS), "shared_prefix")
    assert_exact(found)
    told = [record.getMessage() for record in caplog.records if "FlexAttention" in record.getMessage()]
    assert len(told) == 1 and "shared_prefix goes on without FlexAttention" in told[0] and words in told[0]
    assert "for this device" not in told[0]
    assert (found["fact.flex_passes"] > 0) is (name == "while it trains")


CALLS = 2 * (choice.WARMUP + choice.ROUNDS) + 2
"""Of the kernel before the forward of a training pass: timing, the two layers of the reference, and timing."""


class FailsOnce:
    """A kernel that fails at its nth call, counted from 0."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, *states, **kwargs):
        self.calls += 1
        if self.calls == self.number + 1:
            raise RuntimeError("no kernel image\nfor this device")
        return torch_flex.flex_attention(*states, **kwargs)


def checkpoint(trainer, reentrant):
    """The trainer, with layers that are computed again in one of torch's two ways."""
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": reentrant}
    trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def checkpointed(tiny, tmp_path, rows, monkeypatch, number, reentrant):
    """The differences where the kernel fails at its nth call in a checkpointed training pass."""
    monkeypatch.setattr(speedup, "candidates", lambda device, form: [Flex(FailsOnce(CALLS + number))])
    monkeypatch.setattr(choice, "MARGIN", 0.0)
    grpo = {"lora": False, "beta": 0.05, "gradient_checkpointing": True, **GROUPS}
    return differences(lambda: checkpoint(ready(tiny("qwen3"), rows, tmp_path, **grpo), reentrant), "shared_prefix")


@pytest.mark.parametrize(("number", "reentrant"), [(1, False), (1, True), (2, True)])
def test_a_layer_that_is_computed_again_finds_the_form_that_it_had(
    tiny, tmp_path, rows, monkeypatch, caplog, number, reentrant
):
    """The kernel fails at the second layer, or where the layers are computed again with nothing kept of the first."""
    assert_exact(checkpointed(tiny, tmp_path, rows, monkeypatch, number, reentrant))
    assert "goes on without FlexAttention: RuntimeError: no kernel image" in caplog.text


def test_a_kernel_that_fails_where_a_checkpoint_counts_on_it_is_told(tiny, tmp_path, rows, monkeypatch):
    with pytest.raises(RuntimeError, match="no kernel image"):
        checkpointed(tiny, tmp_path, rows, monkeypatch, number=2, reentrant=False)


def test_the_limit_of_versions_is_a_failure_like_others():
    def kernel(*states, **kwargs):
        raise FailOnRecompileLimitHit("Hard failure due to fullgraph=True")

    layout = layout_of_lengths([5], [[4, 4]])
    states = tuple(torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    form = Flex(kernel)
    assert form(sdpa_attention_forward, None, states, layout, {}) is None
    assert form.failed == "FailOnRecompileLimitHit: Hard failure due to fullgraph=True"


def test_growing_layouts_share_versions_of_the_kernel():
    """torch's own limit is 8, and its kernel would not be compiled beyond it."""

    def attend(query, key, value, *, block_mask, scale, enable_gqa):
        return query * scale + block_mask.kv_num_blocks.sum() + (key.sum() + value.sum())

    counters.clear()
    form = Flex(compiled_for_all_shapes(attend, backend="eager"))
    for number in range(12):
        layout = layout_of_lengths([100 + 30 * number], [[20 + number, 9]])
        for grad in (True, False):
            states = tuple(
                torch.randn(1, layout.tokens, heads, 16).transpose(1, 2).requires_grad_(grad) for heads in (4, 2, 2)
            )
            assert form(sdpa_attention_forward, None, states, layout, {"scaling": 0.3}) is not None
    assert 0 < counters["stats"]["unique_graphs"] <= 8


def test_forms_are_timed_on_states_laid_out_as_projections_leave_them(tiny, tmp_path, rows, monkeypatch):
    strides = set()

    def kernel(*states, **kwargs):
        strides.update(state.transpose(1, 2).is_contiguous() for state in states)
        return torch_flex.flex_attention(*states, **kwargs)

    trainer = ready(tiny("llama"), rows, tmp_path, beta=0.0, **GROUPS)
    with_form(trainer, Flex(kernel), Clock())
    loss_and_gradients(trainer, generation(trainer))
    assert strides == {True}


@pytest.mark.parametrize("window", [None, 5, 150])
@pytest.mark.parametrize(
    ("prompts", "completions"),
    [([5], [[4, 4]]), ([140, 300, 12], [[130, 9], [400, 20, 3], [0, 1]]), ([128, 256], [[129, 257], [1, 2, 300]])],
)
def test_blocks_are_those_of_the_whole_mask_and_it_is_not_made(prompts, completions, window):
    layout = layout_of_lengths(prompts, completions)
    tokens = layout.tokens
    with Largest() as largest:
        found = block_mask(layout, window)
    wanted = torch_flex.create_block_mask(_looks(layout, window), None, None, tokens, tokens, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(wanted, f"{kind}_num_blocks")
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts)
        for ours, theirs, count in zip(
            *(getattr(mask, f"{kind}_indices")[0, 0] for mask in (found, wanted)), counts[0, 0], strict=True
        ):
            assert torch.equal(ours[:count], theirs[:count])
    assert found.seq_lengths == wanted.seq_lengths
    assert largest.numbers <= max(tokens, (tokens // 128 + 2) ** 2)


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


def test_attention_on_spans_keeps_off_the_backend_that_plans_for_each_shape():
    layout = layout_of_lengths([5, 3], [[4, 2], [3]])
    states = tuple(torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    on = []

    def attention(*given, **kwargs):
        on.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise ValueError("enough")

    before = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ValueError, match="enough"):
        Split("sdpa")(attention, None, states, layout, {})
    assert before and on == [False] and torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_stays_where_a_user_has_switched_the_others_off(monkeypatch):
    for name in ("flash", "mem_efficient", "math"):
        monkeypatch.setattr(torch.backends.cuda, f"{name}_sdp_enabled", lambda: False)
    with without_cudnn():
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_layers_that_change_scores_are_not_served():
    layout = layout_of_lengths([5], [[4, 4]])
    states = tuple(torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    form = Flex(torch_flex.flex_attention)
    assert form(sdpa_attention_forward, None, states, layout, {"softcap": 50.0}) is None
    assert form.failed == "NotImplementedError: layers with softcap are not supported"
