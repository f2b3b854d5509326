"""Known lines of other libraries are dropped by their text, and nothing else is."""

from __future__ import annotations

import logging

import pytest

from grpo_autotune.train.runs.quiet import LOG_LINES, drop_log_lines


@pytest.mark.parametrize(("name", "start"), LOG_LINES.items())
def test_a_known_line_is_dropped_once_and_for_all(name: str, start: str, caplog: pytest.LogCaptureFixture) -> None:
    drop_log_lines()
    drop_log_lines()
    logger = logging.getLogger(name)
    assert sum(type(known).__name__ == "_Drop" for known in logger.filters) == 1
    with caplog.at_level(logging.WARNING, logger=name):
        logger.warning("%s: no module named kernels", start)
        logger.warning("another line")
    assert "no module named kernels" not in caplog.text


def test_the_line_of_bitsandbytes_is_the_one_that_it_writes() -> None:
    from pathlib import Path

    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = (Path(bitsandbytes.__file__).parent / "backends" / "cpu" / "ops.py").read_text(encoding="utf-8")
    assert LOG_LINES["bitsandbytes.backends.cpu.ops"] in source


def test_importing_train_drops_them() -> None:
    import grpo_autotune.train

    assert grpo_autotune.train.drop_log_lines is drop_log_lines
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters
