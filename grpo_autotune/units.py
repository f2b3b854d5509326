"""Numbers as people say them: three figures, with the unit that fits."""

from __future__ import annotations

from collections.abc import Sequence

STAGE_WORDS = {
    "generation": "generation",
    "policy_logprob": "the policy's log-probs",
    "reference_logprob": "the reference model's log-probs",
    "reward": "rewards",
    "backward": "the backward pass",
    "data": "data loading",
    "prompt": "prompt processing",
    "weight_sync": "pushing weights to vLLM",
    "engine": "vLLM's sleep and wake-up",
    "sync_wait": "waiting for other ranks",
    "optimizer": "the optimizer",
    "log_save_eval": "logging, saving and evaluating",
    "other": "what no stage accounts for",
}
LEGEND = {
    "generation": "sampling the completions",
    "policy_logprob": "log-probs of the model in training (old_policy: once, without gradient; training_forward: in "
    "the loss)",
    "reference_logprob": "log-probs of the reference model, for the KL term",
    "reward": "the reward functions",
    "backward": "the gradients",
    "data": "reading rows and decoding images",
    "prompt": "chat template, tokenizer and image processor",
    "weight_sync": "pushing the weights to vLLM",
    "engine": "vLLM's sleep and wake-up",
    "sync_wait": "waiting for other ranks",
    "optimizer": "clipping the gradient and updating the weights",
    "log_save_eval": "logging, checkpoints and evaluation",
    "other": "everything between these (score: in TRL's generate-and-score; step: in the training loop)",
}


def seconds(value: float) -> str:
    """Minutes, seconds, milliseconds or microseconds, with two or three figures."""
    size = abs(value)
    if size >= 120:
        return f"{value / 60:.1f} min"
    if size >= 1:
        return f"{value:.2f} s" if size < 10 else f"{value:.1f} s"
    if size >= 0.0000995:
        return f"{value * 1000:.0f} ms" if size >= 0.00995 else f"{value * 1000:.1f} ms"
    return f"{value * 1e6:.0f} µs"


def percent(share: float) -> str:
    """A share of one as percent: whole ones, one decimal under ten."""
    return f"{share * 100:.0f}%" if abs(share) >= 0.0995 else f"{share * 100:.1f}%"


def amount(value: float) -> str:
    """A number with three figures, thousands apart by a space."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def words(seconds: float) -> str:
    """A length of time for people: `1h05m`, `4m10s`, `35s`."""
    whole = round(max(0.0, seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
