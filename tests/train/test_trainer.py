"""From a configuration to a trainer and a run folder: what is trained, written, and refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerState

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError, ConfigError, EnvironmentProblem, TrainingError
from grpo_autotune.probe.startup import Startup
from grpo_autotune.registry import register
from grpo_autotune.runs.checkpoints import find_flaw
from grpo_autotune.train.models.load import load_processor
from grpo_autotune.train.runs.callbacks import ProgressLine
from grpo_autotune.train.runs.signals import StopRequest
from grpo_autotune.train.trainer import build_trainer, run_training
from grpo_autotune.train.trial_trainer import quiet_trainer
from tests.support.training import log_lines, picture_config, text_config

Tiny = Callable[[str], Path]


def trainable(trainer: Any) -> list[str]:
    return [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]


def test_a_run_and_its_folder(tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    phases: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    changes = {"data": {"eval_split": "train", "max_eval_samples": 2}}
    grpo = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    config = text_config(tiny("qwen3"), tmp_path, changes, **grpo)
    seen: list[Any] = []
    capfd.readouterr()
    result = run_training(config, tmp_path / "run", phase=phase, prepare=seen.append)
    out, told = capfd.readouterr()

    [evaluated] = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert phases == ["data", "model", "trainer"]
    assert out == ""
    assert "grpo.bf16 false" in told and "step 2/2  reward" in told
    row = next(line for line in told.splitlines() if re.search(r"  2 .*\d\.\d{4} ±\d\.\d{4} .*\*$", line))
    assert f"{json.loads(evaluated)['eval_reward']:.4f} ±" in row
    assert [line for line in told.splitlines() if "Warning" in line or "%|" in line] == []
    callbacks = {type(callback) for callback in seen[0].callback_handler.callbacks}
    assert not callbacks & {PrinterCallback, ProgressCallback}

    lines = log_lines(tmp_path / "run")
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("eval", 2)]
    assert {"loss", "reward", "kl", "grad_norm"} <= set(lines[0])
    assert (result.steps, result.total_steps, result.exit_code, result.resumed_from) == (2, 2, 0, None)
    assert result.metrics["loss"] == lines[1]["loss"]
    assert result.eval_metrics["eval_reward"] == lines[2]["eval_reward"]
    assert "held-out reward" in result.line() and result.line().endswith(str(tmp_path / "run"))
    assert RunConfig.from_yaml((tmp_path / "run" / "config.yaml").read_text()) == config
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2"]


def test_several_held_out_sets_report_each_a_loss(tiny: Tiny, tmp_path: Path) -> None:
    changes = {"data": {"eval": {"one": {"split": "train[:2]"}, "two": {"split": "train[2:4]"}}}}
    grpo = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    best = {"metric_for_best_model": "two_loss", "save_strategy": "best"}
    run_training(text_config(tiny("qwen3"), tmp_path, changes, **grpo, **best), tmp_path / "run")
    first, second = [line for line in log_lines(tmp_path / "run") if line["kind"] == "eval"]
    assert "eval_one_loss" in first and {"eval_two_loss", "eval_reward"} <= set(second)


def test_only_so_many_checkpoints_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    config = text_config(tiny("qwen3"), tmp_path, max_steps=3, save_steps=1, save_total_limit=2)
    run_training(config, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-3"]
    assert [find_flaw(path) for path in kept] == [None, None]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_frozen_vision_tower(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    thawed = build_trainer(picture_config(tiny(kind), tmp_path))
    assert any(".visual." in name for name in trainable(thawed))
    changes = {"model": {"freeze_vision_tower": True}, "peft": {"exclude_modules": ["k_proj"]}}
    frozen = trainable(build_trainer(picture_config(tiny(kind), tmp_path, changes)))
    assert frozen and all("lora" in name and "language_model" in name for name in frozen)
    assert not any("k_proj" in name for name in frozen) and any("q_proj" in name for name in frozen)
    whole = trainable(build_trainer(picture_config(tiny(kind), tmp_path, {**changes, "peft": None})))
    assert whole and not any("visual" in name for name in whole)


def test_four_bits(tiny: Tiny, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    config = text_config(tiny("qwen3"), tmp_path, {"model": {"load_in_4bit": True}}, max_steps=2)
    trainer = build_trainer(config, grpo_overrides={"output_dir": str(tmp_path / "run")})
    layers = [module for module in trainer.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7 and {layer.weight.quant_type for layer in layers} == {"nf4"}
    before = {name: trainer.model.get_parameter(name).detach().clone() for name in trainable(trainer)}
    trainer.train()
    assert any(not torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())


def test_model_options(tiny: Tiny, tmp_path: Path) -> None:
    """The stored type by default, what is asked for otherwise; a registered name stands for a folder."""
    register("model", "tiny-for-test")(lambda: tiny("llama"))
    plain = build_trainer(text_config(Path("tiny-for-test"), tmp_path, {"peft": None}))
    assert {parameter.dtype for parameter in plain.model.parameters()} == {torch.float32}
    assert plain.ref_model.dtype == torch.float32
    changes = {"peft": None, "model": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    asked = build_trainer(text_config(tiny("llama"), tmp_path, changes))
    assert (asked.model.dtype, asked.ref_model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert asked.model.config._attn_implementation == "eager"


def test_what_the_user_wrote_stays(tiny: Tiny, tmp_path: Path) -> None:
    assert not build_trainer(text_config(tiny("qwen3"), tmp_path)).args.bf16
    args = build_trainer(text_config(tiny("qwen3"), tmp_path, bf16=True)).args
    assert args.bf16 and args.use_cpu == (not torch.accelerator.is_available())


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[AutotuneError], str]] = {
    "no such folder": (
        {"model": {"name_or_path": "./nowhere"}},
        {},
        ConfigError,
        r"^model.name_or_path: ./nowhere is not",
    ),
    "not a model": ({"model": {"name_or_path": "{folder}"}}, {}, ConfigError, r"^model.name_or_path: cannot load /"),
    "no tower": ({"model": {"freeze_vision_tower": True}}, {}, ConfigError, r"^model.freeze_vision_tower: Qwen3For"),
    "no tracker": (
        {},
        {"report_to": "swanlab"},
        EnvironmentProblem,
        r"^grpo.report_to: swanlab .*pip install swanlab",
    ),
    "TRL's arguments": (
        {},
        {"log_completions_hub_repo": "a/b"},
        ConfigError,
        r"^grpo: log_completions_hub_repo is set",
    ),
    "GenerationConfig": (
        {"model": {"name_or_path": "./nowhere"}},
        {"cache_implementation": "statik"},
        ConfigError,
        r"^grpo: Invalid `cache_implementation` \(statik\)",
    ),
    "TRL's trainer": (
        {},
        {"sync_ref_model": True},
        ConfigError,
        r"^grpo: You passed `sync_ref_model=True` while using",
    ),
    "an optimizer": ({}, {"optim": "adamm"}, ConfigError, r"^grpo: .*adamm"),
    "PEFT's targets": (
        {"peft": {"target_modules": ["nothing"]}},
        {},
        ConfigError,
        r"Target modules .*nothing.* not found",
    ),
}


def test_vllm_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before data and model are loaded, with the extra of this package."""
    monkeypatch.setattr("grpo_autotune.config.packages.importlib.util.find_spec", lambda package: None)
    config = text_config(tmp_path / "no-model", tmp_path, use_vllm=True)
    with pytest.raises(EnvironmentProblem, match=r"^grpo\.use_vllm: .*not installed.*grpo-autotune\[vllm\]"):
        build_trainer(config, load=lambda *_: pytest.fail("the data was read"))


def test_images_for_a_model_that_cannot_see(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model: the data has the column image, and this model takes no images"):
        build_trainer(picture_config(tiny("qwen3"), tmp_path))


def test_an_evaluation_before_the_first_step_is_not_in_its_time() -> None:
    now, text = [0.0], io.StringIO()
    line = ProgressLine(dict, Console(file=text), clock=lambda: now[0])
    state = TrainerState(global_step=0, max_steps=5, is_world_process_zero=True)
    line.on_train_begin(None, state, None)
    now[0] = 100.0
    line.on_evaluate(None, state, None, metrics={"eval_hard_runtime": 9.0, "eval_reward": 0.5})
    now[0], state.global_step = 102.0, 1
    line.on_step_end(None, state, None)
    assert "2.00 s/step  8 s left" in text.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, tiny: Tiny, tmp_path: Path) -> None:
    changes, grpo, kind, message = REFUSED[name]
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    with pytest.raises(kind, match=message) as caught:
        build_trainer(text_config(tiny("qwen3"), tmp_path, changes, **grpo))
    assert "\n" not in str(caught.value)


def test_padding_on_the_right_is_mended_where_it_can_be(tiny: Tiny, tmp_path: Path) -> None:
    """A tokenizer saved with right padding, as most are, is loaded to pad on the left; one that will not is refused."""
    folder = tmp_path / "right"
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"))
    model.save_pretrained(folder)
    for path in tiny("qwen3").glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "right"}))
    tokenizer = load_processor(text_config(folder, tmp_path).model, str(folder))
    assert tokenizer(["a", "a b c d"], padding=True)["attention_mask"][0][0] == 0

    (folder / "stubborn.py").write_text(
        "from transformers import Qwen2Tokenizer\n"
        "class Stubborn(Qwen2Tokenizer):\n"
        "    def __call__(self, *args, **kwargs):\n"
        "        return super().__call__(*args, **{**kwargs, 'padding_side': 'right'})\n"
    )
    remote = {"tokenizer_class": "Stubborn", "auto_map": {"AutoTokenizer": [None, "stubborn.Stubborn"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **remote}))
    with pytest.raises(ConfigError, match=r"^model.name_or_path: the processor of .* pads on the right"):
        load_processor(text_config(folder, tmp_path, {"model": {"trust_remote_code": True}}).model, str(folder))


@pytest.mark.parametrize(("reuse", "message"), [(2, "the loss or its gradient"), (1, "the model's probabilities")])
def test_weights_that_run_away(reuse: int, message: str, tiny: Tiny, tmp_path: Path) -> None:
    grpo = {"learning_rate": 1e30, "num_iterations": reuse, "lr_scheduler_type": "constant"}
    with pytest.raises(TrainingError, match=f"^step 2: {message}") as caught:
        run_training(text_config(tiny("qwen3"), tmp_path, **grpo), tmp_path / "run")
    assert "grpo.learning_rate" in str(caught.value) and caught.value.exit_code == 1


def test_progress_on_a_terminal(tiny: Tiny, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    run_training(text_config(tiny("qwen3"), tmp_path, max_steps=2), tmp_path / "run", console=console)
    for part in ("2/2", "reward", "KL", "s/step", "left"):
        assert part in screen.getvalue()


def test_second_control_c_ends_at_once() -> None:
    now, said, died = [0.0], [], []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(say=said.append, clock=lambda: now[0], die=died.append) as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signum == signal.SIGINT and len(said) == 1
        now[0] = 0.1  # the launcher's copy of the same Ctrl-C
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert died == []
        now[0] = 2.0
        signal.raise_signal(signal.SIGINT)
        assert died == [signal.SIGINT] and "not saved" in said[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_schedulers_signals() -> None:
    """SIGUSR1 ahead of a time limit, passed on by the launcher; SIGTERM at the limit; the first again and again."""
    now, said, died, before = [0.0], [], [], signal.getsignal(signal.SIGUSR2)
    with StopRequest([signal.SIGUSR1, signal.SIGTERM], said.append, lambda: now[0], died.append) as request:
        assert signal.getsignal(signal.SIGUSR2) is before  # not asked for: as it was
        signal.raise_signal(signal.SIGUSR1)
        now[0] = 3.0
        signal.raise_signal(signal.SIGUSR1)
        now[0] = 120.0
        signal.raise_signal(signal.SIGTERM)
        assert (request.signum, died, len(said)) == (signal.SIGUSR1, [], 1)
        for _ in range(2):  # by the launcher as well
            signal.raise_signal(signal.SIGUSR1)
        assert (died, len(said)) == ([], 2) and "still stopping" in said[1]
        now[0] = 140.0
        signal.raise_signal(signal.SIGUSR1)
        assert died == [signal.SIGUSR1]


def test_control_c_behind_a_signal_is_told_once() -> None:
    now, said, died = [0.0], [], []
    with StopRequest(say=said.append, clock=lambda: now[0], die=died.append):
        for now[0], signum in ((0.0, signal.SIGTERM), (1.0, signal.SIGINT), (1.1, signal.SIGINT)):
            signal.raise_signal(signum)
        assert (died, len(said)) == ([], 2)
        now[0] = 2.0
        signal.raise_signal(signal.SIGINT)
    assert died == [signal.SIGINT]


def test_a_checkpoint_of_weights_alone_is_no_start(tiny: Tiny, tmp_path: Path) -> None:
    config = text_config(tiny("qwen3"), tmp_path, max_steps=1, save_steps=1, save_only_model=True)
    run_training(config, tmp_path / "run")
    flaw = find_flaw(tmp_path / "run" / "checkpoints" / "checkpoint-1")
    assert flaw is not None and "save_only_model" in flaw


def test_nothing_that_was_trained_is_trained_over(tiny: Tiny, tmp_path: Path) -> None:
    from grpo_autotune.runs.folder import RunFolder, find_start

    config = text_config(tiny("qwen3"), tmp_path, max_steps=1, save_steps=1, save_only_model=True)
    run_training(config, tmp_path / "weights")
    with pytest.raises(ConfigError, match="without the optimizer's state"):
        find_start(RunFolder(tmp_path / "weights"), resume=True)
    (tmp_path / "model_only" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        find_start(RunFolder(tmp_path / "model_only"), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="this is a file"):
        find_start(RunFolder(tmp_path / "file"), resume=False)


def test_weights_that_are_cut_short_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    torn = tmp_path / "torn"
    shutil.copytree(tiny("qwen3"), torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot load"):
        build_trainer(text_config(torn, tmp_path))


def test_a_measurement_leaves_the_runs_own_folder_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = text_config(tiny("qwen3"), tmp_path)
    trainer = quiet_trainer(config, Startup(), lambda line: None, out_dir=tmp_path / "measured")
    assert trainer.args.output_dir == str(tmp_path / "measured")
    assert not (config.run_dir / "checkpoints").exists()
