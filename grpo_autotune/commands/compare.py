"""`grpo-autotune compare`: two or more stored runs held against a baseline."""

from collections.abc import Sequence
from pathlib import Path

from grpo_autotune.commands.page import load_run
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import refusal_told
from grpo_autotune.interop.logs.steps import is_log
from grpo_autotune.records.comparison import Comparison
from grpo_autotune.records.imported import LogReport
from grpo_autotune.records.report import Report
from grpo_autotune.records.search import SearchReport
from grpo_autotune.records.stored import read_stored
from grpo_autotune.records.trial import OUTCOME_FILE, SPEC_FILE, TrialOutcome, TrialSpec
from grpo_autotune.report.build import build_report
from grpo_autotune.report.compare import Run, compare
from grpo_autotune.report.compare_logs import LogRun, compare_logs
from grpo_autotune.report.files import LOG_FILE, REPORT_FILE, is_log_report
from grpo_autotune.report.logged import read_log
from grpo_autotune.search.folder import SEARCH_FILE, SearchFolder, read_record


def compare_runs(names: Sequence[str], baseline: str | None) -> Comparison:
    """Compare the runs with `baseline`, one of them or another one; by default with the first."""
    if baseline is not None:
        names = [baseline, *(name for name in names if _place(name) != _place(baseline))]
    if len(names) < 2:
        raise ConfigError("a comparison takes two runs", fix="Name another run folder, or a --baseline.")
    loaded = [_load(name) for name in names]
    runs = [run for run in loaded if isinstance(run, Run)]
    if len(runs) < len(loaded):
        return compare_logs(loaded)
    if len({run.kind == "search" for run in runs}) > 1:
        what = "a search, whose trials have fixed completion lengths, stands beside other runs"
        raise ConfigError(what, fix="Compare searches with each other, or probe the search's tuned.yaml.")
    return compare(runs)


def check_slower(comparison: Comparison, least_percent: float) -> list[str]:
    """Runs that are slower than the baseline, beyond noise and by more than `least_percent`; an error where seconds of
    a run cannot be compared with the baseline's."""
    for run, reason in ((pair.run, reason) for pair in comparison.pairs for reason in pair.apart):
        raise ConfigError(reason, where=run, fix="Measure both on one machine, with the same data.")
    steps = [(pair.run, pair.rows[0]) for pair in comparison.pairs]
    return [run for run, row in steps if row.word == "slower" and row.change and 100.0 * row.change[1] > least_percent]


def _place(name: str) -> Path:
    """The path that is named, or the run of that name in `runs/`."""
    run = Path("runs", name)
    return (run if run.exists() and not Path(name).exists() else Path(name)).absolute()


@refusal_told()
def _load(name: str) -> Run | LogRun:
    place = _place(name)
    if place.is_file() and place.name not in (REPORT_FILE, SEARCH_FILE):
        if is_log_report(place):
            again = {"absent": "", "written_by": "", "again": "Import the log again."}
            return LogRun(name, read_stored(place, LogReport, **again))
        if is_log(place):
            return LogRun(name, read_log(place))
    stored = load_run(place)
    report, folder = stored.data, stored.folder
    if isinstance(report, SearchReport):
        return Run(name, "search", _winner(name, folder, report))
    if {len(row.per_step_s) for row in report.stages} - {0} != {len(report.step_seconds)}:
        what = "an older version wrote this report, without seconds by step and stage"
        raise ConfigError(what, where=name, fix="Measure it again.")
    return Run(name, "training" if (folder / LOG_FILE).is_file() else "probe", report)


def _winner(name: str, folder: Path, search: SearchReport) -> Report:
    trial = SearchFolder(folder).trial(-1 if search.best.number is None else search.best.number)
    outcome, spec = read_record(trial / OUTCOME_FILE, TrialOutcome), read_record(trial / SPEC_FILE, TrialSpec)
    if outcome is None or outcome.record is None or not any(outcome.record.timings.step_s):
        fix = "Probe its tuned.yaml and compare that, or search with a --budget above 0."
        raise ConfigError("no trial that measured this search's winner is here", where=name, fix=fix)
    known = {"machine": search.machine, "config": spec.config if spec else None}
    return build_report(outcome.record).model_copy(update=known)
