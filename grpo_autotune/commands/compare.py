"""`grpo-autotune compare`: two or more stored runs held against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.comparison import Comparison
from grpo_autotune.records.trial import OUTCOME_FILE, SPEC_FILE, TrialOutcome, TrialSpec
from grpo_autotune.report.compare import Run, compare, run_of_report
from grpo_autotune.report.files import LOG_FILE, REPORT_FILE, load_report
from grpo_autotune.search.folder import SEARCH_FILE, SearchFolder, load_search, read_record

UNDER_WAY = ("spans.jsonl", LOG_FILE, "study.journal")
"""Files of a run that has no report yet."""
RUNS = Path("runs")


def compare_runs(names: Sequence[str], baseline: str | None) -> Comparison:
    """Compare the runs with `baseline`, one of them or another one; by default with the first.

    Raises:
        ConfigError: A folder holds no finished run, there is nothing to compare with, or probes stand beside searches.
    """
    names = list(dict.fromkeys(names)) if baseline is not None else list(names)
    if baseline is not None:
        names = [baseline, *(name for name in names if _place(name) != _place(baseline))]
    if len(names) < 2:
        raise ConfigError("a comparison takes two runs", fix="Name another run folder, or a --baseline.")
    runs = [_load(name) for name in names]
    if len({run.kind == "search" for run in runs}) > 1:
        search = next(run.name for run in runs if run.kind == "search")
        other = next(run.name for run in runs if run.kind != "search")
        raise ConfigError(
            f"{search} is a search, whose trials have fixed completion lengths, and {other} is not",
            fix="Compare searches with each other, or probe the search's tuned.yaml.",
        )
    return compare(runs)


def check_slower(comparison: Comparison, least_percent: float) -> list[str]:
    """Runs that are slower than the baseline, beyond noise and by more than `least_percent`.

    Raises:
        ConfigError: Seconds of a run cannot be compared with the baseline's.
    """
    for pair in comparison.pairs:
        if not pair.comparable:
            raise ConfigError(
                pair.differences[0].text,
                where=pair.run.name,
                fix="Measure both on one machine, with the same data, for --fail-if-slower.",
            )
    slower = [pair for pair in comparison.pairs if pair.step.word == "slower" and pair.step.change is not None]
    return [pair.run.name for pair in slower if pair.step.change and 100.0 * pair.step.change[1] > least_percent]


def _place(name: str) -> Path:
    """The path that is named, or the run of that name in `runs/`."""
    path = Path(name)
    return (path if path.exists() or not (RUNS / name).exists() else RUNS / name).absolute()


def _load(name: str) -> Run:
    place = _place(name)
    folder = place if place.is_dir() else place.parent
    if place.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        return _winner(name, folder)
    if place.is_dir() and not (place / REPORT_FILE).is_file() and any((place / file).exists() for file in UNDER_WAY):
        raise ConfigError(
            "this run has no report yet: it is under way, or was killed",
            where=name,
            fix="Compare it when it has ended (`search --resume` and `train --resume` go on).",
        )
    return run_of_report(name, "training" if (folder / LOG_FILE).is_file() else "probe", load_report(place))


def _winner(name: str, folder: Path) -> Run:
    """The trial that measured what `tuned.yaml` holds."""
    report, files = load_search(folder), SearchFolder(folder)
    trial = files.trial(report.best.number) if report.best.number is not None else None
    outcome = read_record(trial / OUTCOME_FILE, TrialOutcome) if trial else None
    spec = read_record(trial / SPEC_FILE, TrialSpec) if trial else None
    if outcome is None or outcome.record is None or not outcome.record.timings.step_s:
        raise ConfigError(
            "no trial that measured this search's winner is here",
            where=name,
            fix="Probe its tuned.yaml and compare that, or search with a --budget above 0.",
        )
    config, record = spec.config if spec else None, outcome.record
    return Run(name, "search", record, record.timings, report.machine, config, outcome.peak_bytes)
