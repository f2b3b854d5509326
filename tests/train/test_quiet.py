"""Known lines of other libraries are dropped by their text, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from grpo_autotune.train.runs.quiet import BITSANDBYTES, quieten

LINE = "Failed to load CPU gemm_4bit_forward from kernels-community: no module. Please make sure ..."


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger(BITSANDBYTES)
    before, logger.filters = logger.filters, []
    yield logger
    logger.filters = before


@pytest.mark.parametrize("four_bit", [True, False])
def test_kernels_for_four_bits_are_spoken_of_where_there_are_four_bits(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture, four_bit: bool
) -> None:
    quieten(bars=True, four_bit=four_bit)
    quieten(bars=True, four_bit=four_bit)
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ...", "no module")
    logger.warning("another line")
    assert [record.getMessage() for record in caplog.records] == [LINE] * four_bit + ["another line"]
