"""Logs of other frameworks: every format gives the same seconds, each of them with its key and its line."""

from __future__ import annotations

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_autotune.commands.interop.config import import_log
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.logs import steps
from grpo_autotune.interop.logs.steps import is_log
from grpo_autotune.records.imported import TRAINING_PASS, LogReport
from grpo_autotune.report.logged import read_log
from tests.support import logs

SCALES = (1.0, 1.1, 0.9, 1.0, 1.2)


def read(tmp_path: Path, text: str | bytes, name: str = "run.log", batch: dict[str, float] | None = None) -> LogReport:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_log(path, batch)


def shares(report: LogReport) -> dict[str, float]:
    assert sum(row.self_s for row in report.stages) == pytest.approx(report.step_s, rel=1e-3)
    return {row.name: row.self_s for row in report.stages}


VERL = [logs.verl_step(step, scale) for step, scale in enumerate(SCALES, start=1)]
CONSOLE = [logs.in_ray(logs.verl_line(step, metrics)) for step, metrics in enumerate(VERL, start=1)]
TABLE = logs.table({"Step": n, **row} for n, row in enumerate(VERL, start=1))
FORMS: dict[str, tuple[str, str | bytes]] = {
    "console": ("run.log", "\n".join(["some noise - of: others", *CONSOLE, "Traceback"])),
    "three decimals": ("run.log", "\n".join(logs.verl_line(n, row, digits=3) for n, row in enumerate(VERL, start=1))),
    "a terminal of 100 columns": (
        "run.log", "\n".join(f"{logs.wrapped(logs.verl_line(n, m), 100)}\nWARNING: x" for n, m in enumerate(VERL, 1))
    ),
    "a line for each metric": (
        "run.log",
        "\n".join(logs.verl_line(n, m).replace(" - ", "\n - ").replace("\n", "", 1) for n, m in enumerate(VERL, 1)),
    ),
    "numbers of numpy": ("run.log", "\n".join(re.sub(r":(\d+\.\d+)", r":np.float64(\1)", line) for line in CONSOLE)),
    "file": ("run.jsonl", logs.jsonl({"step": n, "data": row} for n, row in enumerate(VERL, start=1))),
    "an export of W&B": ("run.csv", logs.table({"_step": n, **row} for n, row in enumerate(VERL, start=1))),
    "panels": (
        "run.csv",
        logs.table(
            {"Step": n} | {f"my run - {k}{end}": v for k, v in row.items() for end in ("", "__MIN", "__MAX")}
            for n, row in enumerate(VERL, start=1)
        ),
    ),
    "a line for each value": (
        "run.csv",
        logs.table(
            {"key": key, "value": value, "step": step, "timestamp": 1000 * step}
            for key in VERL[0] for step, value in ((n, row[key]) for n, row in enumerate(VERL, start=1))
        ),
    ),
    "a list of JSON": ("run.jsonl", json.dumps([{"step": n, **row} for n, row in enumerate(VERL, start=1)])),
    "semicolons and decimal commas": ("run.csv", TABLE.replace(",", ";").replace(".", ",")),
    "tabs": ("run.tsv", TABLE.replace(",", "\t")),
    "quotes": ("table", re.sub(r"[^,\r\n]+", r'"\g<0>"', TABLE)),
    "thousands": ("run.log", "\n".join(re.sub(r"num_tokens:\d+", "num_tokens:25,600", line) for line in CONSOLE)),
    "UTF-16": ("run.log", "\n".join(CONSOLE).encode("utf-16")),
    "gzip": ("run.log.gz", gzip.compress("\r\n".join(CONSOLE).encode(), mtime=0)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_verl_log_gives_the_same_stages(tmp_path: Path, form: str) -> None:
    name, text = FORMS[form]
    report = read(tmp_path, text, name)
    expected = {"generation": 50.0, TRAINING_PASS: 30.0, "policy_logprob": 6.0, "reference_logprob": 5.0,
                "reward": 4.0, "adv": 0.5, "other": 0.05}  # fmt: skip
    assert shares(report) == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert (report.framework, report.counted, report.steps) == ("verl", "rollout", [1, 2, 3, 4, 5])
    assert {name: report.facts[name].value for name in ("completions per step", "GPUs")} == {
        "completions per step": 64, "GPUs": 8
    }  # fmt: skip
    assert report.facts["completions cut off"].value == pytest.approx(0.25)
    assert is_log(tmp_path / name)


def test_every_number_can_be_found_again_by_its_line_and_keys(tmp_path: Path) -> None:
    report = read(tmp_path, "\n" + FORMS["file"][1], "run.jsonl")
    source = (tmp_path / "run.jsonl").read_text().splitlines()
    for at, line in enumerate(report.lines):
        row = json.loads(source[line - 1])["data"]
        assert report.step_seconds[at] == row[report.whole]
        for stage in report.stages:
            parts = [-row[key[1:]] if key.startswith("-") else row[key] for key in stage.keys]
            assert stage.per_step_s[at] == pytest.approx(sum(parts), abs=1e-9), stage.name


def test_the_training_pass_is_one_row_and_what_it_holds_is_named(tmp_path: Path) -> None:
    report = read(tmp_path, FORMS["console"][1])
    row = next(row for row in report.stages if row.name == TRAINING_PASS)
    assert row.state == "lumped"
    assert row.holds == ["policy_logprob.training_forward", "backward", "optimizer", "sync_wait"]
    assert {"data", "log_save_eval", "tools"} == set(report.absent)
    states = {row.name: row.state for row in report.stages}
    assert states["reward"] == "known"
    assert states["generation"] == "lumped"  # without `update_weights` the push of the weights is in it


@pytest.mark.parametrize(
    ("more", "step_s", "inside"),
    [
        ({"testing": 40.0, "save_checkpoint": 20.0}, 155.55, {"testing", "save_checkpoint"}),
        ({"testing": 40.0, "save_checkpoint": 20.0}, 95.55, set()),
        ({"testing": 40.0, "save_checkpoint": 20.0}, 115.55, {"save_checkpoint"}),
        ({"save_checkpoint": 20.0}, 95.55, set()),
    ],
)
def test_saving_and_testing_are_in_the_step_where_it_has_room_for_them(
    tmp_path: Path, more: dict[str, float], step_s: float, inside: set[str]
) -> None:
    last = logs.verl_step(6, 1.0, **logs.TIMED, **more, step=step_s)
    report = read(tmp_path, logs.jsonl({"step": n, "data": row} for n, row in enumerate([*VERL, last], start=1)))
    row = next((row for row in report.stages if row.name == "log_save_eval"), None)
    assert {key.removeprefix("timing_s/") for key in (row.keys if row else [])} == inside
    assert more.keys() - inside == report.beside.keys() & more.keys()
    shares(report)


@pytest.mark.parametrize(
    ("timers", "generation", "sync", "holds"),
    [
        ({"generate_sequences": 38.0, "generation_timing/max": 40.0, "generation_timing/topk_ratio": 0.9}, 40.0, 10.0,
         ["generation"]),
        ({"generate_sequences": 38.0, "reshard": 8.0}, 42.0, 8.0, ["generation", "prompt"]),
        ({"update_weights": 3.0, "agent_loop/compute_score/mean": 1.0, "agent_loop/slowest/prompt_length": 90.0}, 50.0,
         3.0, ["generation", "prompt", "reward"]),
    ],
)  # fmt: skip
def test_generation_is_cut_where_the_version_can(
    tmp_path: Path, timers: dict[str, float], generation: float, sync: float, holds: list[str]
) -> None:
    whole = sum(logs.TIMED.values()) + timers.get("update_weights", 0.0) + 0.05
    row = logs.verl_step(1, 1.0, **logs.TIMED, **timers, step=whole)
    report = read(tmp_path, logs.jsonl([{"step": 1, "data": row}]))
    assert shares(report) == pytest.approx(shares(report) | {"generation": generation, "weight_sync": sync})
    assert next(row for row in report.stages if row.name == "generation").holds == holds


def test_a_timer_of_somebodys_own_is_a_row_and_its_contents_are_not_called_absent(tmp_path: Path) -> None:
    timers = {"my_rollout": 50.0, "update_actor": 30.0, "adv": 0.5}
    report = read(tmp_path, logs.verl_line(1, logs.verl_step(1, 1.0, **timers)))
    assert next(row for row in report.stages if row.name == "my_rollout").state == "unknown"
    assert "or inside my_rollout" in _printed(report)


def test_easyr1_is_told_by_its_names_and_waits_for_rewards_in_adv(tmp_path: Path) -> None:
    timers = {
        "gen": 50.0,
        "reward": 0.001,
        "old": 6.0,
        "ref": 5.0,
        "adv": 9.0,
        "update_actor": 30.0,
        "validation": 20.0,
    }
    rows = [{"step": n, **logs.nested(logs.verl_step(n, 1.0, **timers))} for n in (1, 2, 3)]
    report = read(tmp_path, logs.jsonl(rows), "experiment_log.jsonl")
    assert report.framework == "EasyR1"
    assert shares(report)["log_save_eval"] == pytest.approx(20.0)
    assert next(row for row in report.stages if row.name == "adv").holds == ["other", "reward"]


def test_speed_since_the_start_becomes_seconds_of_each_step(tmp_path: Path) -> None:
    def rows(start: int) -> str:
        elapsed, entries = 0.0, []
        for step in range(start + 1, start + 7):
            elapsed += 10.0 + step - start
            words = f"{int(elapsed) // 60}m {int(elapsed) % 60}s"
            entries.append({"loss": 0.1, "reward": 0.5, "completions/mean_length": 200.0, "elapsed_time": words,
                            "global_step/max_steps": f"{step}/90", "memory(GiB)": 70.0,
                            "train_speed(s/it)": round(elapsed / (step - start), 6)})  # fmt: skip
        return logs.jsonl([*entries, {"model_parameter_info": "x", "global_step": start + 6, "log_history": [{}]}])

    for start in (0, 50):
        report = read(tmp_path, rows(start), "logging.jsonl")
        assert report.framework == "ms-swift"
        assert report.step_seconds == pytest.approx([11.0, 12.0, 13.0, 14.0, 15.0, 16.0], abs=1e-4)
        assert report.stages == []
        assert "every stage" in _printed(report)
    resumed = read(tmp_path, rows(0) + rows(4), "logging.jsonl")  # its clock begins anew
    assert resumed.step_seconds == pytest.approx([11.0, 12.0, 13.0, 14.0, 12.0, 13.0, 14.0, 15.0, 16.0], abs=1e-4)


def test_a_trainer_state_has_whole_steps(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [
        {"step": n, "loss": 0.1, "step_time": 30.0 + n % 2, "completions/clipped_ratio": 0.3, "reward": 0.5,
         "frac_reward_zero_std": 0.5} for n in range(1, 9)
    ]  # fmt: skip
    state = json.dumps({"log_history": [*history, {"step": 8, "eval_loss": 1.0}], "global_step": 8}, indent=2)
    report = read(tmp_path, state, "trainer_state.json")
    assert (report.step_s, report.whole, report.lines) == (30.5, "step_time", [1, 2, 3, 4, 5, 6, 7, 8])
    assert any("50% of the groups had equal rewards" in advice.text for advice in report.verdict)
    assert any("30% of the completions were cut off" in advice.text for advice in report.verdict)
    console = "".join(f"\r 5%|x| {n}/90 [00:10<01:00, 3.0s/it]{row}\n" for n, row in enumerate(history, start=1))
    assert read(tmp_path, console).step_seconds == report.step_seconds
    one_line = json.dumps({"log_history": history})
    assert read(tmp_path, one_line, "trainer_state.json").step_seconds == report.step_seconds


def test_dictionaries_of_a_console_are_read_one_after_the_other_and_wrapped(tmp_path: Path) -> None:
    rows = [{"loss": 0.1 * n, "grad_norm": float("nan"), "step_time": f"{10 + n}", "epoch": 0.1} for n in range(1, 5)]
    for text in (" ".join(map(str, rows)), "\n".join(logs.wrapped(str(row), 40) for row in rows)):
        assert read(tmp_path, text).step_seconds == [11.0, 12.0, 13.0, 14.0]


def test_the_rows_of_a_console_do_not_count_the_steps_of_its_runtime(tmp_path: Path) -> None:
    rows = [{"loss": "0.1", "epoch": "0.1", "reward": f"{0.1 * n}"} for n in range(1, 6)]
    last = {"train_runtime": 1000.0, "train_steps_per_second": 0.05, "train_loss": 0.1}
    report = read(tmp_path, "\n".join(map(str, [*rows, last])))
    assert (report.step_s, report.whole) == (20.0, "train_runtime / 50 steps")
    assert report.facts["reward, mean"].value == pytest.approx(0.3) and not report.warnings


def test_what_is_left_of_a_packed_file_is_read(tmp_path: Path) -> None:
    packed = gzip.compress(random.Random(1).randbytes(1 << 16) + "\n".join(["", *CONSOLE * 20]).encode(), 0)
    report = read(tmp_path, packed[:-3000], "run.gz")
    assert "cut off" in report.warnings[-1]
    assert is_log(tmp_path / "run.gz")


def test_a_later_run_in_the_same_file_counts(tmp_path: Path) -> None:
    again = [logs.verl_line(step, logs.verl_step(step, 2.0)) for step in (4, 5, 6)]
    report = read(tmp_path, "\n".join([*CONSOLE, *again]))
    assert report.steps == [1, 2, 3, 4, 5, 6]
    assert report.step_seconds[3] == pytest.approx(2 * 95.55)
    assert report.skipped["steps of an earlier run"] == 2
    assert report.warnings == ["line 6: step numbers go back from 5 to 4: the later run counts"]


def test_asynchronous_trainers_have_no_breakdown(tmp_path: Path) -> None:
    row = logs.verl_step(1) | {"timing_s/timing_s/param_sync": 3.0, "fully_async/trainer/idle_ratio": 0.2}
    report = read(tmp_path, logs.verl_line(1, row))
    assert (report.stages, report.beside["gen"].value) == ([], 50.0)
    assert "beside each other" in report.warnings[0]


def test_bad_values_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    torn, full = CONSOLE[4][: len(CONSOLE[4]) * 2 // 3], [*CONSOLE[:3], CONSOLE[3].replace(":50.0", ":nan")]
    validation = logs.in_ray("step:0 - val-core/gsm8k/reward/mean@1:0.5")
    report = read(tmp_path, "\n".join([validation, *full, '{"step": 7, "timing_s/step": 9', torn]))
    assert report.steps == [1, 2, 3]
    assert report.skipped["lines that are torn"] == 1
    assert report.skipped["steps without seconds of the whole (validation alone, or torn)"] == 1
    assert report.skipped[steps.NOT_A_NUMBER] == 1
    assert shares(report)["generation"] > 49.0  # the step of which it is no number is left out
    over = logs.verl_line(6, logs.verl_step(6) | {"timing_s/step": 40.0})
    below = logs.verl_line(7, logs.verl_step(7) | {"timing_s/gen": -50.0})
    nothing = logs.verl_line(8, dict.fromkeys(VERL[0], 0.0) | {"training/global_step": 8})
    report = read(tmp_path, "\n".join([*CONSOLE, over, below, nothing]))
    assert (report.steps, report.skipped["steps whose timers hold more seconds than they do, or are no numbers"]) == (
        [1, 2, 3, 4, 5], 2
    )  # fmt: skip


def test_a_first_step_that_warms_up_is_left_out(tmp_path: Path) -> None:
    slow = logs.verl_line(1, logs.verl_step(1, 3.0))
    report = read(tmp_path, "\n".join([slow, *CONSOLE[1:]]))
    assert (report.steps, report.skipped["first step, which warms up"]) == ([2, 3, 4, 5], 1)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.log", b"", "no training step"),
        ("run.log", b"\x00\xff\xfe\r\r\n" * 99, "no training step"),
        ("trainer_state.json", b'{"log_history": [{"step": 1, "lo', "torn"),
        (
            "trainer_state.json",
            b'{"log_history": [{"step": 1, "reward": 0.5, "completion_length": 9.0}]}',
            "no seconds in",
        ),
        ("run.csv", b"step,timing_s/step\n", "no training step"),
        ("run.log", b"[2026-01-01 INFO] hello\n{'loss': nan, 'epoch': 1}\n", "no training step"),
    ],
)
def test_a_file_without_seconds_is_one_line(tmp_path: Path, name: str, text: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, text, name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_configuration_is_no_log(tmp_path: Path) -> None:
    for name, text in {
        "run.sh": "python -m verl.trainer.main_ppo data.train_batch_size=8", "a.yaml": "rlhf_type: grpo",
        "args.json": '{"rlhf_type": "grpo", "logging_steps": 5}', "script": "swift rlhf --rlhf_type grpo",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        assert not is_log(tmp_path / name), name
    (tmp_path / "output").write_text("x\n" * 10 + CONSOLE[0])
    assert is_log(tmp_path / "output")


def test_a_large_console_takes_little_memory(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(steps, "TELL_S", 0.0)
    noise = ("x" * 300 + " - of: nobody\n") * 800
    text = noise + "y" * (1 << 23) + "\n" + noise.join(CONSOLE[n] + "\n" for n in range(5)) + noise
    (tmp_path / "run.log").write_text(text)
    tracemalloc.start()
    report = read_log(tmp_path / "run.log")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.steps == [1, 2, 3, 4, 5]
    assert peak < len(text) / 2
    assert re.search(r"run.log: \d+(\.\d)?% read, about .* left", capsys.readouterr().err)


def test_only_the_last_steps_are_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "MOST_STEPS", 3)
    report = read(tmp_path, FORMS["file"][1], "run.jsonl")
    assert (report.steps, report.skipped["steps before the last 3"]) == ([3, 4, 5], 2)


def test_the_configuration_is_held_against_batch_and_gpus(tmp_path: Path) -> None:
    same = {"P": 8, "G": 8, "D": 4}
    report = read(tmp_path, FORMS["console"][1], batch=same)
    assert report.checks == [
        "completions per step: 64 in the configuration, as in the log",
        "GPUs: 4 in the configuration, the log has 8, 2 for each of the configuration's data-parallel ranks",
    ]
    other = read(tmp_path, FORMS["console"][1], batch=same | {"P": 16, "D": 3})
    assert all("it is not the configuration of this run" in check for check in other.checks)


@given(st.lists(st.floats(0.01, 1000.0), min_size=6, max_size=6), st.floats(0.0, 5.0))
def test_rows_always_sum_to_the_step(tmp_path_factory, seconds: list[float], idle: float) -> None:
    timers = dict(zip(logs.TIMED, seconds, strict=True))
    line = logs.verl_line(1, logs.verl_step(1, 1.0, **timers, step=sum(seconds) + idle), digits=3)
    report = read(tmp_path_factory.mktemp("log"), line)
    assert sum(row.self_s for row in report.stages) == pytest.approx(report.step_s, rel=1e-3, abs=5e-3)


def test_the_command_prints_writes_json_and_draws_a_page(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.log"
    path.write_text(FORMS["console"][1])
    assert import_log(path, out=tmp_path / "log.json") == 0
    printed = capsys.readouterr().out
    assert "training pass" in printed
    assert "generation bounds the step" in printed
    stored = LogReport.model_validate_json((tmp_path / "log.json").read_text())
    assert import_log(path, out=tmp_path / "log.html", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == stored.model_dump(mode="json")
    page = (tmp_path / "log.html").read_text()
    assert "Where a step goes" in page
    assert "training pass" in page
    with pytest.raises(ConfigError, match="no such file"):
        import_log(tmp_path / "absent.log")


def _printed(report: LogReport) -> str:
    from grpo_autotune.render.imported import render_log

    return render_log(report, 400)
