"""What fidelity is made of: the distribution that vLLM draws from, and which cause a piece of evidence speaks for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch

from grpo_autotune.records.rollout import FidelityPart
from grpo_autotune.rollout.fidelity.causes import CHECKS, Evidence, diagnose
from grpo_autotune.rollout.fidelity.meter import Dropped, Sum, row_keys, row_kinds, threshold_nats
from grpo_autotune.rollout.fidelity.sampling import PLAIN, differences, log_probs, parameters, shapes
from grpo_autotune.rollout.metrics import server
from grpo_autotune.rollout.metrics.server import CACHE, COUNTERS, GAUGES, ServerMeter, read_metrics

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
"""Two tokens' distributions over four words."""
TOKENS = torch.tensor([0, 2])


def drawn(**given: float) -> list[float]:
    return log_probs(LOGITS, TOKENS, [3], PLAIN | given).exp().tolist()


def test_plain_sampling_gives_the_model_s_own_probabilities() -> None:
    assert drawn() == pytest.approx([0.5, 0.3])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": 2}, [0.5 / 0.8, 0.3 / 0.8]),
        ({"top_k": 9}, [0.5, 0.3]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95]),
        ({"min_p": 0.5}, [0.5 / 0.8, 0.3 / 0.8]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365]),
        ({"temperature": 0.0, "top_k": 1}, [0.5, 0.3]),
    ],
)
def test_truncation_renormalises(given: dict[str, float], expected: list[float]) -> None:
    assert drawn(**given) == pytest.approx(expected, rel=1e-5)


def test_penalties_count_the_prompt_and_what_was_drawn_before() -> None:
    first, second = drawn(repetition_penalty=2.0)
    logits = LOGITS.clone()
    logits[0, 3] *= 2.0
    logits[1, [0, 3]] *= 2.0
    expected = logits.softmax(dim=-1)
    assert (first, second) == pytest.approx((float(expected[0, 0]), float(expected[1, 2])))
    weights = LOGITS[1].exp().clone()
    weights[0] *= math.exp(-0.5)
    assert drawn(frequency_penalty=0.2, presence_penalty=0.3)[1] == pytest.approx(float(weights[2] / weights.sum()))


def test_a_token_outside_what_is_kept_has_a_finite_number() -> None:
    tail = log_probs(LOGITS, torch.tensor([3, 0]), [], PLAIN | {"top_k": 1})
    assert torch.isfinite(tail).all()


def test_parameters_of_anything_that_has_them() -> None:
    assert parameters({"top_k": -1, "temperature": None}) == PLAIN
    assert differences(parameters({"top_p": 0.9}), PLAIN) == {"top_p": (0.9, 1.0)}
    assert not shapes(parameters({"temperature": 0.7}), 0.7)
    assert shapes(PLAIN, 0.7) and shapes(parameters({"min_p": 0.1}), 1.0)


@pytest.mark.parametrize(
    ("formats", "nats"), [(["float32"], 1e-3), (["float32", "bfloat16"], 5e-2), (["float32", "fp8"], 5e-2)]
)
def test_the_coarser_format_decides(formats: list[str], nats: float) -> None:
    assert threshold_nats(formats) == nats


def test_dropped_weights_are_counted_where_they_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    by_sample = Dropped()
    assert by_sample.see(torch.tensor([[0.0], [1.0], [1.0]]), mask) == 0.5
    assert (by_sample.of, by_sample.share()) == ("samples", 0.5)
    by_token = Dropped()
    by_token.see(torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), mask)
    assert by_token.of == "tokens" and by_token.share() == pytest.approx(1 / 3)
    assert Dropped().see(None, mask) is None and Dropped().share() is None


def test_sums_add_up() -> None:
    a, b = Sum(), Sum()
    a.add(torch.tensor([1.0, 3.0]))
    b.add(torch.tensor([5.0]))
    b.add(torch.tensor([]))
    both = a.with_more(b)
    assert (both.mean(), both.largest, both.count) == (3.0, 5.0, 3)
    assert Sum().mean() == 0.0


def test_rows_are_known_again_by_prompt_and_image() -> None:
    output: dict[str, Any] = {
        "prompt_ids": torch.tensor([[0, 7], [5, 7], [5, 7], [5, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1], [1, 1]]),
        "num_images": [0, 1, 1, 1],
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 2], [1, 1, 2]]),
        "pixel_values": torch.tensor([[1.0], [2.0], [1.0], [2.0], [4.0], [5.0]]),
    }
    assert row_kinds(output) == ["text", "image", "image", "image"]
    text, one, same, other = row_keys(output)
    assert one == same != other and text not in (one, other)
    assert row_keys(output | {"image_grid_thw": None})[1:] == [None] * 3
    assert row_kinds({"prompt_ids": [1, 2]}) == ["text", "text"]


def part(rows: str, when: str, seen: str, nats: float) -> FidelityPart:
    return FidelityPart.model_validate(
        {"rows": rows, "when": when, "seen": seen, "mean_nats": nats, "max_nats": 2 * nats, "tokens": 10}
    )


OFF, RIGHT = 0.3, 1e-6
FOLLOWS: dict[str, Any] = {"moved": True, "trainer_moved_nats": 0.1, "engine_moved_nats": 0.1}
WELL: dict[str, Any] = {"text_first": RIGHT, "text_later": RIGHT, "prompts": 4, "formats": ("float32", "float32")}
IMAGES_OFF = (part("image", "first", "new", OFF), part("image", "later", "new", OFF))


@pytest.mark.parametrize(
    ("cause", "evidence"),
    [
        ("placeholders", WELL | FOLLOWS | {"parts": IMAGES_OFF, "prompts_differ": 4, "lengths": (46, 31)}),
        ("processor", WELL | FOLLOWS | {"parts": IMAGES_OFF}),
        (
            "processor",
            WELL
            | FOLLOWS
            | {"parts": IMAGES_OFF, "prompts_differ": 4, "lengths": (35, 31), "image_tokens": (20, 16, 1)},
        ),
        (
            "placeholders",
            WELL
            | FOLLOWS
            | {"parts": IMAGES_OFF, "prompts_differ": 4, "lengths": (61, 31), "image_tokens": (38, 20, 2)},
        ),
        ("dropout", WELL | FOLLOWS | {"parts": (part("text", "first", "new", OFF),), "dropout": "lora_dropout"}),
        (
            "sampling parameters",
            WELL | FOLLOWS | {"parts": (part("text", "first", "new", RIGHT),), "sampling": {"top_p": (0.9, 1.0)}},
        ),
        (
            "stale weights",
            WELL
            | {"parts": (part("text", "first", "new", RIGHT), part("text", "later", "new", OFF)), "text_later": OFF}
            | {"moved": False, "trainer_moved_nats": 0.1, "engine_moved_nats": 0.0},
        ),
        (
            "stale weights",
            WELL | FOLLOWS | {"parts": (part("image", "first", "new", RIGHT), part("image", "later", "new", OFF))},
        ),
        (
            "stale caches",
            WELL
            | FOLLOWS
            | {
                "parts": (
                    part("image", "first", "new", RIGHT),
                    part("image", "later", "new", RIGHT),
                    part("image", "later", "repeated", OFF),
                )
            },
        ),
        (
            "dtype",
            WELL
            | FOLLOWS
            | {"parts": (part("text", "first", "new", OFF),), "text_first": OFF, "text_later": OFF}
            | {"formats": ("bfloat16", "bfloat16 with fp8 keys and values")},
        ),
        (None, WELL | {"parts": (part("text", "first", "new", OFF),), "formats": ("", "")}),
    ],
)
def test_each_cause_is_named_by_its_own_evidence(cause: str | None, evidence: dict[str, Any]) -> None:
    named, causes = diagnose(Evidence(threshold_nats=1e-3, **evidence))
    assert named == cause
    assert [c.name for c in causes] == list(CHECKS)
    assert [c.name for c in causes if c.points == "yes"] == ([cause] if cause else [])
    assert all(c.evidence and c.check == CHECKS[c.name] for c in causes)


def test_only_repeated_images_after_a_step_leave_two_causes() -> None:
    parts = (part("image", "first", "new", RIGHT), part("image", "later", "repeated", OFF))
    named, causes = diagnose(Evidence(threshold_nats=1e-3, **WELL | FOLLOWS | {"parts": parts}))
    assert named is None
    assert {c.name for c in causes if c.points == "unknown"} == {"stale weights", "stale caches"}


METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:prompt_tokens_total {engine="0",model_name="m"} 1.5e+03
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
process_start_time_seconds 1.7e+09
"""


def test_a_server_s_metrics_are_read() -> None:
    found = read_metrics(METRICS)
    assert found[GAUGES["running_max"]] == 5.0 and found[COUNTERS["prompt_tokens"]] == 1500.0
    assert found[CACHE] == 1600.0
    assert read_metrics("") == {}


def test_a_server_without_metrics_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = ServerMeter(SimpleNamespace(vllm_client=SimpleNamespace(base_url="http://here")), lambda: 0, lambda: True)
    answers = [
        httpx2.Response(200, text="<html>"),
        httpx2.Response(404, text="vllm:x 1"),
        httpx2.Response(200, text="x 1"),
    ]
    client = httpx2.Client(transport=httpx2.MockTransport(lambda request: answers.pop(0)))
    monkeypatch.setattr(server, "http_client", lambda: client)
    assert [meter._read() for _ in range(3)] == [{}, {}, {"x": 1.0}]


def test_a_server_s_counters_become_facts() -> None:
    generation = SimpleNamespace(vllm_client=SimpleNamespace(base_url="http://here"))
    meter = ServerMeter(generation, lambda: 0, lambda: True)
    before = dict.fromkeys(COUNTERS.values(), 10.0)
    counted = {"prompt_tokens": 60.0, "cached_tokens": 20.0, "decode_tokens": 100.0, "preemptions": 1.0}
    after = {COUNTERS[name]: 10.0 + value for name, value in counted.items()} | {CACHE: 1600.0}
    seen = [{GAUGES["running_max"]: 2.0}, {GAUGES["running_max"]: 4.0, GAUGES["waiting_max"]: 1.0}]
    meter._count_call(before, after, seen, 2.0)
    facts = meter.facts(0)
    assert facts is not None and facts.source == "server" and facts.kv_tokens == 1600
    assert (facts.prompt_tokens, facts.cached_tokens, facts.prefill_tokens, facts.decode_tokens) == (60, 20, 40, 100)
    assert (facts.prefill_s, facts.decode_s, facts.prefill_tokens_per_s, facts.decode_tokens_per_s) == (0, 2, None, 50)
    assert (facts.running_mean, facts.running_max, facts.waiting_max, facts.preemptions) == (3, 4, 1, 1)
    assert facts.kv_use_max is None is facts.images_encoded and facts.sync_s is None and facts.syncs == 0
