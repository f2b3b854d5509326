"""Sentences on the engine's work, and on whether it sampled from the model in training."""

from grpo_autotune.records.report import Report
from grpo_autotune.records.rollout import EngineFacts, Fidelity, FidelityPart
from grpo_autotune.units import amount, listing, percent, seconds, size

WHEN = {"first": "before the first optimizer step", "later": "after it"}
SEEN = {"new": "", "repeated": ", met before under older weights"}
POINTS = {"yes": "yes", "no": "no", "unknown": "cannot be told"}


def rollout_lines(report: Report) -> list[str]:
    """Lines on the engine and on its fidelity; none without vLLM."""
    lines = [] if report.engine is None else _engine(report.engine)
    if report.weight_sync_bytes is not None and (report.engine is None or report.engine.sync_bytes is None):
        lines.append(f"A weight sync pushes {size(report.weight_sync_bytes)} to vLLM.")
    return lines if report.fidelity is None else [*lines, *_fidelity(report.fidelity)]


def _engine(e: EngineFacts) -> list[str]:
    cached = f", {percent(e.cached_tokens / e.prompt_tokens)} came from the prefix cache" if e.prompt_tokens else ""
    lines = [
        f"In {e.generations} generation{'s' if e.generations > 1 else ''} it computed {amount(e.prefill_tokens)} of "
        f"{amount(e.prompt_tokens)} prompt tokens{_rate(e.prefill_tokens_per_s)}{cached}; it decoded "
        f"{amount(e.decode_tokens)} tokens{_rate(e.decode_tokens_per_s)}."
    ]
    if e.images_encoded:
        lines.append(f"Its vision encoder ran on {amount(e.images_encoded)} images.")
    told = []
    if e.running_mean is not None and e.running_max is not None:
        told.append(f"{e.running_mean:.3g} requests ran side by side on average, {e.running_max} at most")
    if e.waiting_max is not None:
        told.append(f"{e.waiting_max} at most waited" if e.waiting_max else "none waited")
    if e.kv_use_max is not None:
        holds = f" (it holds {amount(e.kv_tokens)} tokens)" if e.kv_tokens else ""
        told.append(f"the key-value cache was {percent(e.kv_use_max)} full at most{holds}")
    told.append(f"{e.preemptions} requests were preempted" if e.preemptions else "nothing was preempted")
    lines.append(_sentence(told))
    told = [f"it started in {seconds(e.start_s)}"] if e.start_s is not None else []
    if e.sync_s is not None:
        way = f" ({e.sync_way})" if e.sync_way else ""
        moved = f" and moves {size(e.sync_bytes)}" if e.sync_bytes is not None else ""
        told.append(f"a weight sync{way} takes {seconds(e.sync_s)}{moved}")
    told += [f"a call of {n} {seconds(s)}" for n, s in (("sleep", e.sleep_s), ("wake_up", e.wake_s)) if s is not None]
    return [*lines, _sentence(told)] if told else lines


def _fidelity(f: Fidelity) -> list[str]:
    dropped = "" if f.dropped_share is None else f"; {percent(f.dropped_share)} of the {f.dropped_of} got weight zero"
    lines = [
        f"Fidelity of its samples: {'good' if f.ok else 'BAD'}. Its log-probs and the trainer's differ by "
        f"{f.mean_nats:.2g} nats on average, {f.max_nats:.2g} at most, over {amount(f.tokens)} tokens (good up to "
        f"{f.threshold_nats:.2g} on average){dropped}."
    ]
    if f.shift_nats is not None and f.sampling:
        asked = listing([f"{name} {value:g}" for name, value in f.sampling.items()])
        lines.append(
            f"Sampling with {asked} shifts its log-probs by {f.shift_nats:.2g} nats, which is left out above; the "
            "importance weights of TRL contain it."
        )
    if f.trainer_moved_nats is not None and f.engine_moved_nats is not None:
        many = "an optimizer step" if f.updates_checked == 1 else f"each of {f.updates_checked} optimizer steps"
        lines.append(
            f"Over {many} the trainer's log-probs of a fixed text moved by {f.trainer_moved_nats:.2g} nats on average, "
            f"vLLM's by {f.engine_moved_nats:.2g}: {'its weights follow' if f.moved else 'ITS WEIGHTS DO NOT FOLLOW'}."
        )
    if not f.ok:
        lines += [_part(part) for part in f.parts]
        lines += [f"{c.name}: {POINTS[c.points]}; {c.evidence}. To tell: {c.check}." for c in f.causes]
    return lines


def _part(p: FidelityPart) -> str:
    return f"{p.rows} rows {WHEN[p.when]}{SEEN[p.seen]}: {p.mean_nats:.2g} nats on {amount(p.tokens)} tokens."


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f" at {amount(tokens_per_s)} tokens/s"


def _sentence(told: list[str]) -> str:
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}."
