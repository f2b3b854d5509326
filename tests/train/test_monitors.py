"""Monitors: each rule on a recorded log with its fault and without, episodes, actions, a stall, and a real run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from grpo_autotune.commands.watch import read_runs
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.monitors import MONITORS, MonitorsSection
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.spans import SpanRecorder
from grpo_autotune.records.alerts import Alert, load_alerts, outcome
from grpo_autotune.render.page import render_page
from grpo_autotune.render.terminal import render
from grpo_autotune.render.train_page import train_sections
from grpo_autotune.report.files import load_report
from grpo_autotune.train.monitors import callback
from grpo_autotune.train.monitors.callback import Monitors, run_of
from grpo_autotune.train.monitors.rules import Run
from grpo_autotune.train.monitors.watch import StallWatch
from grpo_autotune.train.runs.callbacks import TrainLog
from grpo_autotune.train.trainer import TrainResult, run_training
from tests.support.faulty_logs import FAULTS, START, healthy_logs, replayed
from tests.support.training import text_config
from tools.monitors_table import FIRES, MEASURED

BASE: dict[str, Any] = {"model": {"name_or_path": "demo"}, "data": {"path": "digits"}, "rewards": [{"name": "format"}]}
HEALTHY = healthy_logs()[0]["log"]


def config_of(**monitors: Any) -> RunConfig:
    return RunConfig.from_dict({**BASE, "monitors": monitors})


def told(log: list[dict[str, Any]], monitor: str, **run: Any) -> list[int]:
    return [alert.step for alert in replayed(log, Run(**run)) if alert.monitor == monitor]


def test_every_monitor_has_a_rule_a_fault_and_a_row_in_the_page() -> None:
    assert list(MONITORS) == list(FIRES)
    assert set(MONITORS) - set(FAULTS) == {"stall"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_once_within_its_persistence_and_a_healthy_log_is_not(name: str) -> None:
    fault, kind = FAULTS[name], "eval" if name == "held_out_gap" else "train"
    assert not told(HEALTHY, name, **fault.run)
    log = fault.of(HEALTHY)
    steps = [row["step"] for row in log if row["kind"] == kind and row["step"] >= START]
    (alert,) = [alert for alert in replayed(log, Run(**fault.run)) if alert.monitor == name]
    assert alert.step <= steps[MONITORS[name][0]["steps"] - 1]
    assert alert.remedy and alert.metric and len(alert.line()) < 300
    assert alert.value is not None or name == "not_finite"


def test_at_most_one_false_alarm_in_twenty_recorded_runs() -> None:
    rows, runs = json.loads(MEASURED.read_text())["rows"], healthy_logs()
    alarms = [replayed(run["log"], Run(run["settings"]["beta"], highest=1.0)) for run in runs]
    assert [[(a.monitor, a.step) for a in alerts] for alerts in alarms] == [
        [(alert["monitor"], alert["step"]) for alert in row["alerts"]] for row in rows
    ]
    assert len(rows) >= 20 and all(row["healthy"] for row in rows)
    assert sum(map(bool, alarms)) * 20 <= len(runs)


@pytest.mark.parametrize("every", [2, 5, 10])
def test_persistence_is_in_steps_however_seldom_a_log_event_comes(every: int) -> None:
    log = [row for row in FAULTS["truncated"].of(HEALTHY) if row["kind"] == "train" and not row["step"] % every]
    (step,) = told(log, "truncated")
    assert START + 10 - every <= step <= START + 9 + every


def test_a_metric_of_every_generation_counts_the_steps_that_reuse_it() -> None:
    rows = [
        {"kind": "train", "step": s, "loss": 0.1} | ({"completions/clipped_ratio": 0.5} if s % 4 == 1 else {})
        for s in range(1, 40)
    ]
    assert told(rows, "truncated") == [13]


def test_an_episode_is_told_once_and_another_after_the_cooldown() -> None:
    def kl_at(*bad: range) -> list[int]:
        steps = range(1, 200)
        return told(
            [{"kind": "train", "step": s, "kl": 9.0 if any(s in b for b in bad) else 0.1} for s in steps], "kl_high"
        )

    assert kl_at(range(10, 190)) == [14]
    assert kl_at(range(10, 14), range(15, 19)) == []
    assert kl_at(range(10, 20), range(30, 40)) == [14]
    assert kl_at(range(10, 20), range(30, 90)) == [14, 64]
    assert kl_at(range(10, 20), range(100, 110)) == [14, 104]


def test_norms_that_spread_over_the_range_of_floats_are_no_error() -> None:
    norms = [1e-290, 1.0, 1e290] * 10
    assert replayed([{"kind": "train", "step": step, "grad_norm": norm} for step, norm in enumerate(norms, 1)]) == []


def test_half_of_a_batch_without_scores_fires_at_once_and_each_reward_for_itself() -> None:
    rows = [
        {"kind": "train", "step": s, "rewards/a/failed": 0.6 * (s == 3), "rewards/b/failed": 0.1} for s in range(1, 9)
    ]
    assert [(a.step, a.metric) for a in replayed(rows)] == [(3, "rewards/a/failed"), (3, "rewards/b/failed")]
    whole = [{"kind": "train", "step": 1, "reward": None, "rewards/a/failed": 1.0}]
    assert [alert.monitor for alert in replayed(whole)] == ["judge_failures"]


@pytest.mark.parametrize(
    ("run", "row", "words"),
    [
        ({"masks": True}, {"completions/clipped_ratio": 1.0}, "all completions were cut off and masked"),
        ({}, {"frac_reward_zero_std": 1.0}, "each group's rewards were equal, and beta is 0"),
        ({"beta": 0.1}, {"frac_reward_zero_std": 0.5}, "the gradient was zero"),
        ({}, {"frac_reward_zero_std": 1.0, "rewards/judge/failed": 1.0}, "most scores failed"),
        (
            {},
            {"frac_reward_zero_std": 1.0, "rewards/judge/failed": None},
            "each group's rewards were equal, and beta is 0",
        ),
    ],
)
def test_the_cause_of_nothing_learned(run: dict[str, Any], row: dict[str, Any], words: str) -> None:
    rows = [{"kind": "train", "step": step, "grad_norm": 0.0, **row} for step in range(1, 7)]
    (alert,) = [alert for alert in replayed(rows, Run(**run)) if alert.monitor == "nothing_learned"]
    assert alert.step == 5 and alert.text == f"grad_norm 0, {words}, for 5 steps" and alert.remedy


def test_a_branch_is_watched_by_its_own_band_and_the_whole_by_no_narrower_one() -> None:
    branches = {"column": "task", "a": {"beta": 0.1, "kl_band": [0.02, 0.06]}, "b": {"beta": 0.3, "kl_band": [0.5, 1]}}
    run = run_of(RunConfig.from_dict({**BASE, "branches": branches}))
    assert run.beta == 0.3 and run.bands == {"a": [0.02, 0.06], "b": [0.5, 1]}
    rows = [{"kind": "train", "step": s, "kl": 1.5, "branch/a/kl": 0.2, "branch/b/kl": 1.8} for s in range(1, 9)]
    assert [(alert.monitor, alert.metric, alert.limit) for alert in replayed(rows, run)] == [
        ("kl_high", "branch/a/kl", 0.12)
    ]


@pytest.mark.parametrize(
    ("monitors", "words"),
    [
        ({"kl_hig": {}}, "monitors.kl_hig: unknown key. Nearest known key: monitors.kl_high."),
        ({"kl_high": {"below": 1.0}}, "monitors.kl_high.below: unknown key"),
        ({"kl_high": {"above": "x"}}, "monitors.kl_high.above: 'x' is not accepted. Accepted: a number."),
        ({"kl_high": {"steps": 0}}, "monitors.kl_high.steps: 0 is not accepted"),
        ({"kl_high": {"action": "skip_step"}}, "monitors.kl_high.action: 'skip_step' is not accepted"),
        ({"stall": {"action": "stop"}}, "monitors.stall.action: unknown key"),
        ("all", "monitors: 'all' is not accepted. Accepted: none, or a mapping of monitors."),
    ],
)
def test_a_mistake_in_the_section_is_one_line(monitors: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict({**BASE, "monitors": monitors})
    assert str(error.value).startswith(words)


def test_keys_that_are_given_change_and_the_others_stay() -> None:
    config = config_of(kl_high={"above": 0.2, "action": "stop"}, stall=False, truncated=True, command="true")
    on = config.monitors.items_on()
    assert "stall" not in on and len(on) == 13 and (on["kl_high"].above, on["kl_high"].steps) == (0.2, 5)
    assert RunConfig.from_yaml(config.to_yaml()) == config
    none = RunConfig.from_dict({**BASE, "monitors": "none"})
    assert none.monitors.items_on() == {} and RunConfig.from_yaml(none.to_yaml()) == none
    assert config_of().to_dict().get("monitors") is None


class Ranks:
    """A trainer as far as monitors see one; `others` is what another rank brings into a collective."""

    def __init__(self, **more: Any) -> None:
        self.args = SimpleNamespace(report_to=[], process_index=0, max_grad_norm=1.0, device=torch.device("cpu"))
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        self.control = SimpleNamespace(should_save=False, should_training_stop=False)
        self.is_deepspeed_enabled, self.grad_norm, self.others = False, 0.2, 0.0
        self.__dict__.update(more)

    def largest(self, value: float) -> list[float]:
        return [max(value, self.others)]

    def monitored(self, folder: Path, *, resumes: bool = False, **monitors: Any) -> Monitors:
        self.log = TrainLog(folder / "train_log.jsonl")
        return Monitors(self, config_of(**monitors), folder, self.log, resumes=resumes)

    def logs(self, monitors: Monitors, **values: Any) -> SimpleNamespace:
        """The control after a log event of the next step."""
        self.state.global_step += 1
        self.log.on_log(self.args, self.state, self.control, values)
        monitors.on_log(self.args, self.state, self.control)
        return self.control


def test_actions_are_those_of_the_heaviest_alert_of_any_rank(tmp_path: Path) -> None:
    ranks = Ranks()
    monitors = ranks.monitored(tmp_path, not_finite={"action": "stop"}, kl_high={"steps": 1, "action": "checkpoint"})
    assert vars(ranks.logs(monitors, reward=0.5, kl=0.1)) == {"should_save": False, "should_training_stop": False}
    assert vars(ranks.logs(monitors, reward=0.5, kl=9.0)) == {"should_save": True, "should_training_stop": False}
    assert vars(ranks.logs(monitors, reward=float("nan"), kl=9.0)) == {
        "should_save": True,
        "should_training_stop": True,
    }
    elsewhere = Ranks(others=2.0)
    monitors = elsewhere.monitored(tmp_path, not_finite={"action": "stop"})
    assert elsewhere.logs(monitors, reward=0.5).should_training_stop and monitors.is_stopped


def test_an_alert_is_told_in_every_place_and_after_a_resume_not_again(tmp_path: Path, capsys, monkeypatch) -> None:
    sent: list[dict[str, str]] = []
    alert = lambda **words: sent.append(words)  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(alert=alert)))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(alert=alert))
    ranks = Ranks()
    ranks.args.report_to = ["wandb", "trackio"]
    monitors = ranks.monitored(tmp_path)
    for _ in range(12):
        ranks.logs(monitors, **{"reward": 0.5, "completions/clipped_ratio": 0.5})
    monitors.close()
    line, end = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: truncated at step 10: completions/clipped_ratio 50%, above 20%, for 10 steps. Raise "
    )
    assert end.startswith("14 monitors, 1 fired: truncated at step 10; nothing to read for loss_spike, ")
    assert [words["title"] for words in sent] == ["truncated at step 10"] * 2
    (stored,) = load_alerts(tmp_path)
    assert line.endswith(stored.line()) and stored.run == str(tmp_path)

    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('{"monitor": "kl_hi')  # a kill while it was written
    again = Ranks()
    again.state.global_step = 12
    resumed = again.monitored(tmp_path, resumes=True)
    for _ in range(8):
        again.logs(resumed, **{"completions/clipped_ratio": 0.5})
    assert load_alerts(tmp_path) == [stored] and capsys.readouterr().err == ""
    again.logs(resumed, reward=float("nan"))
    assert [alert.monitor for alert in load_alerts(tmp_path)] == ["truncated", "not_finite"]
    (tmp_path / "train_log.jsonl").unlink()  # as a new run does
    assert Ranks().monitored(tmp_path).report() == {"monitors": 14, "alerts": []}


@pytest.mark.slow
def test_a_command_that_hangs_is_ended_with_its_children_and_not_run_again(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(callback, "COMMAND_S", 0.3)
    ranks = Ranks()
    monitors = ranks.monitored(
        tmp_path, command=f"echo once >> {tmp_path}/runs; sleep 60 & echo $! > {tmp_path}/pid; wait"
    )
    for _ in range(2):
        ranks.logs(monitors, reward=float("nan"), kl=float("nan"))
    monitors.close()
    assert (tmp_path / "runs").read_text() == "once\n" and len(load_alerts(tmp_path)) == 2
    sleeper = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE
    assert capsys.readouterr().err.count("warning: monitors.command: TimeoutError: it took more than 0.3 s") == 1


def test_a_step_that_spikes_is_left_out_and_told(tmp_path: Path) -> None:
    ranks, model = Ranks(), torch.nn.Linear(1, 1)
    monitors = ranks.monitored(tmp_path, loss_spike={"action": "skip_step"})
    left_out = []
    for step in range(30):
        norm = ranks.grad_norm = 40.0 if step == 25 else 0.2 + 0.01 * (step % 3)
        model.weight.grad = torch.ones(1, 1)
        monitors.on_pre_optimizer_step(ranks.args, ranks.state, ranks.control, model=model)
        left_out += [step] if model.weight.grad is None else []
        ranks.logs(monitors, grad_norm=norm)
    assert left_out == [25] and [(a.step, a.action) for a in load_alerts(tmp_path)] == [(26, "skip_step")]
    ranks.args.max_grad_norm = 0.0
    with pytest.raises(
        ConfigError, match=r"monitors\.loss_spike\.action: under DeepSpeed, or without grpo\.max_grad_norm"
    ):
        ranks.monitored(tmp_path, loss_spike={"action": "skip_step"})


class Stages:
    """A recorder of stages on a clock that the test turns, and a watch that looks every five seconds."""

    def __init__(self, folder: Path) -> None:
        self.now, self.steps, self.told = 0.0, 1, list[Alert]()
        self.recorder = SpanRecorder(lambda: self.now)
        trainer = SimpleNamespace(args=SimpleNamespace(process_index=0), state=SimpleNamespace(global_step=7))
        self.watch = StallWatch(trainer, MonitorsSection().stall, folder, self.told.append, lambda: self.now)

    def stay(self, stage: str, seconds: float) -> None:
        self.recorder.open_root()
        span = self.recorder.begin(stage)
        for _ in range(int(seconds // 5)):
            self.watch.look((self.steps, (self.steps, *self.recorder.mark()), stage))
            self.now += 5.0
        self.recorder.end(span)
        self.steps += 1


def test_a_stage_that_does_not_end_is_told_once_with_the_stacks(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.stay("reward", 40)
    assert not stages.told and not list(tmp_path.iterdir())
    stages.stay("reward", 500)
    (alert,) = stages.told
    assert (alert.metric, alert.value, alert.limit, alert.rank, alert.step) == ("reward", 205.0, 200.0, 0, 8)
    assert alert.text == "rank 0 has been in reward for 3 min 25 s; its threads' stacks are in stacks-rank0.txt"
    text = (tmp_path / "stacks-rank0.txt").read_text()
    assert "UTC, rank 0 has been in reward for 3 min 25 s:" in text and "test_a_stage_that_does_not_end" in text
    stages.stay("generation", 100)
    assert [(alert.metric, alert.value) for alert in stages.told[1:]] == [("generation", 65.0)]  # by its own waits


def test_no_stall_in_a_first_step_an_evaluation_or_a_process_that_was_suspended(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.steps = 0
    stages.stay("generation", 1200)
    stages.stay("log_save_eval", 1500)
    stages.watch.look(place := (9, "mark", "reward"))
    stages.now += 3600.0
    stages.watch.look(place)
    stages.watch.look(None)
    assert not stages.told


def test_alerts_are_on_the_page_with_an_anchor_each_and_in_the_printed_report() -> None:
    alerts = replayed(FAULTS["truncated"].of(HEALTHY))
    demo = load_report(Path(__file__).parents[2] / "docs" / "benchmarks" / "demo")
    report = demo.model_copy(update={"monitors": 14, "alerts": alerts})
    page = render_page("A run", train_sections(HEALTHY, report, None, alerts))
    assert '<tr id="alert-truncated-at-step-40">' in page and "14 monitors, 1 fired: truncated at step 40." in page
    assert "<h2" in page and 'id="alerts-title">Alerts' in page
    text = " ".join(render(report).split())
    assert "Monitors 14 monitors, 1 fired: truncated at step 40" in text and alerts[0].remedy[1:] in text
    assert "onitor" not in render(demo) and "Alerts" not in render_page("A run", train_sections(HEALTHY, None))


def test_torchrun_is_told_of_a_monitors_stop_by_the_rank_that_writes_the_report(monkeypatch) -> None:
    numbers = {"steps": 2, "total_steps": 4, "seconds": 1.0, "resumed_from": None, "signum": 0}
    result = TrainResult(folder="run", metrics={}, eval_metrics={}, by_monitor=True, **numbers)
    assert result.exit_code == 1
    monkeypatch.setenv("RANK", "1")
    assert result.exit_code == 0 and result.model_copy(update={"signum": 15}).exit_code == 143


@pytest.mark.slow
def test_a_run_that_a_monitor_stops(tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = f"cat >> {tmp_path}/sent.jsonl; exit 3"
    monitors = {"truncated": {"steps": 2, "action": "stop"}, "command": command}
    config = text_config(tiny("qwen3"), tmp_path, {"monitors": monitors}, max_steps=4)
    result = run_training(config, folder)
    assert (result.steps, result.exit_code, result.by_monitor) == (2, 1, True)
    assert result.line().startswith("stopped by a monitor after step 2 of 4, saved; go on with --resume")
    assert (folder / "checkpoints" / "checkpoint-2").is_dir() and not (folder / "model").exists()
    (alert,) = load_alerts(folder)
    assert json.loads((tmp_path / "sent.jsonl").read_text())["text"] == alert.text
    told = capfd.readouterr().err
    assert told.count("warning: truncated at step 2: ") == 1
    assert told.count("warning: monitors.command: CalledProcessError: Command ") == 1 and "exit status 3" in told
    assert run_training(config, folder, resume=True).steps == 4
    assert "14 monitors, 1 fired: truncated at step 2" in (told := capfd.readouterr().err)
    assert "warning: truncated" not in told and load_alerts(folder) == [alert]


def test_watch_tells_the_newest_alerts(tmp_path: Path) -> None:
    alerts = replayed(FAULTS["truncated"].of(HEALTHY)) + replayed(FAULTS["kl_high"].of(HEALTHY))
    (tmp_path / "alerts.jsonl").write_text("".join(f"{alert.model_dump_json()}\n" for alert in alerts) + '{"torn')
    LiveFile(tmp_path).write(stage="generation", step=12, of=80)
    (run,) = read_runs(tmp_path)
    assert [text for name, text in run.facts if name == "alert"] == [alert.line() for alert in alerts]
    assert outcome(14, alerts) == "14 monitors, 2 fired: truncated at step 40 and kl_high at step 35"


def test_a_held_out_reward_has_risen_beyond_both_intervals() -> None:
    def evaluated(step: int, reward: float) -> dict[str, Any]:
        return {"kind": "eval", "step": step, "eval_runtime": 1.0, "eval_reward": reward, "eval_reward_ci": 0.1}

    run = Run()
    for step, reward, gained in ((1, 0.5, False), (2, 0.65, False), (3, 0.75, True)):
        run.add(evaluated(step, reward))
        assert run.gained() is gained
