"""`import` and `export` as they are called: what is written, what is left alone, and one line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_autotune.cli.main import main
from grpo_autotune.commands.interop.config import check
from grpo_autotune.config.schema import load_config
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.writing.yaml_text import yaml_text
from grpo_autotune.records.imported import Imported, ImportedRow

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "vllm", "datasets", "optuna", "pandas", "numpy")
TRL = """# trl grpo --config this
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: org/data
reward_funcs: [think_format_reward]
num_generations: 8   # G
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
output_dir: out
"""
EASYR1 = """data: {train_files: train.parquet, rollout_batch_size: 8}
algorithm: {adv_estimator: grpo, disable_kl: true}
worker:
  actor:
    global_batch_size: 8
    micro_batch_size_per_device_for_update: 8
    model: {model_path: Qwen/Qwen2.5-1.5B-Instruct}
  rollout: {n: 8}
  reward: {reward_function: "./mine.py:compute_score"}
trainer: {n_gpus_per_node: 1, nnodes: 1}
"""
SCRIPT = """from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward
from datasets import load_dataset

size = 8
args = GRPOConfig(
    output_dir="out",
    num_generations=8,
    per_device_train_batch_size=size,
)
data = load_dataset("org/data", split="train")
trainer = GRPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=[think_format_reward], args=args, train_dataset=data)
trainer.train()
"""
RECEIPT = {
    "machine": "m", "hardware": "2 cores of a CPU", "versions": {"trl": "1.16.0"}, "step_s": 1.0, "step_s_low": 0.9,
    "step_s_high": 1.1, "steps": 8, "baseline_step_s": 2.0, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1,
    "raced": True, "confidence": 0.95,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "trl.yaml").write_text(TRL)
    (tmp_path / "easyr1.yaml").write_text(EASYR1)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def tuned(folder: Path, changed: list[dict[str, Any]], **grpo: Any) -> str:
    """A tuned file with these keys of `grpo`."""
    changes = [{"before": None, "kind": "exact", "proof": "exact", **change} for change in changed]
    values = {"grpo": grpo, "receipt": {**RECEIPT, "changed": changes}}
    (folder / "tuned.yaml").write_text(yaml.safe_dump(values))
    return "tuned.yaml"


def test_a_configuration_is_written_once_and_again_where_it_is_named(folder: Path, capfd: Any) -> None:
    assert main(["import", "trl.yaml"]) == 0
    told = capfd.readouterr()
    assert re.search(r"5 +converted +num_generations = 8", told.out)
    assert "Wrote grpo.yaml" in told.err and "grpo-autotune doctor grpo.yaml" in told.err
    assert load_config("grpo.yaml").grpo["num_generations"] == 8
    (folder / "grpo.yaml").write_text("mine")
    assert main(["import", "trl.yaml"]) == 2
    assert "grpo.yaml: it is there already. Name the file to write with --out." in capfd.readouterr().err
    assert (folder / "grpo.yaml").read_text() == "mine"
    assert main(["import", "trl.yaml", "--out", "grpo.yaml"]) == 0 and load_config("grpo.yaml")


def test_json_stands_alone_on_standard_output(folder: Path, capfd: Any) -> None:
    assert main(["import", "trl.yaml", "--json", "--world-size", "2"]) == 0
    told = capfd.readouterr()
    record = Imported.model_validate_json(told.out)
    assert record.world_size == 2 and record.config == yaml.safe_load((folder / "grpo.yaml").read_text())
    assert "torchrun --nproc-per-node 2" in told.err


def test_strict_lists_what_is_lost_and_writes_nothing(folder: Path, capfd: Any) -> None:
    (folder / "trl.yaml").write_text(f"{TRL}push_to_hub: true\n")
    assert main(["import", "trl.yaml", "--strict"]) == 1
    told = capfd.readouterr()
    assert "no equivalent" in told.out
    assert "--strict: push_to_hub (line 9) is the first of 1 setting whose meaning is lost" in told.err
    assert not (folder / "grpo.yaml").exists()


def test_files_beside_the_configuration_are_not_written_over(folder: Path, capfd: Any) -> None:
    (folder / "easyr1_compute_score.py").write_text("# mine")
    assert main(["import", "easyr1.yaml"]) == 2
    assert "easyr1_compute_score.py: another file of this name is there" in capfd.readouterr().err
    assert not (folder / "grpo.yaml").exists()
    (folder / "easyr1_compute_score.py").unlink()
    assert main(["import", "easyr1.yaml"]) == 0
    assert (folder / "easyr1_compute_score.py").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trl.yaml", "--out", "nowhere/grpo.yaml"], "cannot be written (No such file or directory)"),
        (["trl.yaml", "--env", "A"], "--env A: not of the form NAME=VALUE"),
        (["trl.yaml", "--from", "varl"], "varl"),
        (["nothing.yaml"], "nothing.yaml: cannot be read"),
        (["trl.yaml", "--out", "sub"], "grpo-autotune: sub: cannot be written (Is a directory)"),
        (["trl.yaml", "--out", "./trl.yaml"], "--out trl.yaml: this is the file to import"),
        (["trl.yaml", "--config", "trl.yaml"], "trl.yaml is a configuration, which --config does nothing for"),
        (["trl.yaml", "--world-size", "0"], "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, capfd: Any, words: list[str], line: str) -> None:
    (folder / "sub").mkdir()
    before = sorted(folder.iterdir())
    assert main(["import", *words]) == 2
    told = capfd.readouterr().err
    assert line in told and told.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_a_log_against_a_configuration_that_has_to_be_told(folder: Path, capfd: Any) -> None:
    log, script = (str(ROOT / "examples" / "interop" / name) for name in ("swift_logging.jsonl", "run_swift.sh"))
    Path("run.sh").write_text(Path(script).read_text().replace("--num_generations 8", "--num_generations ${GROUP}"))
    assert main(["import", log, "--config", "run.sh"]) == 2
    assert "num_generations: a number is needed" in capfd.readouterr().err
    assert main(["import", log, "--config", "run.sh", "--env", "GROUP=4", "--world-size", "2"]) == 0
    capfd.readouterr()
    assert main(["import", log, "--env", "GROUP=4"]) == 2
    assert "which --env does nothing for. It goes with --config." in capfd.readouterr().err
    assert main(["import", log, "--out", "log.json"]) == 0 and main(["report", "log.json"]) == 2
    assert "log.json: this is the report of a log. `grpo-autotune import LOG`" in capfd.readouterr().err


def test_a_value_that_we_refuse_is_told_by_the_line_of_the_source() -> None:
    row = ImportedRow(line=7, key="trainer.beta", value=-1, kind="same", to={"grpo.num_generations": 1})
    config = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d"},
        "rewards": [{"name": "format"}],
        "grpo": {"num_generations": 1},
    }
    imported = Imported(
        file="run.sh", source="verl", version="2026", version_from="assumed", world_size=1, numbers={"D": 1},
        steps_per_rollout=1.0, rows=[row], warnings=[], config=config,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"run.sh, line 7: trainer.beta: must be at least 2") as caught:
        check(imported, yaml_text(imported, {}), "grpo.yaml")
    assert "grpo.num_generations" in str(caught.value)


def test_an_export_goes_to_standard_output_or_to_the_file_that_is_named(folder: Path, capfd: Any) -> None:
    changed: list[dict[str, Any]] = [
        {"key": "grpo.per_device_train_batch_size", "after": 4},
        {"key": "speedups", "after": "auto"},
    ]
    values = {"num_generations": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    words = ["export", tuned(folder, changed, **values), "--to", "trl.yaml"]
    assert main(words) == 0
    told = capfd.readouterr()
    assert "per_device_train_batch_size: 4\ngradient_accumulation_steps: 4\n" in told.out
    assert "num_generations: 8   # G" in told.out and "# Measured" in told.out.replace("# Tuned", "# Measured")
    assert "left out: speedups auto" in told.err and "Whether it is faster in TRL was not measured." in told.err
    assert (folder / "trl.yaml").read_text() == TRL
    assert main([*words, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["text"] == told.out and record["lost"][0]["key"] == "speedups"
    assert main([*words, "--out", "trl.yaml"]) == 0
    assert (folder / "trl.yaml").read_text() == told.out


def test_values_of_another_model_are_told(folder: Path, capfd: Any) -> None:
    name = tuned(folder, [], num_generations=8, per_device_train_batch_size=16)
    (folder / name).write_text((folder / name).read_text() + "model: {name_or_path: other}\n")
    assert main(["export", name, "--to", "trl.yaml"]) == 0
    assert "tuned for other, and the file trains Qwen/Qwen2.5-1.5B-Instruct" in capfd.readouterr().err


def test_a_secret_is_written_to_the_users_file_alone(folder: Path, capfd: Any) -> None:
    (folder / "trl.yaml").write_text(f"{TRL}hub_token: hf_abcdefghijklmnopqrst\n")
    words = ["export", tuned(folder, [], num_generations=8, per_device_train_batch_size=16), "--to", "trl.yaml"]
    assert main(words) == 0
    told = capfd.readouterr()
    assert "hf_abc" not in told.out and "***" in told.out and "shown as ***" in told.err
    assert main([*words, "--out", "new.yaml"]) == 0
    assert "hub_token: hf_abcdefghijklmnopqrst\n" in (folder / "new.yaml").read_text()


def test_a_script_gets_a_patch(folder: Path, capfd: Any) -> None:
    changed = [{"key": "grpo.per_device_train_batch_size", "after": 4}]
    name = tuned(folder, changed, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert main(["export", name, "--to", "train.py"]) == 0
    told = capfd.readouterr()
    assert "-size = 8\n+size = 4\n" in told.out and "+    gradient_accumulation_steps=2," in told.out
    assert "This is a patch" in told.err and (folder / "train.py").read_text() == SCRIPT


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"grpo": {}}, "no receipt says which keys were tuned"),
        ({"grpo": {}, "receipt": {"machine": "m"}}, "receipt.hardware: this key is required and is missing"),
        (
            {"grpo": {"gradient_accumulation_steps": 0}, "receipt": RECEIPT},
            "grpo.gradient_accumulation_steps of the tuned file: a whole number of at least 1 is needed",
        ),
        (
            {"grpo": {"per_device_train_batch_size": 3}, "receipt": RECEIPT},
            "its 3 completions per process are no part of",
        ),
    ],
)
def test_a_tuned_file_that_does_not_belong_here(folder: Path, capfd: Any, values: Any, line: str) -> None:
    (folder / "tuned.yaml").write_text(yaml.safe_dump(values))
    assert main(["export", "tuned.yaml", "--to", "trl.yaml", "--out", "new.yaml"]) == 2
    told = capfd.readouterr().err
    assert line in told and told.count("\n") == 1 and not (folder / "new.yaml").exists()


def test_an_exported_file_has_the_line_ends_and_the_rights_of_the_original(folder: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (folder / "trl.yaml").write_bytes(mark + TRL.replace("\n", "\r\n").encode())
    (folder / "trl.yaml").chmod(0o740)
    changed = [{"key": "grpo.beta", "after": 0.01}]
    name = tuned(folder, changed, num_generations=8, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert main(["export", name, "--to", "trl.yaml", "--out", "out.yaml"]) == 0
    written = (folder / "out.yaml").read_bytes()
    assert written.startswith(mark + b"# Tuned by") and written.count(b"\n") == written.count(b"\r\n")
    assert b"\r\nbeta: 0.01\r\n" in written and (folder / "out.yaml").stat().st_mode & 0o777 == 0o740


def test_a_patch_is_not_written_over_the_program(folder: Path, capfd: Any) -> None:
    name = tuned(folder, [{"key": "grpo.beta", "after": 0.01}], gradient_accumulation_steps=1)
    assert main(["export", name, "--to", "train.py", "--out", "./train.py"]) == 2
    assert "train.py: the patch would replace the program" in capfd.readouterr().err
    assert (folder / "train.py").read_text() == SCRIPT


def test_modules_elsewhere_are_named_in_the_next_commands(folder: Path, capfd: Any) -> None:
    (folder / "a b").mkdir()
    assert main(["import", "easyr1.yaml", "--out", "a b/grpo.yaml"]) == 0
    assert "PYTHONPATH='a b' grpo-autotune doctor" in capfd.readouterr().err


@pytest.mark.slow
def test_import_loads_no_heavy_library(folder: Path) -> None:
    words = ["import", str(folder / "trl.yaml"), "--out", str(folder / "grpo.yaml")]
    code = (
        f"import sys; from grpo_autotune.cli.main import main; assert main({words}) == 0; "
        f"print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == ""


def test_a_probe_of_what_was_imported_splits_the_training_pass(folder: Path, tiny: Any, capfd: Any) -> None:
    rows = [{"prompt": f"What is {number} + 1?"} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "model_name_or_path": str(tiny("qwen3")), "dataset_name": "rows.jsonl", "reward_funcs": ["think_format_reward"],
        "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "bf16": False,
        "output_dir": "out", "report_to": "none",
    }  # fmt: skip
    (folder / "trl.yaml").write_text(yaml.safe_dump(values))
    assert main(["import", "trl.yaml", "--probe"]) == 0
    lines = capfd.readouterr().out.splitlines()
    split = next(line for line in lines if line.startswith("The training pass holds "))
    shares = [float(share) for share in re.findall(r"([\d.]+)% (?:forward|backward|optimizer)", split)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=1.5)
    assert any(line.startswith("What the file says") for line in lines) and (folder / "out" / "probe").is_dir()
