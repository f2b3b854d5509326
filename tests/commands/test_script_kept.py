"""`grpo-autotune run` in this process: it costs a script neither its exit code nor its memory."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import trl.trainer.grpo_trainer as grpo_module

from grpo_autotune.commands import run as command
from grpo_autotune.errors import SeamError
from grpo_autotune.report.files import load_report
from grpo_autotune.seams.import_hooks import CONFIG_MODULE, ENGINE_MODULE

SCRIPT = """
import gc, os, sys, weakref
from pathlib import Path
from tests.support.trainers import make_trainer, spread_reward

model, other_folder = map(Path, sys.argv[1:3])
rows = [{"prompt": [{"role": "user", "content": f"What is {i} plus three?"}], "answer": str(i + 3)} for i in range(4)]
rewards, first = [spread_reward], None
for number in range(2):
    trainer = make_trainer(model, rows, other_folder / str(number), rewards=rewards, max_steps=2)
    os.chdir(other_folder)
    trainer.train()
    first = first or weakref.ref(trainer.model)
    del trainer
    gc.collect()
Path("freed").write_text(str(first() is None))
sys.exit(7)
"""


@pytest.fixture(autouse=True)
def plain_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL as it was, after a test: a script's hooks stay for the life of its process."""
    for owner, name in [
        (grpo_module.GRPOTrainer, "__init__"),
        (grpo_module.GRPOTrainer, "train"),
        (grpo_module, "create_model_from_path"),
        (importlib.import_module(CONFIG_MODULE).GRPOConfig, "__post_init__"),
        (importlib.import_module(ENGINE_MODULE).VLLMGeneration, "__init__"),
        (importlib.import_module(ENGINE_MODULE), "VLLMClient"),
    ]:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def run(
    folder: Path, text: str, *words: object, speedups: str = "none", steps: int | None = None
) -> tuple[object, str]:
    """The script's exit code and the closing line."""
    lines: list[str] = []

    def finish(probes: command.ScriptProbes) -> None:
        probes.reports()
        lines.append(probes.closing_line())

    (folder / "script.py").write_text(text)
    values, _ = command.values_for_script(None, speedups)
    code: object = None
    try:
        command.run_script(
            folder / "script.py",
            [str(word) for word in words],
            steps=steps,
            out_dir=Path("out"),
            finish=finish,
            output=nullcontext(),
            values=values,
        )
    except SystemExit as ended:
        code = ended.code
    return code, lines[0]


def test_trainers_are_freed_and_their_reports_lie_where_the_command_was_given(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "trainer-3").mkdir(parents=True)
    for stale in ("trainer-3/report.json", "spans.rank1.jsonl", "mine.txt", "spans_of_words.jsonl"):
        (tmp_path / "out" / stale).write_text("of an earlier run")
    pad = grpo_module.pad
    code, line = run(tmp_path, SCRIPT, tiny("qwen3"), tmp_path / "elsewhere", speedups="auto")
    assert code == 7
    assert (tmp_path / "elsewhere" / "freed").read_text() == "True"
    assert grpo_module.pad is pad
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {"live.json", "report.json", "report.html", "spans.jsonl", "trace.json.gz"}
    assert files == kept | {f"trainer-2/{name}" for name in kept} | {"mine.txt", "spans_of_words.jsonl"}
    assert line == f"Saved: {tmp_path}/out/report.json, {tmp_path}/out/trainer-2/report.json"
    assert load_report(tmp_path / "out").steps == [2]


def test_a_report_that_fails_is_a_warning(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grpo_autotune.probe.probe.facts_of", None)
    code, line = run(tmp_path, SCRIPT, tiny("qwen3"), tmp_path)
    assert code == 7 and line == "No report: no optimizer step was finished."
    assert "warning: what was measured was not saved: TypeError:" in capsys.readouterr().err


def test_steps_end_a_script_whose_trainer_cannot_be_measured(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise SeamError("stage `reward` is measured at a place which is not there", fix="See doctor.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grpo_autotune.probe.probe.Probe.__init__", unknown)
    text = SCRIPT.replace("max_steps=2", "max_steps=300, logging_steps=1")
    code, line = run(tmp_path, text, tiny("qwen3"), tmp_path, steps=1)
    assert code is None and "could be measured" in line
    assert "a trainer is not measured" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_a_script_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signum)
    code, line = run(tmp_path, f"import signal\nsignal.raise_signal({int(signum)})")
    assert code == 128 + signum and "built no GRPOTrainer" in line
    assert signal.getsignal(signum) is before
