"""Known lines of other libraries are dropped by their text, and nothing else is."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.train.models import load
from grpo_autotune.train.runs.quiet import CPU_4BIT, LOG_LINES, drop_log_lines


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
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = (Path(bitsandbytes.__file__).parent / "backends" / "cpu" / "ops.py").read_text(encoding="utf-8")
    assert LOG_LINES["bitsandbytes.backends.cpu.ops"] in source


BEFORE_PEFT = """
import logging, sys
from grpo_autotune.commands.imports import mend_torchvision
mend_torchvision()
assert "peft" not in sys.modules and logging.getLogger("bitsandbytes.backends.cpu.ops").filters
"""


@pytest.mark.slow
def test_a_command_drops_them_before_peft_is_imported() -> None:
    assert subprocess.run([sys.executable, "-c", BEFORE_PEFT], check=False).returncode == 0


def test_importing_train_drops_them() -> None:
    import grpo_autotune.train

    assert grpo_autotune.train.drop_log_lines is drop_log_lines
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters


@pytest.mark.parametrize(("device", "four_bit", "told"), [("cpu", True, 1), ("cuda", True, 0), ("cpu", False, 0)])
def test_a_run_in_4_bits_on_a_cpu_is_told_once_that_its_kernel_is_missing(
    device: str, four_bit: bool, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = SimpleNamespace(device=SimpleNamespace(type=device))
    monkeypatch.setattr(load, "create_model_from_path", lambda source, **options: model)
    values = {"model": {"name_or_path": "m", "load_in_4bit": four_bit}, "peft": {}, "data": {"path": "d"}}
    config = RunConfig.from_dict({**values, "rewards": [{"name": "format"}]})
    monkeypatch.setattr(load, "_four_bit", lambda *how: None)
    drop_log_lines()
    with caplog.at_level(logging.WARNING, logger=CPU_4BIT):
        logging.getLogger(CPU_4BIT).warning("%s: no module named kernels", LOG_LINES[CPU_4BIT])
        for _ in range(2):
            load.load_model(config.model, "m", {})
    assert caplog.text.count("no module named kernels") == told
