"""Files that an earlier version of this package wrote, each as it was written: they load, for ever."""

from __future__ import annotations

from pathlib import Path

from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.records.trained import Merged
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.report.files import load_report
from grpo_autotune.search.folder import load_search

STORED = Path(__file__).parents[1] / "stored"


def test_a_probe() -> None:
    report = load_report(STORED / "report.json")
    assert report.step_s > 0 and report.stage("generation").share > 0 and report.verdict


def test_a_search() -> None:
    search = load_search(STORED / "search.json")
    assert search.best.speedup > 1 and search.trials and search.contributions


def test_a_tuned_configuration() -> None:
    config = load_config(STORED / "tuned.yaml")
    assert config.receipt is not None and config.receipt.changed[0].key == "speedups"


def test_a_trial() -> None:
    spec = TrialSpec.model_validate_json((STORED / "spec.json").read_text())
    outcome = TrialOutcome.model_validate_json((STORED / "outcome.json").read_text())
    assert spec.number == outcome.number and outcome.status == "ok" and outcome.record is not None
    assert RunConfig.from_dict(spec.config).grpo["num_generations"] > 1


def test_the_receipt_of_a_merge() -> None:
    receipt = Merged.model_validate_json((STORED / "merged.json").read_text())
    assert receipt.proof.base is not None and receipt.proof.merged.max < receipt.proof.limit and receipt.files


def test_a_tuned_configuration_that_leaves_speed_ups_out_has_none() -> None:
    values = load_config(STORED / "tuned.yaml").to_dict()
    del values["speedups"]
    assert RunConfig.from_dict(values).speedups == "none"
    del values["receipt"]
    assert RunConfig.from_dict(values).speedups == "auto"
