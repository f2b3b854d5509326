"""Numbers as text: two or three figures, with the unit that fits."""

from collections.abc import Sequence

GIB = 2**30


def seconds(value: float) -> str:
    """A measured time in minutes, seconds, milliseconds or microseconds: `2.5 min`, `1.25 s`, `550 ms`, `12 µs`."""
    size = abs(value)
    if size >= 120:
        return f"{value / 60:.1f} min"
    if size >= 1:
        return f"{value:.2f} s" if size < 10 else f"{value:.1f} s"
    if size >= 0.0000995:
        return f"{value * 1000:.0f} ms" if size >= 0.00995 else f"{value * 1000:.1f} ms"
    return f"{value * 1e6:.0f} µs"


def percent(share: float) -> str:
    """A share of one in percent, with one decimal under ten: `32%`, `5.0%`."""
    return f"{share * 100:.0f}%" if abs(share) >= 0.0995 else f"{share * 100:.1f}%"


def amount(value: float) -> str:
    """A number with three figures and a space between thousands: `1.25`, `12 345`."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in binary units: `512 B`, `1.5 MiB`, `80.0 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def plural(count: int, noun: str) -> str:
    """A count with its noun: `1 core`, `4 cores`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def hms(seconds: float) -> str:
    """A length of time as `--budget` takes it: `1h05m`, `4m10s`, `35s`."""
    hours, minutes, rest = _split(seconds)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def duration(seconds: float) -> str:
    """A length of time in a sentence: `2 h 05 min`, `3 min 20 s`, `42 s`."""
    hours, minutes, rest = _split(seconds)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _split(seconds: float) -> tuple[int, int, int]:
    """Whole hours, minutes and seconds; nothing is less than none."""
    whole = round(max(0.0, seconds))
    return whole // 3600, whole % 3600 // 60, whole % 60
