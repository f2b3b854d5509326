"""Versions of the libraries underneath: what is refused, what is told, and what the table of releases rests on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.hardware import versions
from grpo_autotune.hardware.versions import PACKAGES, TRL, check_log_probs, check_versions, unheld, unheld_trl

ROOT = Path(__file__).parents[2]
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Have the packages of the table at the newest version that was tried, or as given."""
    newest = {row.distribution: row.tried[-1] for row in PACKAGES if row.tried}

    def made(**given: str) -> None:
        monkeypatch.setattr(versions, "package_version", (newest | given).get)
        versions.tell_untried.cache_clear()

    return made


def test_each_release_of_trl_in_the_table_was_held_against_itself_and_is_in_the_readme() -> None:
    oldest, *rows = json.loads((ROOT / "docs/benchmarks/trl_versions.json").read_text())["rows"]
    assert tuple(row["trl"] for row in rows) == TRL.tried
    for row in PACKAGES[:3]:
        assert oldest[row.distribution] == row.tried[0] and rows[-1][row.distribution] == row.tried[-1]
        assert row.tried[0].startswith(row.versions.split(",")[0].removeprefix(">=")), (
            "the range begins where it was tried"
        )
    rows.append(oldest)
    for row in rows:
        assert not row["probe"]["lost"] and row["probe"]["missed"] < 1e-6
        assert row["train"]["losses"] == 0.0 and row["train"]["stopped_after"] < row["train"]["steps"]
        assert {"all", "all, text", "plain again", "shared_prefix", "length_sort"} <= row["exact"].keys()
        for case in row["exact"].values():
            assert case["equal_rewards"] and case["weights"] < 1e-6 and not case["off"]
        assert row["exact"]["all"]["on"] == rows[0]["exact"]["all"]["on"]
    first, last = (version.rpartition(".")[0] for version in (TRL.tried[0], TRL.tried[-1]))
    assert f"TRL {first} to {last} were each held against themselves" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("package", "version"), [("trl", "1.11.0"), ("trl", "2.0.0"), ("transformers", "5.16.1")])
def test_what_is_too_old_or_too_new_is_refused_in_one_line(install: Install, package: str, version: str) -> None:
    install(**{package: version})
    with pytest.raises(EnvironmentProblem) as caught:
        check_versions()
    line = str(caught.value)
    assert f"{package} {version} is installed" in line and "pip install" in line and "\n" not in line
    assert caught.value.exit_code == 3


def test_what_is_newer_is_told_once_and_compared(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(trl="1.99.0", transformers="5.99.0")
    check_versions()
    check_versions()
    (line,) = capsys.readouterr().err.splitlines()
    assert "trl 1.99.0" in line and "transformers 5.99.0" in line and line.startswith("warning: ")
    assert unheld() and "TRL 1.99.0" in (unheld_trl() or "")
    install(transformers="5.99.0")
    assert unheld() and unheld_trl() is None
    install(trl="1.14.1")
    check_versions()
    assert unheld() and not capsys.readouterr().err.count("1.14.1"), "within the range, and not tried itself"
    install()
    check_versions()
    assert not unheld() and not capsys.readouterr().err


def test_trl_1_15_is_refused_where_its_kernels_do_not_run(install: Install) -> None:
    install(trl="1.15.0")
    check_log_probs("cuda")
    with pytest.raises(EnvironmentProblem, match=r"Triton kernels, which do not run on this device \(cpu\)"):
        check_log_probs("cpu")
    install()
    check_log_probs("cpu")
