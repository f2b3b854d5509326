"""Stage attention: one layer's attention of a shared micro batch, forms and backends, at real shapes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import Bench
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from grpo_autotune.speedups.selection import OPTIONS  # noqa: E402
from grpo_autotune.speedups.shared_prefix.attention import Form, Split, States  # noqa: E402
from grpo_autotune.speedups.shared_prefix.choice import candidates  # noqa: E402
from grpo_autotune.speedups.shared_prefix.flex import Flex, block_mask  # noqa: E402
from grpo_autotune.speedups.shared_prefix.layout import Layout, batch_of, layout_of  # noqa: E402

GROUP = 8
PINNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Heads(NamedTuple):
    """Heads of a layer: of the query, of keys and values, and their width."""

    query: int
    keys: int
    width: int


class Case(NamedTuple):
    """A layer's heads, tokens of the prompt and of the longest completion; predicted ms of forward and backward."""

    name: str
    heads: Heads
    prompt: int
    completion: int
    split_ms: tuple[float, float] | None = None
    cascade_ms: tuple[float, float] | None = None


SMALL, LARGE = Heads(16, 8, 128), Heads(32, 8, 128)
CASES = (
    Case("2B (700, 256)", SMALL, 700, 256, (0.45, 0.8), (0.15, 0.25)),
    Case("2B (400, 64)", SMALL, 400, 64),
    Case("2B (1400, 512)", SMALL, 1400, 512),
    Case("8B (1400, 512)", LARGE, 1400, 512, (3.5, 5.5), (1.4, 2.0)),
    Case("8B (700, 256)", LARGE, 700, 256),
)
TINY = (Case("tiny (12, 6)", Heads(4, 2, 16), 12, 6),)
CALLS = 6
FLEX_LAYOUTS = 12
MASK_TOKENS = (5_000, 20_000, 60_000)


def measure(bench: Bench) -> None:
    """Write the rows of each case, then what FlexAttention compiles and its masks take."""
    for case in TINY if bench.tiny else CASES:
        for name, form, pin in forms(bench):
            if isinstance(form, Flex):
                continue  # it compiles for many seconds: see below
            with bench.part(f"{case.name}: {name}"), pin():
                tell_form(bench, case, name, form)
    if bench.on_gpu:
        with bench.part("FlexAttention"):
            tell_flex(bench)
        for tokens in MASK_TOKENS:
            with bench.part(f"block mask of {tokens} tokens"):
                tell_mask(bench, tokens)


def forms(bench: Bench) -> Iterator[tuple[str, Form | None, Callable[[], AbstractContextManager[None]]]]:
    """Name, form and backends: plain TRL's padded rows (no form), `Split`, and every other that the device has."""
    pinned = lambda: sdpa_kernel(PINNED)  # noqa: E731
    yield "plain rows", None, contextlib.nullcontext
    yield "split, torch's order", Split("sdpa"), contextlib.nullcontext
    yield "split, pinned", Split("sdpa"), pinned
    seen = set()
    for option in OPTIONS["shared_prefix"]["form"]:
        for form in candidates(bench.device, option):
            if type(form) not in seen:
                seen.add(type(form))
                yield form.name, form, pinned


def tell_form(bench: Bench, case: Case, name: str, form: Form | None) -> None:
    """First and later calls, forward and backward, and the peak of memory."""
    calls = [case.completion + moved for moved in range(2 if bench.tiny else CALLS)]
    inputs = [operands(bench, case, longest) for longest in calls]

    both = functools.partial(forward_backward, form, case)
    first, steady = bench.first_and_steady_s(both, inputs)
    predicted = {"split, pinned": case.split_ms, "the cascade form": case.cascade_ms}.get(name)
    late = (25.0, 60.0) if "order" in name else (0.0, 1.0) if "pinned" in name else None
    bench.row(f"{case.name}: {name}: forward and backward", steady * 1e3, "ms", predicted=predicted)
    bench.row(f"{case.name}: {name}: a new shape, beyond that", (first - steady) * 1e3, "ms", predicted=late)
    peak = bench.peak_bytes(lambda: both(inputs[-1]))
    if peak is not None:
        bench.row(f"{case.name}: {name}: peak", peak / 1e6, "MB")


def forward_backward(form: Form | None, case: Case, given: tuple[States, Layout]) -> None:
    """One call and its gradients."""
    states, layout = given
    output = attend(form, states, layout, case)
    torch.autograd.grad(output, states, torch.ones_like(output))


def operands(bench: Bench, case: Case, longest: int, groups: int = 1) -> tuple[States, Layout]:
    """States of a flat sequence as a model's projections leave them, and its layout; completions are ragged."""
    lengths = [max(2, longest - 3 * row) for row in range(GROUP)] * groups
    layout = layout_for(bench.device, case.prompt, lengths, groups)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    states = tuple(
        torch.randn(1, layout.tokens, heads, case.heads.width, device=bench.device, dtype=dtype)
        .requires_grad_()
        .transpose(1, 2)
        for heads in (case.heads.query, case.heads.keys, case.heads.keys)
    )
    return states, layout


def layout_for(device: torch.device, prompt: int, lengths: list[int], groups: int = 1) -> Layout:
    """The layout of some groups whose prompts have one length."""
    rows, width = len(lengths), max(lengths)
    mask = torch.ones(rows, prompt + width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, prompt + length :] = 0
    group = torch.arange(groups).repeat_interleave(rows // groups).to(device)
    batch = batch_of(torch.zeros_like(mask).to(device), mask.to(device), width, group, {})
    return layout_of(batch, range(rows))


def attend(form: Form | None, states: States, layout: Layout, case: Case) -> torch.Tensor:
    """The output of one form, (1, T, H, D); None is the padded rows of plain TRL, with a mask."""
    module = SimpleNamespace(
        is_causal=True, layer_idx=0, num_key_value_groups=case.heads.query // case.heads.keys, training=True,
        config=SimpleNamespace(_attn_implementation="sdpa"),
    )  # fmt: skip
    kwargs = {"scaling": case.heads.width**-0.5, "dropout": 0.0}
    if form is not None:
        output = form(sdpa_attention_forward, module, states, layout, dict(kwargs))
        if output is None:
            raise RuntimeError(getattr(form, "failed", None) or "the form left it to Split")
        return output
    width = case.prompt + layout.spans[0].width
    rows = [state[:, :, :1].expand(1, -1, width, -1).expand(GROUP, -1, -1, -1) for state in states]
    mask = torch.ones(width, width, dtype=torch.bool, device=states[0].device).tril().expand(GROUP, 1, -1, -1)
    padded: torch.Tensor = sdpa_attention_forward(module, *rows, mask, **kwargs)[0]
    return padded


def tell_flex(bench: Bench) -> None:
    """Seconds to compile, and how many graphs it makes of growing layouts and both layouts of memory."""
    form = candidates(bench.device, "flex")[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = CASES[0]
    for number in range(FLEX_LAYOUTS):
        for contiguous in (True, False):
            states, layout = operands(bench, case, case.completion + 16 * number)
            held = tuple(state.contiguous() for state in states) if contiguous else states
            seconds = bench.seconds(functools.partial(forward_backward, form, case, (held, layout)))
            if not number and contiguous:
                bench.row("FlexAttention: seconds to compile", seconds, "s", predicted=(10.0, 40.0))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    bench.row(f"FlexAttention: graphs of {FLEX_LAYOUTS} layouts", graphs, "", predicted=(2.0, 12.0))


def tell_mask(bench: Bench, tokens: int) -> None:
    """Seconds and peak of the block mask of a flat sequence of about so many tokens."""
    groups = max(1, tokens // (1400 + GROUP * 512))
    completion = max(2, (tokens // groups - 1400) // GROUP)
    layout = layout_for(bench.device, 1400, [completion] * GROUP * groups, groups)
    seconds: list[float] = []
    peak = bench.peak_bytes(lambda: seconds.append(bench.seconds(lambda: block_mask(layout, None))))
    bench.row(f"block mask of {layout.tokens} tokens", seconds[0], "s", predicted=(0.0, 1.0))
    bench.row(f"block mask of {layout.tokens} tokens: peak", (peak or 0) / 1e9, "GB")
