"""`trace.json.gz`: slices nest, stages sum to the report's seconds, and the file is the Chrome trace format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.probe.spans import SpanRecorder, StepSpans
from grpo_autotune.probe.stages import stages_of, summarise
from grpo_autotune.records.probe import STAGES
from grpo_autotune.records.report import Report
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import clear, save_report
from grpo_autotune.report.timeline import read_spans
from grpo_autotune.report.trace import TRACE_FILE
from tests.support.sample_records import demo_record
from tests.support.traces import events_in, self_seconds

NAMES = ("", "generation", "reward", "backward", "log_save_eval")


def record(recorder: SpanRecorder, clock: list[float], plan: list[Any]) -> None:
    """Open and close spans as a nested list says: (stage, seconds before its children, children)."""
    for stage, seconds, children in plan:
        with recorder.span(stage, "part"):
            clock[0] += seconds
            record(recorder, clock, children)
            clock[0] += seconds / 3.0


def written(path: Path, plans: list[list[Any]]) -> list[StepSpans]:
    """Steps of the given spans, and the file that a probe writes of them."""
    clock, steps = [7.0], []
    recorder = SpanRecorder(lambda: clock[0])
    for number, plan in enumerate(plans, start=1):
        recorder.open_root()
        beside = recorder.begin_elsewhere("reward", "judge")
        clock[0] += 0.01
        record(recorder, clock, plan)
        recorder.note({"rss_bytes": 5e8, "cpu_percent": 120.0})
        recorder.end_elsewhere(beside)
        clock[0] += 0.01
        steps.append(recorder.close_root(number))
    path.write_text("".join(json.dumps(step.line()) + "\n" for step in steps))
    return steps


def report_of(steps: list[StepSpans]) -> Report:
    times = summarise([stages_of(step) for step in steps], warmup=1, cycle=1, on_device=False, seams={})
    return build_report(demo_record(timings=times))


seconds = st.floats(1e-6, 2.0)
tree = st.recursive(
    st.just([]), lambda inside: st.lists(st.tuples(st.sampled_from(NAMES), seconds, inside), max_size=4), max_leaves=12
)


@settings(deadline=None, max_examples=30)
@given(plans=st.lists(tree, min_size=2, max_size=4))
def test_slices_nest_and_their_stages_sum_to_the_reports(tmp_path_factory: pytest.TempPathFactory, plans: Any) -> None:
    folder = tmp_path_factory.mktemp("trace")
    report = report_of(written(folder / "spans.jsonl", plans))
    save_report(report, folder)
    totals = self_seconds(events_in(folder))
    spans = sum(len(step.spans) for step in read_spans(folder / "spans.jsonl", range(10)).values())
    for stage in STAGES:
        traced = math.fsum(totals[step, stage] for step in report.steps) / len(report.steps)
        assert traced == pytest.approx(report.stage(stage).mean_s, abs=2e-6 * spans)


def test_threads_ranks_and_counters_have_their_tracks(tmp_path: Path) -> None:
    plan = [("generation", 0.5, [("weight_sync", 0.1, [])]), ("log_save_eval", 0.1, [("generation", 0.3, [])])]
    steps = written(tmp_path / "spans.jsonl", [plan, plan])
    written(tmp_path / "spans.rank1.jsonl", [plan])
    save_report(report_of(steps), tmp_path)
    events = events_in(tmp_path)
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"rank 0", "rank 1"}
    local = lambda event: (event["pid"], event["id2"]["local"])  # noqa: E731
    begins = {local(event): event for event in events if event["ph"] == "b"}
    ends = {local(event): event for event in events if event["ph"] == "e"}
    assert len(begins) == 3 and begins.keys() == ends.keys()
    assert all(event["tid"] != 1 and event["ts"] < ends[number]["ts"] for number, event in begins.items())
    assert {event["name"] for event in events if event["ph"] == "C"} == {"rss_bytes", "cpu_percent"}
    slices = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    evaluated = [event for event in slices if event["cat"] == "log_save_eval"]
    assert len(evaluated) == 4, "what an evaluation generates belongs to it, as in the report"
    first, second = (event for event in slices if event["name"].startswith("step "))
    assert second["ts"] == pytest.approx(first["ts"] + first["dur"])
    clear(tmp_path)
    assert not (tmp_path / TRACE_FILE).exists()


def test_old_and_torn_spans_and_a_full_disk_do_not_lose_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = written(tmp_path / "spans.jsonl", [[("generation", 0.5, [])]] * 2)
    lines = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    del lines[0]["samples"]
    (tmp_path / "spans.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:50])
    (tmp_path / TRACE_FILE).mkdir()
    assert save_report(report_of(steps), tmp_path).is_file()
    assert "no trace" in capsys.readouterr().err
    (tmp_path / TRACE_FILE).rmdir()
    save_report(report_of(steps), tmp_path)
    assert [event["name"] for event in events_in(tmp_path) if event["ph"] == "X"] == ["step 1", "generation"]


def test_nvtx_ranges_follow_spans_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from grpo_autotune.probe.gauges import ranges_for

    told: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    monkeypatch.delenv("GRPO_AUTOTUNE_NVTX", raising=False)
    assert ranges_for(torch.device("cuda")) is None, "an attribute that is None is all that a span then looks at"
    monkeypatch.setenv("GRPO_AUTOTUNE_NVTX", "1")
    assert ranges_for(torch.device("cpu")) is None
    recorder = SpanRecorder(ranges=ranges_for(torch.device("cuda")))
    recorder.open_root()
    with recorder.span("generation", "generate"):
        recorder.begin("weight_sync")  # left open by an exception
    recorder.close_root(1)
    assert told == ["step", "generation: generate", "weight_sync", "end", "end", "end"]
    recorder.open_root()
    recorder.begin("reward")
    recorder.abandon()
    assert told[6:] == ["step", "reward", "end", "end"]
