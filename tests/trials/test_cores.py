"""Cores of a trial's process, on a system that keeps no process to cores; `test_runner` has those that do."""

from __future__ import annotations

import os

import pytest
import torch

from grpo_autotune.trials.child import cores


def test_where_no_process_is_kept_to_cores_its_threads_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "_ALL", set())
    monkeypatch.setattr(cores, "_THREADS", 3)
    monkeypatch.setattr(cores, "_last", [set()])
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    try:
        cores.keep_to((0, 1))
        assert torch.get_num_threads() == 2
        cores.keep_to(())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_that_somebodys_code_has_set_stay_while_the_cores_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "_last", [cores._ALL])
    try:
        torch.set_num_threads(before + 1)
        cores.keep_to(())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
