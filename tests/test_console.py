"""Progress on a terminal and elsewhere, and what other ranks say."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from grpo_autotune import console
from grpo_autotune.console import REPEAT_S, Heartbeat, ProgressBar, accept_any_text, complain, say, show, warn


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_only_the_first_rank_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say(f"say {rank}")
        warn(f"warn {rank}")
        show(f"show {rank}")
        complain(f"complain {rank}", everywhere=False)
        complain(f"everywhere {rank}", everywhere=True)
    out, err = capsys.readouterr()
    assert out == "show 0\n"
    assert err == "say 0\nwarning: warn 0\ncomplain 0\neverywhere 0\nrank 1: everywhere 1\n"


def test_a_heartbeat_repeats_itself_only_after_a_while() -> None:
    clock, told, lines = Clock(), list[str](), iter(["a, 1 s", "a, 2 s", None, "b, 3 s", "b, 18 s"])
    heartbeat = Heartbeat(lambda: next(lines), told.append, clock=clock)
    for now_s in (1.0, 2.0, 3.0, 4.0, 4.0 + REPEAT_S):
        clock.now_s = now_s
        heartbeat.beat()
    assert told == ["a, 1 s", "b, 3 s", "b, 18 s"]


def test_a_heartbeat_ends_with_its_context() -> None:
    with Heartbeat(lambda: "a, 1 s", lambda line: None, every_s=0.001) as heartbeat:
        assert heartbeat._thread.is_alive()
    assert not heartbeat._thread.is_alive()


def test_progress_elsewhere_is_lines_with_the_time_left() -> None:
    clock, text = Clock(), io.StringIO()
    with ProgressBar("probing", 4, Console(file=text), clock) as bar:
        for done in (1, 2, 3):
            clock.now_s = 50.0 * done
            bar.update(done, "beside", f"step {done}, {bar.time_left(done)}" if done != 2 else None)
    assert text.getvalue() == "step 1, about 2 min 30 s left\nstep 3, about 50 s left\n"


def test_progress_on_a_terminal_is_a_bar() -> None:
    screen = io.StringIO()
    with ProgressBar("probing", 4, Console(file=screen, force_terminal=True, width=80)) as bar:
        bar.update(3, "about 50 s left", "a line")
    for part in ("probing", "3/4", "about 50 s left"):
        assert part in screen.getvalue()
    assert "a line" not in screen.getvalue()


def test_progress_of_other_ranks_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_first_rank", lambda: False)
    for terminal in (True, False):
        screen = io.StringIO()
        with ProgressBar("probing", 4, Console(file=screen, force_terminal=terminal)) as bar:
            bar.update(3, "beside", "a line")
        assert not screen.getvalue()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"## 3 us +-1 -- \\u7b54\\ud800"),
        ("cp1252", "## 3 µs ±1 -- \\u7b54\\ud800".encode("cp1252")),
        ("gbk", "██ 3 us ±1 ── 答\\ud800".encode("gbk")),
        ("utf-8", "██ 3 µs ±1 ── 答\\ud800".encode()),
    ],
)
def test_a_terminal_of_any_encoding_takes_every_text(
    encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(screen, encoding=encoding))
    accept_any_text()
    show("██ 3 µs ±1 ── 答\ud800")
    say("██ 3 µs ±1 ── 答\ud800")
    assert screen.getvalue() == 2 * (shown + b"\n")
