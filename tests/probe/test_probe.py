"""The probe on real TRL: every path has its stages, nothing that is learned changes, and detaching leaves nothing."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Image

from grpo_autotune import attach
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.live import LIVE_FILE, Live
from grpo_autotune.records.probe import NO_SIGNAL
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import save_report
from grpo_autotune.report.timeline import read_spans
from tests.support.traces import events_in, self_seconds
from tests.support.trainers import async_reward, losses, make_trainer, rising_reward, spread_reward

from grpo_autotune.probe import probe as probe_module  # isort: skip
from grpo_autotune.probe.facts import TokenCollector  # isort: skip
from grpo_autotune.probe.probe import Probe  # isort: skip
from grpo_autotune.probe.signal import SignalWatch  # isort: skip
import torch  # isort: skip
from transformers import AutoTokenizer, TrainerCallback  # isort: skip
import trl  # isort: skip
import trl.trainer.grpo_trainer as grpo_module  # isort: skip

ALWAYS = {"generation", "policy_logprob", "reward", "backward", "data", "prompt", "optimizer", "log_save_eval", "other"}


def seconds_by_stage(record) -> dict[str, float]:
    return {row.name: sum(row.per_step_s) for row in record.timings.stages}


def probed(trainer, **kwargs):
    probe = Probe(trainer, **kwargs)
    trainer.train()
    record = probe.record()
    probe.detach()
    for index, step_s in enumerate(record.timings.step_s):
        assert sum(row.per_step_s[index] for row in record.timings.stages) == pytest.approx(step_s, abs=1e-6)
    return record


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
@pytest.mark.parametrize("lora", [True, False])
def test_four_architectures_with_and_without_adapters(tiny, tmp_path, picture_rows, text_rows, kind, lora):
    rows = picture_rows if kind.endswith("vl") else text_rows
    trainer = make_trainer(tiny(kind), rows, tmp_path, lora=lora, beta=0.05)
    record = probed(trainer, out_dir=tmp_path / "probe")
    seconds = seconds_by_stage(record)
    assert {stage for stage, total in seconds.items() if total > 0} >= ALWAYS | {"reference_logprob"}
    assert record.trainer.has_ref_model is (not lora)
    assert record.timings.steps == [2, 3] and len(record.timings.warmup_s) == 1
    assert record.tokens is not None and record.tokens.groups == 4
    if kind.endswith("vl"):
        assert record.images is not None and record.images.tokens is not None
        assert record.images.processings_per_image >= 2 * 2, "TRL processes each of the G copies twice"
        assert record.images.pixels.max == 56 * 56
        assert record.images.tokens_at["1024"] > record.images.tokens_at["384"]
    else:
        assert record.images is None
    lines = (tmp_path / "probe" / "spans.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    report = build_report(record)
    save_report(report, tmp_path / "probe")
    totals = self_seconds(events_in(tmp_path / "probe"))
    for row in report.stages:
        traced = sum(totals[step, row.name] for step in (2, 3)) / 2.0
        assert traced == pytest.approx(row.mean_s, rel=0.01, abs=2e-4), row.name


def test_what_is_under_way_belongs_to_its_step(tiny, tmp_path, text_rows, monkeypatch):
    monkeypatch.setattr(probe_module, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(probe_module, "MOST_SPANS_BYTES", 1)
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    probe, told = Probe(trainer, out_dir=tmp_path / "probe"), []

    class Asks(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            told.append(probe.now().partition(",")[0])

        def on_save(self, args, state, control, **kwargs):
            told.append(probe.now().partition(",")[0])

    trainer.add_callback(Asks())
    trainer.train()
    steps = [line.partition(":")[0] for line in told]
    assert steps == ["step 1 of 2", "step 1 of 2", "step 2 of 2", "step 2 of 2"]
    assert told[1].endswith("log_save_eval")
    assert list(read_spans(tmp_path / "probe" / "spans.jsonl", range(9))) == [1], "a file that is full ends at a step"


def test_beta_zero_has_no_reference_pass(tiny, tmp_path, text_rows):
    record = probed(make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.0))
    assert seconds_by_stage(record)["reference_logprob"] == 0.0


def test_reuse_of_completions_needs_an_old_policy_pass_and_has_a_cycle(tiny, tmp_path, text_rows):
    trainer = make_trainer(
        tiny("qwen3"), text_rows, tmp_path, num_iterations=2, steps_per_generation=4, max_steps=8, beta=0.0
    )
    record = probed(trainer)
    assert record.timings.cycle == 4
    policy = next(row for row in record.timings.stages if row.name == "policy_logprob")
    generation = next(row for row in record.timings.stages if row.name == "generation")
    assert sum(policy.parts["old_policy"]) > 0
    assert [seconds > 0 for seconds in generation.per_step_s] == [True, False, False, False]
    assert all(seconds > 0 for seconds in policy.parts["training_forward"])


def test_several_rewards_sync_and_async_are_named(tiny, tmp_path, text_rows):
    def slow(completions, **kwargs):
        time.sleep(0.05)
        return [0.5] * len(completions)

    trainer = make_trainer(tiny("llama"), text_rows, tmp_path, rewards=[slow, async_reward, spread_reward])
    record = probed(trainer)
    found = {row.name: row for row in record.rewards}
    assert set(found) == {"slow", "async_reward", "spread_reward"}
    assert found["async_reward"].is_async and not found["slow"].is_async
    assert record.rewards[0].name == "slow" and record.rewards[0].mean_s >= 0.05
    assert seconds_by_stage(record)["reward"] >= 2 * 0.05


def test_a_reward_model_is_the_rewards_time(tiny, tmp_path, text_rows):
    from transformers import AutoModelForSequenceClassification

    path = tiny("qwen3")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    model.config._name_or_path = str(path)
    trainer = make_trainer(path, text_rows, tmp_path, rewards=[model, spread_reward])
    record = probed(trainer)
    assert len(record.rewards) == 2 and all(row.calls == 3 for row in record.rewards)
    assert "forward" not in vars(model)


def test_evaluation_is_accounted_apart(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4)
    record = probed(trainer)
    rows = {row.name: row for row in record.timings.stages}
    assert [seconds > 0 for seconds in rows["log_save_eval"].parts["evaluate"]] == [True, False, True]
    assert record.tokens is not None and record.tokens.groups == 2 * 3
    without = probed(make_trainer(tiny("qwen3"), text_rows, tmp_path / "without", max_steps=4))
    assert rows["generation"].calls == {row.name: row for row in without.timings.stages}["generation"].calls


def test_losses_are_the_same_to_the_last_digit(tiny, tmp_path, picture_rows):
    def train(with_probe: bool) -> list[float]:
        trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, beta=0.05, max_steps=4)
        probe = Probe(trainer) if with_probe else None
        trainer.train()
        assert probe is None or probe.record().timings.step_s
        return losses(trainer)

    with_probe = train(True)
    assert with_probe == train(False)
    assert any(loss != 0.0 for loss in with_probe)


def everything_patched(trainer):
    owners = [trainer, trainer.accelerator, trainer.model, trainer.processing_class, grpo_module]
    found = [dict(vars(owner)) for owner in owners]
    types = [type(trainer.processing_class), type(getattr(trainer.processing_class, "image_processor", None))]
    return found, types, list(trainer.reward_funcs), list(trainer.callback_handler.callbacks)


def test_detach_leaves_nothing_behind(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen2_5_vl"), picture_rows, tmp_path)
    before = everything_patched(trainer)
    first, second = Probe(trainer), Probe(trainer)
    assert everything_patched(trainer) != before
    first.detach()
    second.detach()
    assert everything_patched(trainer) == before


def test_a_probe_may_come_and_go_during_training(tiny, tmp_path, text_rows):
    from transformers import TrainerCallback

    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=6)
    probes: list[Probe] = []

    class ComeAndGo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                probes.append(Probe(trainer, warmup=0))
            if state.global_step == 5:
                probes[0].detach()

    trainer.add_callback(ComeAndGo())
    trainer.train()
    assert probes[0].record().timings.steps == [3, 4]


def test_sleep_outside_every_seam_lands_in_other(tiny, tmp_path, text_rows):
    from transformers import TrainerCallback

    class Sleep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.05)

    def other(sleeps: bool) -> float:
        trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
        if sleeps:
            trainer.add_callback(Sleep())
        timings = probed(trainer).timings
        return min(next(row for row in timings.stages if row.name == "other").per_step_s)

    assert other(True) - other(False) == pytest.approx(0.05, abs=0.02)


def test_attach_refuses_what_is_no_grpo_trainer():
    from grpo_autotune import attach

    with pytest.raises(ConfigError, match="GRPOTrainer"):
        attach(object())


def test_a_report_in_mid_run_changes_nothing(tiny, tmp_path, text_rows, monkeypatch):
    from transformers import TrainerCallback

    from grpo_autotune import attach

    monkeypatch.setenv("GRPO_AUTOTUNE_CACHE", str(tmp_path / "cache"))

    def train(ask: bool) -> list[float]:
        trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.05, max_steps=4)
        probe = attach(trainer)

        class Ask(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2 and ask:
                    assert "generation" in str(probe.report())

        trainer.add_callback(Ask())
        trainer.train()
        return losses(trainer)

    assert train(True) == train(False)


def test_a_training_that_was_interrupted_and_a_cell_run_twice_leave_a_right_report(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=4)

    class CtrlC(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:  # the third step has generated
                raise KeyboardInterrupt

    ctrl_c, out, threads = CtrlC(), tmp_path / "probe", threading.active_count()
    trainer.add_callback(ctrl_c)
    first = attach(trainer, out_dir=out)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert threading.active_count() == threads, "a sampler goes on"
    live = Live.model_validate_json((out / LIVE_FILE).read_text())
    assert live.over and (live.step, live.of) == (2, 4) and len(live.step_s) == 2
    assert first.record().tokens.groups == 2, "one measured step"
    trainer.remove_callback(ctrl_c)
    trainer.train()
    record = first.record()
    assert record.timings.steps == [2, 3, 4, 5, 6]
    assert record.tokens is not None and record.tokens.groups == 2 * 5, "the step that did not end counts nowhere"
    again = attach(trainer, out_dir=out)
    trainer.train()
    assert first.record().timings.steps == record.timings.steps, "the probe of before is off"
    assert again.record().timings.steps == [2, 3, 4]
    assert [json.loads(line)["step"] for line in (out / "spans.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    again.detach()
    assert "train" not in vars(trainer)


def test_attaching_and_detaching_leaves_no_file_open(tiny, tmp_path, text_rows):
    from pathlib import Path

    def opened():
        links = (str(path.resolve()) for path in Path("/proc/self/fd").iterdir())
        return [link for link in links if link.startswith(str(tmp_path))]

    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    before = opened()
    (tmp_path / "probe").mkdir()
    for name in ("1", "-of-mine"):
        (tmp_path / "probe" / f"spans.rank{name}.jsonl").touch()
    for _ in range(5):
        Probe(trainer, out_dir=tmp_path / "probe").detach()
    kept = {path.name for path in (tmp_path / "probe").iterdir()}
    assert kept == {"spans.jsonl", "spans.rank-of-mine.jsonl"}, "of an earlier run with more ranks one is left"
    assert opened() == before


def test_a_trainer_that_is_let_go_is_freed_though_its_training_failed(tiny, tmp_path, picture_rows):
    """Rewards and processor go on to the next trainer; the first leaves neither a layer nor a thread."""
    gc.collect()
    pad, decode, threads = grpo_module.pad, Image.decode_example, set(threading.enumerate())
    rewards = [spread_reward, failing_reward]
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, rewards=rewards)
    attach(trainer, out_dir=tmp_path / "probe")
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.train()
    model, processor = weakref.ref(trainer.model), trainer.processing_class
    assert grpo_module.pad is not pad
    trainer.train_dataset = None
    del trainer
    gc.collect()
    assert model() is None
    assert grpo_module.pad is pad and Image.decode_example is decode
    assert {thread for thread in threading.enumerate() if thread.name == "grpo-autotune-sampler"} <= threads
    assert processor.tokenizer is not None and rewards[0](completions=[[{"content": "a"}]]) == [1 / 6]


def failing_reward(completions, **kwargs):
    raise RuntimeError("the judge is gone")


def test_completions_that_cannot_be_counted_end_no_training(tiny, tmp_path, text_rows, monkeypatch, capsys):
    monkeypatch.setattr(TokenCollector, "see_output", None)
    record = probed(make_trainer(tiny("qwen3"), text_rows, tmp_path))
    assert record.timings.steps == [2, 3] and record.tokens is None
    assert capsys.readouterr().err.count("completions are not looked at from here on: TypeError") == 1


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 3}}\n</tool_call><|im_end|>'
SLEEP_S = 0.05


def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    time.sleep(SLEEP_S)
    return str(a + b)


class Adding:
    """An environment with one tool."""

    def reset(self, **kwargs):
        time.sleep(SLEEP_S)

    def add(self, a: int, b: int) -> str:
        """Adds two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        return add(a, b)


@pytest.mark.parametrize("given", [{"tools": [add]}, {"environment_factory": Adding}], ids=["tools", "environment"])
def test_tools_and_environments_are_a_stage_of_their_own(tiny, tmp_path, text_rows, given, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen3"), padding_side="left")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    grpo = {
        "max_completion_length": 200,
        "max_tool_calling_iterations": 1,
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, processor=tokenizer, given=given, **grpo)
    call, generate = torch.tensor(tokenizer.encode(CALL, add_special_tokens=False)), trainer.model.generate

    def calls_the_tool(*args, **kwargs):
        if next(turns) % 2:
            return generate(*args, **kwargs)
        prompts = kwargs["input_ids"]
        return torch.cat([prompts, call.expand(len(prompts), -1)], dim=1)

    turns, trainer.model.generate = itertools.count(), calls_the_tool
    record = probed(trainer)
    (step_s,) = record.timings.step_s
    parts = next(row for row in record.timings.stages if row.name == "tools").parts
    assert parts["call"][0] >= 2 * SLEEP_S
    assert ("reset" in parts) is ("environment_factory" in given)
    assert parts.get("reset", [1.0])[0] >= 2 * SLEEP_S
    assert seconds_by_stage(record)["prompt"] < step_s - sum(map(sum, parts.values()))


def test_a_rollout_function_is_generation(tiny, tmp_path, text_rows, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts, trainer):
        time.sleep(SLEEP_S)
        ids = [[5, 6, 7]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": [[n + 5, 9] for n in range(len(prompts))], "logprobs": None}

    given = {"rollout_func": rollout}
    record = probed(make_trainer(tiny("qwen3"), text_rows, tmp_path, given=given, max_steps=2))
    assert next(row for row in record.timings.stages if row.name == "generation").parts["rollout"][0] >= SLEEP_S


def test_a_step_of_dead_groups_explains_its_zero_gradient():
    trainer = SimpleNamespace(
        args=SimpleNamespace(save_strategy="no", eval_strategy="no"), beta=0.0, mask_truncated_completions=True
    )
    watch = SignalWatch(trainer, 1, pytest.fail)
    for norm, cut, equal in ((0.0, False, False), (0.0, True, False), (0.0, False, True), (0.5, False, False)):
        watch.see(norm, 1.0, all_cut=cut, all_equal=equal)
    assert list(watch.zero) == [True, True, True, False] and list(watch.unexplained) == [True, False, False, False]


@pytest.mark.parametrize("cause", ["masked", "equal", ""])
def test_steps_without_a_learning_signal_are_told_and_counted(tiny, tmp_path, text_rows, cause):
    grpo = {"max_steps": 4, "beta": 0.0, "generation_kwargs": {"min_new_tokens": 6}}
    if cause == "masked":
        grpo["mask_truncated_completions"] = True
    rewards = [lambda completions, **kwargs: [1.0] * len(completions)] if cause == "equal" else [rising_reward]
    told: list[str] = []
    record = probed(make_trainer(tiny("qwen3"), text_rows, tmp_path, rewards=rewards, **grpo), say=told.append)
    assert [NO_SIGNAL[cause] in line and "the last 3 steps, " in line for line in told] == [True] * bool(cause)
    assert record.zero_gradients == (3 if cause else 0) and record.zero_unexplained == 0
    report = build_report(record)
    assert report.rates is not None and bool(report.rates.useless) is bool(cause)
    assert any("for nothing" in advice.text for advice in report.verdict) is bool(cause)
