"""The cascade form: output and every gradient against one softmax in float64, and what reaches the kernels of CUDA."""

from __future__ import annotations

import math

import pytest

from tests.speedups.test_shared_prefix import GROUPS, assert_exact, other_model
from tests.speedups.test_shared_prefix_forms import checkpoint, layout_of_lengths
from tests.support.exactness import differences, ready

from grpo_autotune.speedups.shared_prefix.attention import Split  # isort: skip
from grpo_autotune.speedups.shared_prefix.cascade import Cascade  # isort: skip
from grpo_autotune.speedups.shared_prefix.choice import candidates  # isort: skip
from grpo_autotune.speedups.shared_prefix.varlen import FlashCpu, FlashCuda  # isort: skip
import torch  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # isort: skip

SCALE = 0.3
LAYOUTS = [
    ([5], [[4, 4, 4]]),
    ([7, 3], [[5, 1, 2], [6, 0]]),
    ([9, 4, 6], [[1, 0], [3, 5], [2, 2]]),
    ([140, 12], [[130, 9], [20, 20, 3]]),
    ([9], [[1, 0]]),
]


class Layer(torch.nn.Module):
    """What an attention function reads of its layer."""

    num_key_value_groups, is_causal, layer_idx = 2, True, 0


def states_of(layout, dtype, heads=4):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, layout.tokens, number, 16, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, heads // 2, heads // 2)
    )


def reference(states, layout):
    """One softmax over all tokens, masked; (1, T, H, D)."""
    query, key, value = states
    key, value = (state.repeat_interleave(query.shape[1] // state.shape[1], dim=1) for state in (key, value))
    at = torch.arange(layout.tokens)
    owner, prompt = layout.owner, layout.prompt
    looks = (at[None] <= at[:, None]) & (prompt[None] == prompt[:, None])
    looks &= (owner[None] < 0) | (owner[None] == owner[:, None])
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~looks, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def cascaded(states, layout, flash=None, **kwargs):
    form = Cascade(flash or FlashCpu(), timed=False)
    output = form(sdpa_attention_forward, Layer(), states, layout, {"scaling": SCALE, **kwargs})
    assert form.failed is None
    return output


def with_gradients(attend, layout, dtype):
    states = states_of(layout, dtype)
    output = attend(states, layout)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * weight.to(dtype)).sum(), states)]


def off(found, wanted):
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("prompts", "completions"), LAYOUTS)
def test_output_and_gradients_are_those_of_one_masked_softmax(prompts, completions):
    layout = layout_of_lengths(prompts, completions)
    wanted = with_gradients(reference, layout, torch.float64)
    assert off(with_gradients(cascaded, layout, torch.float32), wanted) < 1e-6
    assert off(with_gradients(cascaded, layout, torch.float64), wanted) < 1e-14


def test_half_precision_is_as_near_as_the_present_form():
    layout = layout_of_lengths([140, 12], [[130, 9], [20, 20, 3]])
    wanted = with_gradients(reference, layout, torch.float64)

    def split(states, layout):
        return Split("sdpa")(sdpa_attention_forward, Layer(), states, layout, {"scaling": SCALE})

    by_split = off(with_gradients(split, layout, torch.bfloat16), wanted)
    assert 1e-3 < off(with_gradients(cascaded, layout, torch.bfloat16), wanted) < 1.5 * by_split


def test_nothing_but_states_output_and_sums_is_kept_for_the_backward_pass():
    layout = layout_of_lengths([140, 12], [[130, 9], [20, 20, 3]])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda it: it):
        cascaded(states_of(layout, torch.float32), layout)
    tokens = layout.tokens
    assert sorted(kept) == sorted([4 * tokens, *[2 * 16 * tokens] * 2, *[4 * 16 * tokens] * 2])


@pytest.mark.parametrize(
    "kwargs", [{"sliding_window": 8}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}]
)
def test_other_layers_are_left_to_the_present_form(kwargs):
    layout = layout_of_lengths([5], [[5, 2]])
    assert cascaded(states_of(layout, torch.float32), layout, **kwargs) is None


def test_a_window_as_long_as_the_text_and_autocast_are_served():
    layout = layout_of_lengths([5], [[5, 2]])
    query, key, value = states_of(layout, torch.float32)
    assert cascaded((query, key, value), layout, sliding_window=9) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert cascaded((query, key, value.bfloat16()), layout).dtype == torch.bfloat16


class Kernels(TorchDispatchMode):
    """aten's variable-length kernels of CUDA, computed from their definition, segment by segment.

    Attributes:
        calls: Lengths of the queries' and the keys' segments, the longest of each, and causal, in each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._flash_attention_forward.default:
            return self.forward(*args, **kwargs)
        if function is torch.ops.aten._flash_attention_backward.default:
            return self.backward(*args, **kwargs)
        return function(*args, **(kwargs or {}))

    def segments(self, edges_q, edges_k, longest_q, longest_k, causal):
        assert edges_q.dtype == edges_k.dtype == torch.int32
        lengths = [edges.diff().tolist() for edges in (edges_q, edges_k)]
        self.calls.append((*lengths, longest_q, longest_k, causal))
        return zip(*(torch.arange(sum(sizes)).split(sizes) for sizes in lengths), strict=True)

    def probabilities(self, query, key, at, to, causal, scale):
        scores = torch.einsum("qhd,khd->hqk", query[at], key[to]) * scale
        ahead = torch.ones(len(at), len(to), dtype=torch.bool).triu(1)
        return scores.masked_fill(ahead, -math.inf) if causal else scores

    def forward(self, query, key, value, edges_q, edges_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        assert not dropout and not debug and all(state.stride(-1) == 1 for state in (query, key, value))
        copies = query.shape[1] // key.shape[1]
        states = query.float(), *(state.float().repeat_interleave(copies, dim=1) for state in (key, value))
        output, sums = torch.empty(query.shape), torch.empty(query.shape[1], len(query))
        for at, to in self.segments(edges_q, edges_k, longest_q, longest_k, causal):
            scores = self.probabilities(*states[:2], at, to, causal, scale)
            output[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), states[2][to])
            sums[:, at] = scores.logsumexp(-1)
        return output.to(query.dtype), sums, torch.zeros(2), torch.zeros(()), torch.empty(0)

    def backward(
        self, gradient, query, key, value, output, sums, edges_q, edges_k, longest_q, longest_k, dropout, causal,
        random_state, unused, *, scale,
    ):  # fmt: skip
        assert gradient.is_contiguous() and sums.is_contiguous() and random_state.shape == (2,) and unused.ndim == 0
        copies = query.shape[1] // key.shape[1]
        states = query.float(), *(state.float().repeat_interleave(copies, dim=1) for state in (key, value))
        found = [torch.zeros(state.shape) for state in states]
        for at, to in self.segments(edges_q, edges_k, longest_q, longest_k, causal):
            chances = (self.probabilities(*states[:2], at, to, causal, scale) - sums[:, at, None]).exp()
            of_output = gradient[at].float()
            of_chances = torch.einsum("qhd,khd->hqk", of_output, states[2][to])
            inner = (of_output * output[at].float()).sum(-1).T[..., None]
            of_scores = chances * (of_chances - inner) * scale
            found[0][at] = torch.einsum("hqk,khd->qhd", of_scores, states[1][to])
            found[1][to] = torch.einsum("hqk,qhd->khd", of_scores, states[0][at])
            found[2][to] = torch.einsum("hqk,qhd->khd", chances, of_output)
        folded = [part.unflatten(1, (-1, copies)).sum(2) for part in found[1:]]
        return tuple(part.to(query.dtype) for part in (found[0], *folded))


def test_the_kernels_of_cuda_get_every_group_in_two_calls_and_give_the_same():
    layout = layout_of_lengths([7, 3], [[5, 1, 2], [6, 0]])
    kernels = Kernels()

    def attend(states, layout):
        with kernels:
            return cascaded(states, layout, FlashCuda())

    states = states_of(layout, torch.bfloat16)
    output = attend(states, layout)
    with kernels:
        found = torch.autograd.grad(output.float().square().sum(), states)
    pieces = [7, 3, 4, 0, 1, 5, 0]
    two = [(pieces, pieces, 7, 7, True), ([5, 5], [7, 3], 5, 7, False)]
    assert kernels.calls == two * 2
    exact = states_of(layout, torch.float64)
    wanted = reference(exact, layout)
    assert off([output.detach()], [wanted.detach()]) < 1e-2
    assert off(found, torch.autograd.grad(wanted.square().sum(), exact)) < 2e-2


def test_float32_on_cuda_is_left_to_the_present_form():
    layout = layout_of_lengths([5], [[5, 2]])
    assert cascaded(states_of(layout, torch.float32), layout, FlashCuda()) is None


@pytest.mark.parametrize(
    ("device", "form", "taken"),
    [
        ("cpu", "auto", ("cascade", False)),
        ("cpu", "cascade", ("cascade", False)),
        ("cpu", "split", None),
        ("cuda", "auto", None),
        ("cuda", "cascade", ("cascade", True)),
        ("cuda", "flex", ("flex", True)),
        ("cpu", "flex", None),
    ],
)
def test_which_form_is_offered_and_whether_it_is_timed(device, form, taken):
    found = [(offered.key, offered.timed) for offered in candidates(torch.device(device), form)]
    assert found == ([] if taken is None else [taken])


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again(tiny, tmp_path, picture_rows, reentrant):
    def build():
        grpo = {"lora": False, "beta": 0.05, "gradient_checkpointing": True, **GROUPS}
        return checkpoint(ready(tiny("qwen3_vl"), picture_rows, tmp_path, **grpo), reentrant)

    found = differences(build, "shared_prefix")
    assert_exact(found)
    assert found["fact.cascade_passes"] == found["fact.shared_passes"] > 0


def test_windows_of_some_layers(tmp_path):
    """Gemma 3: the other layers see the whole text."""
    rows = [{"prompt": [{"role": "user", "content": f"What is {row} plus three?"}], "answer": "3"} for row in range(4)]
    model = other_model("gemma3_text", tmp_path)
    assert_exact(differences(lambda: ready(model, rows, tmp_path, beta=0.05, **GROUPS), "shared_prefix"))
