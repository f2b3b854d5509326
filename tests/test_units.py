"""Numbers as text."""

from __future__ import annotations

import pytest

from grpo_autotune.units import amount, duration, hms, listing, percent, seconds, size


@pytest.mark.parametrize(
    ("value", "budget", "sentence"),
    [
        (-2, "0s", "0 s"),
        (0.4, "0s", "0 s"),
        (59, "59s", "59 s"),
        (59.6, "1m00s", "1 min 00 s"),
        (250, "4m10s", "4 min 10 s"),
        (3599.7, "1h00m", "1 h 00 min"),
        (7500, "2h05m", "2 h 05 min"),
    ],
)
def test_lengths_of_time(value: float, budget: str, sentence: str) -> None:
    assert (hms(value), duration(value)) == (budget, sentence)


def test_measured_times_have_two_or_three_figures() -> None:
    texts = [seconds(value) for value in (150.0, 119.0, 1.254, 0.55, 0.0099, 0.0000994)]
    assert texts == ["2.5 min", "119.0 s", "1.25 s", "550 ms", "9.9 ms", "99 µs"]


def test_other_numbers() -> None:
    assert [percent(share) for share in (0.324, 0.05, 1.0)] == ["32%", "5.0%", "100%"]
    assert [amount(value) for value in (1.254, 99.44, 12345.0)] == ["1.25", "99.4", "12 345"]
    assert [size(count) for count in (512, 1536, 1020, 80 * 2**30)] == ["512 B", "1.5 KiB", "1020 B", "80.0 GiB"]
    assert [listing(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
