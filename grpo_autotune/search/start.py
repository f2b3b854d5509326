"""Start of a search: the probe of the configuration as it is, models and study, and trials of an earlier process."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, DataError, EnvironmentProblem, NothingSucceeded
from grpo_autotune.hardware import Machine
from grpo_autotune.hardware.places import Place
from grpo_autotune.knobs import Knobs
from grpo_autotune.knobs.values import unique
from grpo_autotune.predict.models import Models
from grpo_autotune.predict.objective import Interval, steps_between
from grpo_autotune.predict.room import memory_of
from grpo_autotune.records.probe import ProbeRecord, seconds_once
from grpo_autotune.records.trial import LOG_FILE, SERVER_LOG, Progress, TrialOutcome, TrialSpec
from grpo_autotune.scripts.stand_in import config_of_script
from grpo_autotune.search.acquisition import Pool
from grpo_autotune.search.budget import END_SHARE, Budget
from grpo_autotune.search.comparable import without_evaluations
from grpo_autotune.search.evaluator import Evaluator, at_expected, evened
from grpo_autotune.search.final_race import is_told
from grpo_autotune.search.folder import fingerprint
from grpo_autotune.search.guard_trials import RewardTrials
from grpo_autotune.search.leaderboard import Leaderboard, RaceResult
from grpo_autotune.search.space import space
from grpo_autotune.search.storage import journal_storage, shared_storage
from grpo_autotune.search.study import Axes, Claim, Sampler, Study, name_of
from grpo_autotune.search.trial_log import TrialLog
from grpo_autotune.units import hms

PROBE_GROUPS = 16
"""Groups that the probe should see: their pass rates tell how group size matters."""
MOST_PROBE_STEPS = 6
UNBOUNDED_PROBE_S = 1800.0
PROBE_SHARE = 0.05
"""Of the budget; after so much training the probe measures no more steps than a trial does."""
REFUSALS = {kind.__name__: kind for kind in (ConfigError, DataError, EnvironmentProblem)}

Recalled = Sequence[tuple[TrialSpec, TrialOutcome | None]]
Fit = Callable[[RunConfig, ProbeRecord, Machine, TrialOutcome], Models]


def open_search(
    log: TrialLog, recalled: Recalled, fit: Fit, storage: str | None, sampler: Sampler
) -> tuple[Evaluator, Pool]:
    """Probe the configuration as it is, or recall that, and build space, models and study on it. ConfigError where the
    budget is too small, the space is empty, or the study is another one's, and the errors that `train` would raise
    before a model is loaded; NothingSucceeded where the configuration cannot be measured."""
    task, config = log.task, log.task.config
    if task.script is None:
        space(config, task.machine)  # a mistake in it stops before anything is measured
    place = shared_storage(storage) if storage else journal_storage(task.folder.journal)
    outcome = next((o for spec, o in recalled if spec.purpose == "probe" and o and o.status == "ok"), None)
    if outcome is None:
        outcome = _run_probe(log)
    record = outcome.record
    if record is None:
        raise NothingSucceeded("the probe of your configuration measured no step", where="search")
    if task.script is not None:
        config = config_of_script(config, record)
        refuse_server(config, task.places)
    axes = space(config, task.machine, record)
    log.limit_memory(memory_of(task.machine, record.trainer))
    if task.places:  # its machine has the smallest GPUs, the probe ran on the first
        log.limit_memory(min((gpu.memory_bytes for gpu in task.machine.gpus), default=None))
    log.limit_memory(outcome.most_bytes)
    values = {key: unique([axes.baseline[key], *axis]) for key, axis in axes.values.items()}  # it is measured first
    study = Study(
        place,
        Axes.of(values),
        fingerprint(f"{task.fingerprint}{name_of(values)}"),
        where=storage or str(task.folder.journal),
        seed=config.search.seed,
        sampler=sampler,
    )
    if not storage:
        study.fail_abandoned()
    evaluation_s, saving_s = occasions_s(config, record)
    outcome = without_evaluations(outcome)
    record = outcome.record or record
    board = Leaderboard(config, dict(axes.baseline), record, evaluation_s, saving_s)
    outcome = evened(board, board.baseline_knobs, outcome)
    board.record = outcome.record or record
    models = fit(config, board.record, task.machine, outcome)
    return Evaluator(log, board, models, study, outcome), Pool(axes, config, task.machine)


def refuse_server(config: RunConfig, places: Sequence[Place]) -> None:
    """ConfigError where several workers would send their weights to one server."""
    if places and config.use_vllm and config.vllm.at_server:
        fix = "Search with --workers 1, or set vllm.mode colocate: an engine in each trial."
        raise ConfigError("several workers cannot share a vLLM server", where="--workers", fix=fix)


def recall(evaluator: Evaluator, rewards: RewardTrials, recalled: Recalled) -> None:
    """Learn from the trials and races of an earlier process, in their order; lost trials are run again."""
    board, shares, rounds = evaluator.board, dict[str, float | None](), list[tuple[Knobs, TrialOutcome]]()
    races, worst_cases = evaluator.log.task.folder.races(), list[tuple[Knobs, TrialOutcome]]()
    if evaluator.repeats_probe and any(spec.purpose != "probe" for spec, _ in recalled):
        evaluator.adopt_probe(_take_baseline(evaluator.study, board.baseline_knobs))
    for spec, outcome in recalled:
        if outcome is None:
            continue
        if spec.source == "race":
            rounds.append((knobs := evaluator.knobs_of(spec), outcome))
            board.rows.learn(knobs, outcome)
            continue
        evaluator.relearn(spec, outcome)
        if spec.purpose == "rewards" and outcome.rewards:
            rewards.recall(spec, outcome.rewards)
        if spec.purpose == "worst_case":
            worst_cases.append((evaluator.knobs_of(spec), outcome))
    evaluator.even_out()
    for knobs, outcome in rounds:
        even = at_expected(board, knobs, outcome)
        if any(row.rival == knobs and row.fails is None for row in races):
            evaluator.enter(knobs, even)
        if even.record is not None:
            shares[name_of(knobs)] = even.record.living_share
    for knobs, outcome in worst_cases:
        if (entry := board.entry(knobs)) is not None:
            board.add_worst_case(entry, outcome)
    for row in races:
        before, rival = board.entry(row.before), board.entry(row.rival)
        speedup, step, before_step = (Interval(*figures) for figures in (row.speedup, row.step, row.before_step))
        if before is None or rival is None:
            continue
        if row.fails is not None:
            board.update(rival, fails=row.fails, race=None)
        elif before is board.baseline:
            living = shares.get(name_of(rival.knobs), rival.living_share)
            board.update(rival, race=RaceResult(speedup, step, before_step), living_share=living)
        else:
            board.note_pair(before, rival, speedup)
            if not is_told(speedup):
                evaluator.undecided[name_of(before.knobs), name_of(rival.knobs)] = []
            else:
                evaluator.undecided.pop((name_of(before.knobs), name_of(rival.knobs)), None)


def measure_baseline(evaluator: Evaluator) -> None:
    """Measure the user's configuration, which everything is compared with: by the probe, where trials can repeat the
    lengths of its completions, else by a trial with fixed lengths. ConfigError where no trial fits into the budget,
    NothingSucceeded where it cannot be measured."""
    board, budget, log = evaluator.board, evaluator.budget, evaluator.log
    if board.has_baseline:
        return
    needed_s, places = evaluator.expected_s(board.baseline_knobs), log.task.places
    if places:  # on each of them this trial, and another one
        needed_s *= (not evaluator.repeats_probe) + 2.0 * max(evaluator.slower(place.name) for place in places)
    if needed_s > budget.left_s:
        _no_trial_fits(budget, needed_s)
    claim = _take_baseline(evaluator.study, board.baseline_knobs)
    if evaluator.repeats_probe:
        evaluator.adopt_probe(claim)
    elif evaluator.timed(board.baseline_knobs, "user", budget.left_s, claim) is None:
        if log.rows[-1].status == "timeout" and budget.search_left_s <= 0.0:
            _no_trial_fits(budget, max(needed_s, log.rows[-1].elapsed_s))
        _not_measured(log)


def _take_baseline(study: Study, knobs: dict[str, Any]) -> Claim | None:
    if name_of(knobs) in study.taken():
        return None
    while name_of((claim := study.ask(knobs)).knobs) != name_of(knobs):
        study.release(claim)  # another machine's; it comes back once our own is known
    return claim


def occasions_s(config: RunConfig, record: ProbeRecord) -> tuple[float, float]:
    """Seconds per step that a run's evaluations and its checkpoints take: of one that was measured, over the steps
    between two of them; 0 where none was, or where they come at no number of steps."""
    once = seconds_once(record)
    evaluation_s = once.get("evaluate", 0.0) / (steps_between(config, "evaluate") or math.inf)
    return evaluation_s, once.get("save", 0.0) / (steps_between(config, "save") or math.inf)


def _run_probe(log: TrialLog) -> TrialOutcome:
    config, total_s = log.task.config, log.budget.total_s
    plan = config.batch
    groups = max(1, plan.completions_per_step // plan.num_generations)
    least = config.search.steps
    steps = max(least, min(MOST_PROBE_STEPS, -(-PROBE_GROUPS // groups)))
    enough: dict[str, Any] = {}
    if plan.processes == 1 and total_s:  # several ranks would have to agree on when it is enough
        enough = {"least_steps": least, "enough_s": PROBE_SHARE * total_s}
    log.prepare(log.spec("probe", config, {}, UNBOUNDED_PROBE_S))
    limit_s = log.budget.left_s if total_s else UNBOUNDED_PROBE_S
    spec = log.spec("probe", config, {}, limit_s, steps=steps, **enough)
    stages = [Progress("start-up", 0, 0)]
    outcome = log.run(spec, log.progress(spec), stages.append)
    log.record(spec, outcome, spec.knobs)
    log.costs.learn(outcome)
    if outcome.status == "timeout" and total_s:
        stage, step, most = stages[-1]
        whole = min(most, (spec.least_steps or spec.steps) + spec.warmup)
        at = f"in step {step} of {most}" if step else f"in {stage}"
        least_s = outcome.elapsed_s * whole / max(1, step)
        _too_small(log.budget, 3.0 * least_s, f"the probe of your configuration was {at} when it was over")
    if outcome.status == "invalid" and outcome.error_type in REFUSALS:
        log.task.folder.state_file.unlink(missing_ok=True)  # nothing was searched: once mended, it begins here again
        raise REFUSALS[outcome.error_type](outcome.why or "")  # the line that `train` would have ended with
    if outcome.status != "ok":
        _not_measured(log)
    return outcome


def _no_trial_fits(budget: Budget, needed_s: float) -> NoReturn:
    total_s = (budget.elapsed_s + 3.0 * needed_s) / (1.0 - END_SHARE)
    _too_small(budget, total_s, "no trial fits after the probe")


def _too_small(budget: Budget, needed_s: float, why: str) -> NoReturn:
    fix = f"Give about {hms(needed_s)} or more; --budget 0 predicts from a probe alone."
    raise ConfigError(f"a budget of {hms(budget.total_s)} is too small: {why}", where="--budget", fix=fix)


def _not_measured(log: TrialLog) -> NoReturn:
    row = log.rows[-1]
    folder = log.task.folder.trial(row.number)
    log_file = folder / LOG_FILE
    what = f"your configuration itself cannot be measured ({row.status}): {row.why or 'no reason given'}"
    fix = f"The whole log: {log_file if log_file.exists() else folder / SERVER_LOG}"
    raise NothingSucceeded(what, where=f"trial {row.number}", fix=fix)
