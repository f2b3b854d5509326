"""A search on several workers, on a machine on paper: what runs beside, what alone, and what one that fails costs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from grpo_autotune.commands import search as commands
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.hardware.places import Place
from grpo_autotune.knobs import TABLE
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.render.search import render_search
from grpo_autotune.render.search_live import SearchView, panel
from grpo_autotune.render.search_page import search_sections
from grpo_autotune.search.session import search
from tests.support.nvml import Card, with_gpus
from tests.support.paper_machine import (
    GIB,
    MACHINE,
    Listener,
    PaperModels,
    PaperTrials,
    PaperWorker,
    seconds,
    user_config,
)

SLOWER = {"core 0": 1.3, "core 1": 1.9}
PLACES = tuple(Place(name, cores=(number,), share=0.5) for number, name in enumerate(SLOWER))
LEFT_OUT: dict[str, Any] = dict.fromkeys(row.key for row in TABLE)
EXACT = {"grpo.per_device_train_batch_size": [2, 4, 8, 16], "grpo.gradient_checkpointing": [True, False]}
SMALL = user_config(knobs=LEFT_OUT | EXACT)
WITH_REWARDS = user_config(knobs=LEFT_OUT | EXACT | {"data.image_size": [512, 256]})
ROOMY = MACHINE.model_copy(update={"memory_bytes": 32 * GIB})


class Paper:
    """Searches in one folder by two workers, whose places take longer than the whole machine."""

    def __init__(self, folder: Path, **trials: Any) -> None:
        self.folder, self.view = folder, Listener()
        self.trials = PaperTrials(folder, lengths=[[3, 4]], **trials)
        self.workers: list[PaperWorker] = []

    def search(self, budget_s: float = 200.0, places: tuple[Place, ...] = PLACES, **more: Any) -> SearchReport:
        def worker(folder: Path, place: Place) -> PaperWorker:
            self.workers.append(self.trials.worker(SLOWER[place.name]))
            return self.workers[-1]

        more = {"config": SMALL, "machine": ROOMY, **more}
        return search(
            **more,
            budget_s=budget_s,
            out=None,
            run_dir=self.folder,
            view=self.view,
            runner=lambda folder: self.trials,
            fit=lambda *probe: PaperModels(),
            clock=self.trials.clock,
            places=places,
            worker=worker,
            wait=self.trials.wait,
        )


def test_workers_find_what_one_finds_and_what_decides_runs_alone(tmp_path: Path) -> None:
    one, two = Paper(tmp_path / "one"), Paper(tmp_path / "two")
    single, report = (paper.search(places=places, config=WITH_REWARDS) for paper, places in ((one, ()), (two, PLACES)))
    assert report.best.raced and report.best.speedup >= 0.97 * single.best.speedup
    assert {row.place for row in report.trials if row.purpose != "timed" or row.source in ("race", "revert")} == {None}
    assert two.trials.most_beside == 2 and two.trials.beside_one_alone == 0
    for place, slower in SLOWER.items():
        rows = [row for row in report.trials if row.place == place]
        assert rows[0].source == "again" and len(rows) > 1
        for row in rows:  # seconds as they are alone
            config = RunConfig.from_dict(next(s.config for s in two.trials.specs if s.number == row.number))
            assert row.step_s == pytest.approx(seconds(config), rel=0.05)
            assert row.elapsed_s > slower * 4.0
        numbers = ", ".join(str(row.number) for row in rows)
        said = rf"Worker on {place}: {len(rows)} trials \({numbers}\); your configuration took x ([\d.]+) of"
        told = re.search(said, "\n".join(report.notes))
        assert told is not None and float(told[1]) == pytest.approx(slower, rel=0.05)
    assert all(worker.closed for worker in two.workers)
    assert "Worker on core 1" in render_search(report)
    assert SearchReport.model_validate_json((tmp_path / "two" / "search.json").read_text()) == report


def test_workers_load_their_libraries_at_the_same_time_before_the_probe(tmp_path: Path) -> None:
    loading: list[float] = []

    def act(spec: TrialSpec) -> TrialOutcome | None:
        loading.extend(paper.trials.now for worker in paper.workers if worker.is_loading or worker.loaded_at is None)
        return None

    paper = Paper(tmp_path, act=act)
    paper.search()
    assert not loading
    assert [worker.loaded_at for worker in paper.workers] == [4.0 * slower for slower in SLOWER.values()]


def test_the_views_show_every_worker(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    report = paper.search()
    out = io.StringIO()
    with SearchView(Console(file=out, width=200, force_terminal=True)) as live:
        for state in paper.view.states[:6]:  # the processes' start, the probe, and each worker's first trial
            live.show(state)
    assert "core 0: your own configuration" in (shown := out.getvalue().rpartition("Search")[2])
    assert "core 1: your own configuration" in shown and "probe" not in shown
    out = io.StringIO()
    with SearchView(Console(file=out, width=500), lambda: 0.0) as plain:
        for state in paper.view.states:
            plain.show(state)
    text = out.getvalue()
    assert "| trial 2 on core 1: your own configuration" in text
    assert len(text.splitlines()) < 3 * len(report.trials)
    page = str(search_sections(report))
    assert "on 2 workers" in page and "'core 1'" in page


def test_what_needs_more_than_a_workers_memory_runs_alone(tmp_path: Path) -> None:
    paper = Paper(tmp_path)  # of 16 GiB: micro batch 8 without checkpointing takes 10
    report = paper.search(machine=MACHINE)
    assert max(row.peak_bytes or 0 for row in report.trials if row.place) < 8 * GIB
    assert report.best.knobs["grpo.per_device_train_batch_size"] == 8
    assert not [row for row in report.trials if row.status == "oom"]


def killed(numbers: set[int]) -> Callable[[TrialSpec], TrialOutcome | None]:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        if spec.number not in numbers:
            return None
        return TrialOutcome(number=spec.number, status="killed", why="ended by SIGKILL", elapsed_s=2.0)

    return act


def test_a_worker_that_dies_loses_one_trial_which_another_process_runs(tmp_path: Path) -> None:
    paper = Paper(tmp_path, act=killed({4}))
    report = paper.search()
    lost = next(row for row in report.trials if row.status == "killed")
    again = [row for row in report.trials if row.knobs == lost.knobs and row.status == "ok" and row.place]
    assert len(again) == 1 and report.best.raced
    said = f"trial 4 on {lost.place} is lost: ended by SIGKILL; another process takes the next"
    assert said in report.notes
    assert [line for state in paper.view.states for line in panel(state) if line == f"lost    {said}"]


def test_a_place_that_cannot_measure_the_users_configuration_is_left_out(tmp_path: Path) -> None:
    def act(spec: TrialSpec) -> TrialOutcome | None:
        broken = spec.place == "core 1"
        why = "the GPU failed"
        return TrialOutcome(number=spec.number, status="crashed", why=why, elapsed_s=2.0) if broken else None

    report = Paper(tmp_path, act=act).search()
    assert sum(row.place == "core 1" for row in report.trials) == 2 and report.best.raced
    assert (
        "core 1 could not measure your configuration (crashed: the GPU failed): the search goes on without it"
        in str(report.notes)
    )


def test_a_search_whose_parent_was_killed_goes_on_with_its_workers(tmp_path: Path) -> None:
    def kill(spec: TrialSpec) -> TrialOutcome | None:
        if spec.number == 6:
            raise SystemError("kill -9")
        return None

    paper = Paper(tmp_path, act=kill)
    with pytest.raises(SystemError):
        paper.search()
    specs = {spec.number: spec for spec in paper.trials.specs}
    done = [n for n in specs if (tmp_path / "trials" / f"{n:04d}" / "outcome.json").exists()]
    later = Paper(tmp_path)
    report = later.search(resume=True)
    assert {row.number for row in report.trials} >= set(done) and report.best.raced
    own = [spec for spec in later.trials.specs if spec.place and spec.source == "again"]
    assert not own or own[0] is not later.trials.specs[0], "what a place takes is known from the earlier process"
    placed = [row for row in report.trials if row.number in done and row.place]
    assert placed and all(
        row.step_s == pytest.approx(seconds(RunConfig.from_dict(specs[row.number].config)), rel=0.05) for row in placed
    )


def test_ctrl_c_gives_every_combination_back(tmp_path: Path) -> None:
    paper = Paper(tmp_path)

    def wait(seconds: float) -> None:
        paper.trials.now += 0.25
        if len(paper.trials.specs) == 6:
            raise KeyboardInterrupt

    paper.trials.wait = wait  # type: ignore[method-assign]
    report = paper.search()
    assert report.ended == "interrupted" and paper.trials.beside == 0 and all(worker.closed for worker in paper.workers)
    resumed = Paper(tmp_path).search(resume=True)
    assert resumed.best.raced
    names = [json.dumps(row.knobs, sort_keys=True) for row in resumed.trials if row.place and row.source != "again"]
    assert len(names) == len(set(names))


def test_a_budget_that_does_not_hold_a_trial_of_each_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small: no trial fits") as caught:
        Paper(tmp_path).search(budget_s=28.0)
    assert caught.value.where == "--budget" and "Give about" in str(caught.value)
    assert Paper(tmp_path / "one").search(budget_s=28.0, places=()).baseline.step_s > 0.0


def test_workers_share_no_server(tmp_path: Path) -> None:
    config = user_config().to_dict()
    config["grpo"]["use_vllm"] = True
    served = RunConfig.from_dict({**config, "vllm": {"mode": "server"}})
    with pytest.raises(ConfigError, match="several workers cannot share a vLLM server"):
        Paper(tmp_path).search(config=served)


def test_on_gpus_what_runs_alone_has_the_first_place_and_a_trial_the_smallest_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def instead(config: RunConfig, **more: Any) -> SimpleNamespace:
        asked.update(more)
        return SimpleNamespace(ended="budget")

    with_gpus(monkeypatch, Card(), Card(memory_bytes=40 * GIB), visible="1,0")
    monkeypatch.setattr(commands, "search", instead)
    monkeypatch.setattr(commands, "keep_page", lambda folder: None)
    commands.search_config(user_config(), "auto", run_dir=tmp_path)
    first, second = asked["places"]
    assert (first.gpus, second.gpus) == (("1",), ("0",))
    assert [gpu.memory_bytes for gpu in asked["machine"].gpus] == [40 * GIB]
    assert asked["runner"](tmp_path) is asked["worker"](tmp_path, first) is not asked["worker"](tmp_path, second)
