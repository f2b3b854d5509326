"""Two stored runs held against each other: the words hold on repeated runs, and what differs is said first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_autotune.cli.main import main
from grpo_autotune.commands.compare import check_slower, compare_runs
from grpo_autotune.errors import ConfigError
from grpo_autotune.records.comparison import Comparison, Pair, RatioRow
from grpo_autotune.records.probe import STAGES, OtherLoad, StageRow, StageTimings
from grpo_autotune.records.report import Report
from grpo_autotune.render.comparison import render_comparison
from grpo_autotune.report.build import build_report
from grpo_autotune.report.compare import Run, compare
from grpo_autotune.report.files import save_report
from tests.support.sample_records import (
    CPU_MACHINE,
    GPU_MACHINE,
    config_of,
    demo_record,
    spread,
    token_facts,
    trainer_facts,
)

SHARES = {"generation": 0.5, "backward": 0.3, "reward": 0.195, "sync_wait": 0.005}


def report_of(pace: np.ndarray, stages: dict[str, float] | None = None, **facts: Any) -> Report:
    """A probe whose stages take their share of a second, in each step times `pace`."""
    shares = SHARES | (stages or {})
    rows = [StageRow(name=name, per_step_s=(pace * shares.get(name, 0.0)).tolist()) for name in STAGES]
    step_s = (pace * sum(shares.values())).tolist()
    times = StageTimings(steps=list(range(len(pace))), step_s=step_s, stages=rows)
    machine = facts.pop("machine", CPU_MACHINE)
    return build_report(demo_record(timings=times, **facts), machine)


def repeated(report: Report, pace: np.ndarray) -> Report:
    """The same run of a second a step at another pace."""
    middle = float(np.median(pace))
    stages = [
        row.model_copy(
            update={
                "per_step_s": [p * s for p, s in zip(pace, row.per_step_s, strict=False)],
                "self_s": middle * row.self_s,
            }
        )
        for row in report.stages
    ]
    return report.model_copy(update={"stages": stages, "step_seconds": pace.tolist(), "step_s": middle})


def pair_of(a: Report, b: Report) -> Pair:
    return compare([Run("a", "probe", a), Run("b", "probe", b)]).pairs[0]


def words(pair: Pair) -> dict[str, str]:
    return {row.name: row.word for row in pair.rows}


def row_of(pair: Pair, name: str = "step") -> RatioRow:
    return next(row for row in pair.rows if row.name == name)


def wandering(rng: np.random.Generator, steps: int, deviation: float, memory: float) -> np.ndarray:
    """A logarithm that wanders around zero and forgets where it was within `memory` steps."""
    keep = np.exp(-1.0 / memory)
    values = [deviation * rng.normal()]
    for _ in range(steps - 1):
        values.append(keep * values[-1] + deviation * np.sqrt(1.0 - keep**2) * rng.normal())
    return np.asarray(values)


def steady(rng: np.random.Generator, steps: int) -> np.ndarray:
    return 0.1 * rng.normal(size=steps)


def drifting(rng: np.random.Generator, steps: int) -> np.ndarray:
    """As measured on shared cores: a tenth from run to run, a tenth over some steps, and some scatter."""
    return wandering(rng, steps, 0.1, 5.0) + 0.05 * rng.normal(size=steps) + 0.09 * rng.normal()


def twofold(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Cores that run at one pace or at half of it, and change every five steps or so."""
    flips = np.cumsum(rng.random(steps) < 0.2) + rng.integers(2)
    return np.log(2.0) * (flips % 2) + 0.05 * rng.normal(size=steps)


@pytest.mark.parametrize(("pace", "steps"), [(steady, 5), (drifting, 8), (drifting, 30), (twofold, 60)])
def test_a_run_and_its_repetition_are_within_noise(pace, steps):
    """In 20 pairs at most 2 are told apart, be it in one stage alone; the bar is for 90%."""
    rng, measured = np.random.default_rng(5), report_of(np.ones(steps))
    apart = 0
    for _ in range(20):
        pair = pair_of(*(repeated(measured, np.exp(pace(rng, steps))) for _ in "ab"))
        apart += set(words(pair).values()) != {"within noise"}
    assert apart <= 2


def test_a_trend_that_runs_through_both_is_no_change():
    rng = np.random.default_rng(0)
    pace = np.exp(np.linspace(0.0, 0.25, 60) + 0.08 * rng.normal(size=60))
    assert pair_of(report_of(pace[:30]), report_of(pace[30:])).rows[0].word == "within noise"


def test_a_real_change_is_told_in_its_stage():
    rng = np.random.default_rng(1)
    paces = [np.exp(drifting(rng, 30)) for _ in "ab"]
    pair = pair_of(report_of(paces[0]), report_of(paces[1], {"generation": 0.1}))
    assert words(pair) == {"step": "faster", "generation": "faster"} | dict.fromkeys(
        ("backward", "reward", "sync_wait"), "within noise"
    )
    low, middle, high = pair.rows[0].change or (0.0, 0.0, 0.0)
    assert low < middle < high < 0.0
    again = pair_of(report_of(paces[1], {"generation": 0.1}), report_of(paces[0]))
    assert again.rows[0].word == "slower"


def test_a_gpu_of_ones_own_tells_smaller_changes():
    pace = np.exp(0.01 * np.random.default_rng(2).normal(size=30))
    gpu = {"trainer": trainer_facts(device="cuda:0"), "machine": GPU_MACHINE}
    slower = pair_of(report_of(pace, **gpu), report_of(pace, {"generation": 0.62}, **gpu))
    assert slower.rows[0].word == "slower"
    busy = OtherLoad(cores=1.0, of=8, gpu_percent=40.0, matters=True)
    crowded = pair_of(report_of(pace, **gpu), report_of(pace, {"generation": 0.62}, others=busy, **gpu))
    assert crowded.rows[0].word == "within noise" and "during b other processes took" in crowded.differences[0]


def test_small_stages_and_short_runs_are_within_noise():
    pair = pair_of(report_of(np.ones(30)), report_of(np.ones(30), {"sync_wait": 0.012}))
    assert words(pair)["sync_wait"] == "within noise"
    single = pair_of(report_of(np.ones(1)), report_of(np.ones(1) * 9.0))
    assert single.rows[0].change is None and single.rows[0].word == "within noise"


def test_a_stage_that_only_one_run_has_is_told():
    pair = pair_of(report_of(np.ones(8)), report_of(np.ones(8), {"reference_logprob": 0.2}))
    row = row_of(pair, "reference_logprob")
    assert (row.before_s, row.word, row.change) == (0.0, "slower", None)


def test_longer_answers_are_compared_per_token_and_other_limits_are_not():
    a = report_of(np.ones(20), tokens=token_facts(completion=spread(20, 30, 40)))
    longer = token_facts(completion=spread(40, 50, 60))
    pair = pair_of(a, report_of(np.ones(20), {"generation": 1.0}, tokens=longer))
    generation = row_of(pair, "generation")
    assert generation.scale == pytest.approx(0.5) and generation.change is not None
    assert generation.change[1] == pytest.approx(0.0, abs=1e-6) and generation.word == "within noise"
    assert any("per token" in sentence for sentence in pair.differences)
    wide = trainer_facts(max_completion_length=999)
    set_so = pair_of(a, report_of(np.ones(20), {"generation": 1.0}, tokens=longer, trainer=wide))
    assert set_so.rows[0].scale == 1.0 and set_so.rows[0].word == "slower"


def test_steps_of_other_sizes_are_compared_per_completion():
    twice = trainer_facts(gradient_accumulation_steps=16)
    pair = pair_of(report_of(np.ones(20)), report_of(np.ones(20) * 2.0, trainer=twice))
    assert pair.rows[0].scale == pytest.approx(0.5) and pair.rows[0].word == "within noise"


def test_machine_versions_data_and_settings_are_said_first():
    a = report_of(np.ones(8))
    b = report_of(np.ones(8), machine=GPU_MACHINE, versions={"trl": "9.9"})
    pair = pair_of(a, b)
    assert [sentence.split(" (")[0].split(":")[0] for sentence in [*pair.apart, *pair.differences]][:2] == [
        "the machines differ", "versions differ"
    ] and pair.apart == pair.apart[:1]  # fmt: skip
    settings = ((512, "none"), (256, "auto"))
    configs = [config_of(demo_record(), data={"image_size": side}, speedups=on) for side, on in settings]
    runs = [
        Run(name, "probe", a.model_copy(update={"config": config.model_dump(mode="json")}))
        for name, config in zip("ab", configs, strict=True)
    ]
    assert compare(runs).pairs[0].changed == {"data.image_size": ["512", "256"], "speedups": ["none", "auto"]}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    for name, share in (("fast", 0.1), ("base", 0.5), ("slow", 4.0)):
        save_report(report_of(np.exp(drifting(rng, 30)), {"generation": share}), tmp_path / name)
    return tmp_path


def test_folders_are_compared_printed_and_kept_as_json(folders):
    names = [str(folders / name) for name in ("fast", "base", "slow")]
    result = compare_runs([names[0], names[2]], names[1])
    assert result.baseline == names[1]
    assert [(pair.run, pair.rows[0].word) for pair in result.pairs] == [(names[0], "faster"), (names[2], "slower")]
    assert check_slower(result, 10.0) == [names[2]] and check_slower(result, 1000.0) == []
    assert Comparison.model_validate_json(result.model_dump_json()) == result
    text = render_comparison(result)
    for name in SHARES:
        assert text.count(f"\n {name} ") == 2  # no row is hidden
    assert "x [" in text, "four seconds for half a one are no percentage"
    assert "faster" in text and "completion tokens" in text and "reward" in text
    assert max(len(line) for line in render_comparison(result, 80).splitlines()) <= 80


def test_the_command_prints_and_fails_where_it_is_asked_to(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    (folders / "runs").mkdir()
    (folders / "fast").rename(folders / "runs" / "fast")
    assert main(["compare", "slow", "--baseline", "fast"]) == 0
    assert "fast -> slow: step" in capsys.readouterr().out
    assert main(["compare", "fast", "slow", "--fail-if-slower", "20"]) == 1
    assert "slower than fast by more than 20%: slow" in capsys.readouterr().err
    assert main(["compare", "slow", "fast", "--fail-if-slower", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == Comparison.schema_name()
    assert main(["compare", "fast", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["compare", "fast", "slow", "base", "--html", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert page.count("<svg") == 1 and page.count('<th scope="row">step</th>') == 2 and "slow against fast" in page
    assert main(["compare", "fast", "slow", "--html", "nowhere/page.html"]) == 2
    assert "the page cannot be written" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_line(folders, tmp_path):
    stored = Path(__file__).parents[1] / "stored"
    (folders / "search").mkdir()
    (folders / "search" / "search.json").write_bytes((stored / "search.json").read_bytes())
    (folders / "going").mkdir()
    (folders / "going" / "spans.jsonl").write_text("{")
    (folders / "torn").mkdir()
    (folders / "torn" / "report.json").write_text('{"schema": "grpo-au')
    base = str(folders / "base")
    report = json.loads((folders / "base" / "report.json").read_text())
    report["stages"][0]["per_step_s"].pop()
    for name, text in (("ragged", json.dumps(report)), ("endless", '{"step_s": 1e999}')):
        (folders / name).mkdir()
        (folders / name / "report.json").write_text(text)
    for other, told in (
        ("ragged", "without seconds by step and stage"), ("endless", "not a JSON file"),
        ("search", "no trial that measured this search's winner"), ("going", "under way"), ("torn", "not a JSON file"),
        ("nowhere", "no report here"), (str(stored), "without seconds by step and stage"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            compare_runs([base, str(folders / other)], None)
    with pytest.raises(ConfigError, match="takes two runs"):
        compare_runs([base], None)
    save_report(report_of(np.ones(8), machine=GPU_MACHINE), folders / "elsewhere")
    with pytest.raises(ConfigError, match="machines differ"):
        check_slower(compare_runs([base, str(folders / "elsewhere")], None), 5.0)


def test_a_searchs_winner_is_the_trial_that_measured_it(folders):
    stored = Path(__file__).parents[1] / "stored"
    report = json.loads((stored / "search.json").read_text())
    outcome = json.loads((stored / "outcome.json").read_text())
    for name in ("one", "two"):
        trial = folders / name / "trials" / f"{report['best']['number']:04d}"
        trial.mkdir(parents=True)
        (folders / name / "search.json").write_text(json.dumps(report))
        (trial / "outcome.json").write_text(json.dumps(outcome))
    result = compare_runs([str(folders / "one"), str(folders / "two")], None)
    assert result.pairs[0].rows[0].word == "within noise"
    with pytest.raises(ConfigError, match="stands beside other runs"):
        compare_runs([str(folders / "one"), str(folders / "base")], None)


def test_the_page_has_the_figures_of_the_repeated_runs():
    root = Path(__file__).parents[2]
    stored = json.loads((root / "docs/benchmarks/aa_pairs.json").read_text())
    pairs, every = (stored["ratios"][name] for name in ("pairs told apart", "any two runs told apart"))
    assert pairs["median"] <= 0.1, "the bar: at most 2 of 20"
    quiet = [100.0 * row["least_change"] for row in stored["rows"] if max(row["others_cores"]) < 0.1]
    text = " ".join((root / "docs/compare.md").read_text().split())
    assert f"{round(pairs['median'] * pairs['n'])} of {pairs['n']:.0f} pairs were told apart" in text
    assert f"{100 * every['median']:.1f}% of any two of the runs" in text
    assert f"a step must take {min(quiet):.0f} to {max(quiet):.0f}% longer to be called slower" in text
