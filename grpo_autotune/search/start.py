"""How a search begins: the configuration as it is, what follows from it, and what an earlier process left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.hardware import Machine
from grpo_autotune.predict.room import memory_of
from grpo_autotune.records.probe import ProbeRecord
from grpo_autotune.records.search import TrialRow
from grpo_autotune.records.trial import LOG_FILE, SERVER_LOG, Progress, TrialOutcome, TrialSpec
from grpo_autotune.scripts.stand_in import config_of_script
from grpo_autotune.search.acquisition import Models, Pool
from grpo_autotune.search.budget import END_SHARE
from grpo_autotune.search.evaluator import Lab
from grpo_autotune.search.guard_trials import Rewards, note_worst_case
from grpo_autotune.search.leaderboard import Book
from grpo_autotune.search.space import Space, space
from grpo_autotune.search.storage import journal_storage, shared_storage
from grpo_autotune.search.study import Axes, Sampler, Study, name_of
from grpo_autotune.units import hms

PROBE_GROUPS = 16
"""Groups that the probe should see: their pass rates tell how group size matters."""
MOST_PROBE_STEPS = 6
UNBOUNDED_PROBE_S = 1800.0
PROBE_SHARE = 0.05
"""Of the budget; after so much training the probe measures no more steps than a trial does."""

Recalled = Sequence[tuple[TrialSpec, TrialOutcome | None]]
Fit = Callable[[RunConfig, ProbeRecord, Machine, TrialOutcome], Models]


def open_search(lab: Lab, recalled: Recalled, fit: Fit, storage: str | None, sampler: Sampler) -> tuple[Space, Pool]:
    """Measure the configuration as it is, or recall that; then space, models and study are known.

    Raises:
        ConfigError: The budget is too small, the space is empty, or the study is another one's.
        NothingSucceeded: The configuration cannot be measured.
    """
    if lab.script is None:
        space(lab.config, lab.machine)  # a mistake in it is told before anything is measured
    place = shared_storage(storage) if storage else journal_storage(lab.folder.journal)
    outcome = next((o for spec, o in recalled if spec.purpose == "probe" and o and o.status == "ok"), None)
    if outcome is None:
        outcome = _run_probe(lab)
    record = outcome.record
    if record is None:
        raise NothingSucceeded("the probe of your configuration measured no step", where="search")
    if lab.script is not None:
        lab.config = config_of_script(lab.config, record)
    found = space(lab.config, lab.machine, record)
    lab.memory_bytes = memory_of(lab.machine, record.trainer)
    lab.heed(outcome)
    values = {key: _with_own(found.own[key], axis) for key, axis in found.values.items()}
    fingerprint = hashlib.sha256(f"{lab.fingerprint}{name_of(values)}".encode()).hexdigest()[:16]
    study = Study(
        place,
        Axes.of(values),
        fingerprint,
        where=storage or str(lab.folder.journal),
        seed=lab.config.search.seed,
        sampler=sampler,
    )
    if not storage:
        study.fail_abandoned()
    book = Book(lab.config, dict(found.own), record)
    lab.begin(book, fit(lab.config, record, lab.machine, outcome), study, outcome)
    return found, Pool(found, lab.config, lab.machine)


def recall(lab: Lab, rewards: Rewards, recalled: Recalled) -> None:
    """Learn from what an earlier process measured, in its order; races and what was lost are run again."""
    for spec, outcome in recalled:
        if outcome is None or spec.source == "race":
            continue
        if spec.purpose == "timed":
            lab.learn(spec, outcome)
            lab.tell_again(spec, outcome)
        else:
            lab.write(spec, outcome)
            lab.costs.learn(outcome)
        if spec.purpose == "rewards" and outcome.rewards:
            rewards.recall(spec, outcome.rewards)
        entry = lab.book.entries.get(name_of(lab.knobs_of(spec)))
        if spec.purpose == "worst_case" and entry is not None:
            note_worst_case(entry, outcome)


def measure_own(lab: Lab) -> None:
    """The user's configuration: what everything is compared with.

    That is the probe, where trials can repeat the lengths of its completions, else a trial with fixed lengths.

    Raises:
        ConfigError: No trial fits into the budget.
        NothingSucceeded: It cannot be measured.
    """
    own = lab.book.own
    if name_of(own) in lab.book.entries:
        return
    needed_s = lab.expected_s(own)
    known = bool(lab.seen_lengths) and any(row.purpose != "probe" for row in lab.rows)  # a search that is gone on with
    if needed_s > lab.budget.left_s and not known:
        _no_trial_fits(lab, needed_s)
    asked = None if name_of(own) in lab.study.taken() else lab.study.ask(own)
    while asked is not None and name_of(asked.knobs) != name_of(own):
        lab.study.release(asked)  # another machine's; it comes back once our own is known
        asked = lab.study.ask(own)
    if lab.seen_lengths:
        lab.adopt(asked)
    elif lab.timed(own, "user", lab.budget.left_s, asked) is None:
        if lab.rows[-1].status == "timeout" and lab.budget.search_left_s <= 0.0:
            _no_trial_fits(lab, max(needed_s, lab.rows[-1].elapsed_s))
        _not_measured(lab, lab.rows[-1])


def _run_probe(lab: Lab) -> TrialOutcome:
    plan = lab.config.batch
    groups = max(1, plan.completions_per_step // plan.num_generations)
    steps = max(lab.config.search.steps, min(MOST_PROBE_STEPS, -(-PROBE_GROUPS // groups)))
    limit_s = lab.budget.left_s if lab.budget.total_s else UNBOUNDED_PROBE_S
    enough: dict[str, Any] = {}
    if plan.processes == 1 and lab.budget.total_s:  # several ranks would have to agree on when it is enough
        enough = {"least_steps": lab.config.search.steps, "enough_s": PROBE_SHARE * lab.budget.total_s}
    spec = lab.spec("probe", lab.config, {}, limit_s, steps=steps, **enough)
    seen = [Progress("start-up", 0, 0)]
    outcome = lab.run(spec, seen.append)
    lab.write(spec, outcome)
    lab.costs.learn(outcome)
    if outcome.status == "timeout" and lab.budget.total_s:
        step, most = seen[-1].step, seen[-1].of
        whole = min(most, (spec.least_steps or spec.steps) + spec.warmup)
        at = f"in step {step} of {most}" if step else f"in {seen[-1].stage}"
        least_s = outcome.elapsed_s * whole / max(1, step)
        _too_small(lab, 3.0 * least_s, f"the probe of your configuration was {at} when it was over")
    if outcome.status != "ok":
        _not_measured(lab, lab.rows[-1])
    return outcome


def _no_trial_fits(lab: Lab, needed_s: float) -> NoReturn:
    total_s = (lab.budget.elapsed_s + 3.0 * needed_s) / (1.0 - END_SHARE)
    _too_small(lab, total_s, "no trial fits after the probe")


def _too_small(lab: Lab, needed_s: float, why: str) -> NoReturn:
    raise ConfigError(
        f"a budget of {hms(lab.budget.total_s)} is too small: {why}",
        where="--budget",
        fix=f"Give about {hms(needed_s)} or more; --budget 0 predicts from a probe alone.",
    )


def _not_measured(lab: Lab, row: TrialRow) -> NoReturn:
    folder = lab.folder.trial(row.number)
    log = folder / LOG_FILE
    raise NothingSucceeded(
        f"your configuration itself cannot be measured ({row.status}): {row.why or 'no reason given'}",
        where=f"trial {row.number}",
        fix=f"The whole log: {log if log.exists() else folder / SERVER_LOG}",
    )


def _with_own(own: Any, axis: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axis, with the user's own value where `search.knobs` left it out: it is measured first all the same."""
    return axis if json.dumps(own) in {json.dumps(value) for value in axis} else (own, *axis)
