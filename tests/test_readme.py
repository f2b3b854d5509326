"""Figures in the text of the pages are what the committed benchmarks say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("page", "benchmark", "ratio", "words"),
    [
        ("README.md", "habits", "useful_completions_exact_over_own", "x {median:.2f} ({low:.2f} to {high:.2f}, raced)"),
        ("README.md", "habits", "live_step_over_receipt", "{median:.3f} ({low:.3f} to {high:.3f})"),
        (
            "docs/search.md", "habits", "useful_completions_exact_over_own",
            "x {median:.2f} ({low:.2f} to {high:.2f}, raced)",
        ),
        ("docs/search.md", "habits", "live_step_over_receipt", "{median:.3f} ({low:.3f} to {high:.3f})"),
        (
            "docs/speedups.md", "time_to_reward", "seconds_to_the_same_reward",
            "{median:.1f} times sooner than with plain TRL (three seeds, {low:.1f} to {high:.1f}",
        ),
        (
            "docs/vllm_internals.md", "vllm_sync", "merged to batched: seconds",
            "2.0x | {median:.1f}x ({low:.1f} to {high:.1f}) |",
        ),
        ("docs/vllm_internals.md", "vllm_sync", "merged to adapter: bytes", "`adapter` | {median:.0f}x |"),
        (
            "docs/vllm_internals.md", "vllm_sync", "merged to adapter: seconds",
            "27x | {median:.0f}x ({low:.0f} to {high:.0f}) |",
        ),
        (
            "docs/vllm_internals.md", "vllm_sync", "merged to adapter: generation_s",
            "{median:.2f}x ({low:.2f} to {high:.2f}): slower",
        ),
        (
            "docs/vllm_internals.md", "vllm_groups", "copies to groups",
            "generates {median:.2f}x ({low:.2f} to {high:.2f}) as fast as TRL's",
        ),
        (
            "docs/vllm_internals.md", "vllm_groups", "cached copies to groups",
            "cache, and {median:.2f}x ({low:.2f} to {high:.2f}) as fast",
        ),
        ("docs/search.md", "oom_share", "points_that_run_out", "where {median:.0%} of the points"),
        (
            "docs/speedups.md", "speedups_parts", "chunks of 4, shared_prefix: reference_logprob",
            "the reference pass is {median:.1f} times faster",
        ),
        ("docs/speedups.md", "prefix_forms", "768px: training, flat over cache", "{median:.2f} of its seconds at 768"),
        ("docs/speedups.md", "prefix_forms", "short: training, flat over cache", "{median:.2f} with prompts of 20"),
        ("docs/speedups.md", "prefix_forms", "768px-256: without gradients, flat over cache", "tokens ({median:.2f})"),
        ("docs/speedups.md", "prefix_forms", "long: without gradients, flat over cache", "({median:.2f}); the cause"),
        ("docs/speedups.md", "prefix_forms", "longer: without gradients, flat over cache", "new pages, {median:.2f}."),
        (
            "docs/speedups.md", "prefix_cascade", "768px: training, flat over cascade",
            "and is {median:.2f}\n  times as fast ({low:.2f} to {high:.2f}, `docs",
        ),
        (
            "docs/speedups.md", "decoding", "16m, full: seconds per token, before over now",
            "new tokens it is {median:.2f} times as fast as a loop",
        ),
        (
            "docs/speedups.md", "decoding", "16m, lora: seconds per token, before over now, merged",
            "inputs, {median:.2f} times with LoRA merged",
        ),
        (
            "docs/speedups.md", "decoding", "16m, lora: seconds per token, before over now",
            "and {median:.2f} ({low:.2f} to {high:.2f}) with LoRA left apart",
        ),
        (
            "docs/speedups.md", "prefix_forms_heap", "768px-256: without gradients, flat over cache",
            "it is {median:.2f} and",
        ),
        (
            "docs/speedups.md", "prefix_forms_heap", "long: without gradients, flat over cache",
            "and {median:.2f}\n  (`docs/benchmarks/prefix_forms_heap.json`)",
        ),
    ],
)  # fmt: skip
def test_figures_in_the_text_are_the_committed_benchmarks(page: str, benchmark: str, ratio: str, words: str) -> None:
    found = json.loads((ROOT / "docs" / "benchmarks" / f"{benchmark}.json").read_text())["ratios"][ratio]
    assert words.format(**found) in (ROOT / page).read_text()


def test_memory_of_a_shared_pass_and_kernels_of_a_token() -> None:
    files = {
        name: json.loads((ROOT / f"docs/benchmarks/{name}.json").read_text()) for name in ("prefix_cascade", "decoding")
    }
    ratios, rows = files["prefix_cascade"]["ratios"], files["decoding"]["rows"]
    split, cascade = (
        f"{100 / ratios[f'768px: memory of the training pass, plain over {form}']['median']:.0f} %"
        for form in ("flat", "cascade")
    )
    kernels = {row["way"]: f"{row['kernels_per_token']:,.0f}" for row in rows if "kernels_per_token" in row}
    page = " ".join((ROOT / "docs/speedups.md").read_text().split())
    assert f"with *cascade* holds {cascade} of plain TRL's memory and with *split* {split}," in page
    assert f"starts {kernels['now, merged']} kernels with LoRA merged, against {kernels['before']} (" in page


def test_two_workers_of_a_search() -> None:
    ratios = json.loads((ROOT / "docs/benchmarks/search_workers.json").read_text())["ratios"]
    name = "trials per minute of two workers over one"
    words = "{median:.2f}x ({low:.2f} to {high:.2f})"
    names = (name, f"{name}, with start and probe", f"{name}, once they have begun")
    after, whole, begun = (words.format(**ratios[key]) for key in names)
    same, page = ratios["same winner"], (ROOT / "docs/benchmarks/README.md").read_text()
    assert f"{after} after the probe" in page and f"{whole} with start and probe" in page
    assert f"{begun} without each worker's first trial" in page
    assert f"the same for {round(same['median'] * same['n'])} of {same['n']} seeds" in page


def test_searches_on_a_real_model_beside_a_busy_core() -> None:
    found = json.loads((ROOT / "docs/benchmarks/search_real_busy.json").read_text())
    ratios, rows, page = found["ratios"], found["rows"], (ROOT / "docs/benchmarks/README.md").read_text()
    assert f"raced in {sum(row['raced'] for row in rows)} of {len(rows)}" in page
    assert "x {median:.2f} ({low:.2f} to {high:.2f}), models off".format(**ratios["speedup"]) in page
    error = {end: f"{value:.0%}".replace("%", " %") for end, value in ratios["model error, median"].items()}
    assert "models off by {median} at the median ({low} to {high})".format(**error).replace(" % to", " to") in page
    assert (
        "take x {median:.2f} of the receipt's ({low:.2f} to {high:.2f})".format(
            **ratios["probe afterwards over receipt"]
        )
        in page
    )
    winners = sorted(sorted(row["winner"]) for row in rows)
    checkpointing, micro = ["grpo.gradient_checkpointing", "speedups"], ["grpo.per_device_train_batch_size", "speedups"]
    assert (
        winners == [checkpointing, checkpointing, micro]
        and "two seeds end with speed-ups and checkpointing off" in page
    )


def test_searches_on_a_real_model_alone() -> None:
    found = json.loads((ROOT / "docs/benchmarks/search_real.json").read_text())
    ratios, rows, page = found["ratios"], found["rows"], (ROOT / "docs/benchmarks/README.md").read_text()
    of = "{median:.2f} ({low:.2f} to {high:.2f})"
    assert f"raced in {sum(row['raced'] for row in rows)} of {len(rows)}, x {of}".format(**ratios["speedup"]) in page
    error = {end: f"{100.0 * value:.0f}" for end, value in ratios["model error, median"].items()}
    assert "models off by {median} % at the median ({low} to {high} %)".format(**error) in page
    for words, name in {
        f"20 steps afterwards take x {of} of the receipt's seconds": "probe afterwards over receipt",
        f"x {of} at the pace of the user's configuration": "the same at the pace of the user's configuration",
        f"the second ten of them x {of} of what the first ten take": "second half afterwards over first",
    }.items():
        assert words.format(**ratios[name]) in page


def test_this_tree_against_an_earlier_commit() -> None:
    ratios = json.loads((ROOT / "docs/benchmarks/against.json").read_text())["ratios"]
    page = (ROOT / "docs/benchmarks/README.md").read_text()
    for name, words in {
        "768px: log-probs and backward": "for log-probs and backward {median:.2f} at 768 px ({low:.2f} to {high:.2f})",
        "448px: log-probs and backward": "{median:.2f} at 448 px ({low:.2f} to {high:.2f})",
        "768px-256: log-probs and backward": "{median:.2f} at 256 new tokens ({low:.2f} to {high:.2f})",
        "text: log-probs and backward": "{median:.2f} at a prompt of 1,000 tokens ({low:.2f} to {high:.2f})",
        "short: log-probs and backward": "{median:.2f} at one of 20 ({low:.2f} to {high:.2f})",
        "768px-256: generation": "generation of 256 tokens {median:.2f} ({low:.2f} to {high:.2f})",
    }.items():
        assert words.format(**ratios[f"{name}, f645d37 over now"]) in page


def test_every_part_of_the_exactness_matrix_was_run() -> None:
    from benchmarks.exact import PARTS

    rows = json.loads((ROOT / "docs/benchmarks/exact.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(PARTS)


def test_single_combinations_under_autocast() -> None:
    rows = json.loads((ROOT / "docs/benchmarks/exact.json").read_text())["rows"]
    rows = [row for row in rows if row["part"] == "bf16"]
    kinds = ("log_probs", "gradients", "loss")
    most = {kind: max(row[kind] / row[f"{kind}_of_autocast"] for row in rows) for kind in kinds}
    told = "up to {log_probs:.1f} times that in\n  log-probs, {gradients:.1f} times in gradients and {loss:.1f} times"
    assert told.format(**most) in (ROOT / "docs/speedups.md").read_text()


def test_weights_under_sharding() -> None:
    rows = json.loads((ROOT / "docs/benchmarks/exact.json").read_text())["rows"]
    rows = [row for row in rows if row["part"] == "sharded"]
    assert {row["sharding"] for row in rows} == {"zero2", "zero3", "fsdp2"}
    assert all(row["equal_rewards"] == 1.0 for row in rows)
    apart = max(row["weights"] for row in rows)
    assert f"weights at most {apart:.1e} apart".replace("e-0", "e-") in (ROOT / "docs/scale.md").read_text()
    assert apart < 2e-6 and "weights after five steps to 2e-6" in (ROOT / "README.md").read_text()


def test_cost_of_a_probe() -> None:
    found = json.loads((ROOT / "docs/benchmarks/overhead.json").read_text())
    ratio = found["ratios"]["step_with_probe_over_without"]
    step_s = statistics.median(row["seconds"] for row in found["rows"] if not row["probe"])
    cost, low, high = (f"{100 * (ratio[name] - 1):.1f}" for name in ("median", "low", "high"))
    words = f"cost {cost} % of a step of {step_s:.2f} s (95 % interval {low} to {high} %, {ratio['n']} pairs of steps"
    assert words in (ROOT / "docs/plugin.md").read_text()


def test_search_against_optunas_samplers() -> None:
    ratios = json.loads((ROOT / "docs/benchmarks/search_replay.json").read_text())["ratios"]

    def below(who: str, share: int) -> str:
        score = ratios[f"{who}, {share}% of the sweep's time: score over the best"]["median"]
        return f"{1 - score:.0%}"

    def until(who: str) -> str:
        return f"{ratios[f'{who}, 12%: share of the time until one within 3% was measured']['median']:.1%}"

    words = [
        f"random search ends {below('random alone', 12)} below",
        f"TPE ends {below('tpe alone', 5)} below, random search {below('random alone', 5)}",
        f"GP ends {below('gp alone', 3)} below, TPE and random search {below('tpe alone', 3)}",
        f"measures the best after {until('ours (tpe)')} of the time",
        f"within 3% of it after {until('gp alone')}, TPE after {until('tpe alone')}",
    ]
    page = (ROOT / "docs/search.md").read_text().replace(" %", "%")
    assert below("random alone", 3) == below("tpe alone", 3)
    assert [text for text in words if text not in page] == []


def test_a_factor_stands_behind_the_word_cpu_until_a_gpu_s_was_measured() -> None:
    """In every page; with a `docs/benchmarks/gpu_*.json` committed, that file's figures stand beside them."""
    if list((ROOT / "docs" / "benchmarks").glob("gpu_*.json")):
        return
    factor = re.compile(r"\b\d+\.\d+x\b|\bx \d+\.\d+ \(\d|\d times (faster|sooner|as fast)")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        first = factor.search(text)
        assert first is None or "CPU" in text[: first.start()], f"{page.name}: {first[0]}"
