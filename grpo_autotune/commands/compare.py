"""`grpo-autotune compare`: two or more stored runs held against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_autotune.errors import ConfigError
from grpo_autotune.records.comparison import Comparison, RunKind
from grpo_autotune.records.trial import OUTCOME_FILE, SPEC_FILE, TrialOutcome, TrialSpec
from grpo_autotune.report.compare import Run, compare, seconds_by_cycle
from grpo_autotune.report.files import LOG_FILE, REPORT_FILE, load_report
from grpo_autotune.search.folder import SEARCH_FILE, SearchFolder, load_search, read_record


def compare_runs(names: Sequence[str], baseline: str | None) -> Comparison:
    """Compare the runs with `baseline`, one of them or another one; by default with the first.

    Raises:
        ConfigError: A folder holds no finished run, there is nothing to compare with, or probes stand beside searches.
    """
    if baseline is not None:
        names = [baseline, *(name for name in names if _place(name) != _place(baseline))]
    if len(names) < 2:
        raise ConfigError("a comparison takes two runs", fix="Name another run folder, or a --baseline.")
    runs = [_load(name) for name in names]
    if len({run.kind == "search" for run in runs}) > 1:
        search = next(run.name for run in runs if run.kind == "search")
        what = f"{search} is a search, whose trials have fixed completion lengths, and others are not"
        raise ConfigError(what, fix="Compare searches with each other, or probe the search's tuned.yaml.")
    return compare(runs)


def check_slower(comparison: Comparison, least_percent: float) -> list[str]:
    """Runs that are slower than the baseline, beyond noise and by more than `least_percent`.

    Raises:
        ConfigError: Seconds of a run cannot be compared with the baseline's.
    """
    for pair in comparison.pairs:
        if not pair.comparable:
            fix = "Measure both on one machine, with the same data, for --fail-if-slower."
            raise ConfigError(pair.differences[0], where=pair.run.name, fix=fix)
    slower = [pair for pair in comparison.pairs if pair.step.word == "slower"]
    return [pair.run.name for pair in slower if pair.step.change and 100.0 * pair.step.change[1] > least_percent]


def _place(name: str) -> Path:
    """The path that is named, or the run of that name in `runs/`."""
    run = Path("runs", name)
    return (run if run.exists() and not Path(name).exists() else Path(name)).absolute()


def _load(name: str) -> Run:
    place = _place(name)
    folder = place if place.is_dir() else place.parent
    if place.name == SEARCH_FILE or ((folder / SEARCH_FILE).is_file() and not (folder / REPORT_FILE).is_file()):
        return _winner(name, folder)
    report = load_report(place)
    kind: RunKind = "training" if (folder / LOG_FILE).is_file() else "probe"
    seconds = seconds_by_cycle(report.step_seconds, report.stages, report.cycle)
    if len(seconds) < 2:
        what = "this report holds no seconds by step and stage: an older version wrote it"
        raise ConfigError(what, where=name, fix="Measure it again.")
    peak = max((row.peak_bytes or 0 for row in report.stages), default=0) or None
    return Run(name, kind, report, seconds, report.machine, report.config, peak)


def _winner(name: str, folder: Path) -> Run:
    """The trial that measured what `tuned.yaml` holds."""
    search = load_search(folder)
    trial = SearchFolder(folder).trial(-1 if search.best.number is None else search.best.number)
    outcome, spec = read_record(trial / OUTCOME_FILE, TrialOutcome), read_record(trial / SPEC_FILE, TrialSpec)
    record = outcome.record if outcome else None
    if outcome is None or record is None or not any(record.timings.step_s):
        fix = "Probe its tuned.yaml and compare that, or search with a --budget above 0."
        raise ConfigError("no trial that measured this search's winner is here", where=name, fix=fix)
    seconds = seconds_by_cycle(record.timings.step_s, record.timings.stages, record.timings.cycle)
    return Run(name, "search", record, seconds, search.machine, spec.config if spec else None, outcome.peak_bytes)
