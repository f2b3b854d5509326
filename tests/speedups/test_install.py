"""How speed-ups come and go: names, refusals, the table, and group ids that survive TRL's shuffle and split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_autotune import registry
from grpo_autotune.commands.run import values_for_script
from grpo_autotune.errors import ConfigError
from grpo_autotune.scripts.stand_in import load_stand_in
from grpo_autotune.scripts.values import load_script_values
from grpo_autotune.seams.layers import INNER, wrap
from grpo_autotune.seams.table import find, slot_of
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.install import speed_up
from grpo_autotune.speedups.selection import Selection, chosen, load, selections
from tests.support.trainers import losses, make_trainer

from grpo_autotune.probe.probe import Probe  # isort: skip
import torch  # isort: skip


class Counting:
    """Counts calls of the loss, and changes nothing."""

    name, summary = "counting", "counts"
    seen: list[dict] = []

    def applies(self, trainer):
        return "not with beta (grpo.beta)" if trainer.beta else None

    def install(self, trainer):
        def count(call_next, model, inputs, *args, **kwargs):
            self.seen.append(inputs)
            return call_next(model, inputs, *args, **kwargs)

        return Installed(self.name, [wrap(slot_of(trainer, find("loss")), count, INNER)])


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(registry._TABLE, "speedup", {"counting": registry.Builtin(f"{__name__}:Counting")})
    monkeypatch.setattr(Counting, "seen", [])
    return Counting.seen


def test_table_tells_what_is_on_and_why_not(tiny, tmp_path, text_rows, counting):
    plain = make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.0)
    assert speed_up(plain).table() == [("counting", True, "counts")]
    with_beta = make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.1)
    found = speed_up(with_beta, ["counting"])
    assert found.table() == [("counting", False, "not with beta (grpo.beta)")]
    assert found.lines() == ["speed-up counting  off  not with beta (grpo.beta)"]
    found.remove()
    assert speed_up(with_beta, "none").table() == [("counting", False, "not asked for")]


def test_unknown_names_list_the_known(tiny, tmp_path, text_rows, counting):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    with pytest.raises(ConfigError, match=r"no speed-up 'countng'.* Accepted: auto, none, or a list of: counting"):
        speed_up(trainer, ["countng"])
    speed_up(trainer, "counting")


def test_a_third_party_speed_up_is_taken_by_reference(tiny, tmp_path, text_rows, monkeypatch):
    monkeypatch.setitem(registry._TABLE, "speedup", {})
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    found = speed_up(trainer, [f"{__name__}:Counting"])
    assert found.table() == [(f"{__name__}:Counting", True, "counts")]


def test_refusals_are_one_line(tiny, tmp_path, text_rows, counting):
    with pytest.raises(ConfigError, match=r"takes a trl\.GRPOTrainer, got object"):
        speed_up(object())
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=1)
    found = speed_up(trainer)
    with pytest.raises(ConfigError, match="before"):
        speed_up(trainer)
    trainer.train()
    found.remove()
    with pytest.raises(ConfigError, match="after training began"):
        speed_up(trainer)


def test_remove_leaves_the_trainer_as_it_was(tiny, tmp_path, text_rows, counting):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    before = dict(vars(trainer))
    found = speed_up(trainer)
    assert vars(trainer) != before
    found.remove()
    found.remove()
    assert vars(trainer) == before


@pytest.mark.parametrize("probe_first", [True, False])
def test_probe_and_speed_ups_come_and_go_in_any_order(tiny, tmp_path, text_rows, counting, probe_first):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, max_steps=2)
    probe = Probe(trainer) if probe_first else None
    found = speed_up(trainer)
    probe = probe or Probe(trainer)
    trainer.train()
    assert len(counting) == 4
    assert all(row.per_step_s for row in probe.record().timings.stages if row.name == "backward")
    (found.remove if probe_first else probe.detach)()
    (probe.detach if probe_first else found.remove)()
    left = [name for name in vars(trainer) if callable(getattr(type(trainer), name, None))]
    assert not left, "a method still lies on the instance"


def test_group_ids_survive_shuffle_and_split(tiny, tmp_path, text_rows, counting):
    trainer = make_trainer(
        tiny("qwen3"), text_rows, tmp_path, num_generations=2, gradient_accumulation_steps=4, max_steps=3, beta=0.0
    )
    speed_up(trainer)
    trainer.train()
    for begin in range(0, len(counting), 4):
        rows = [
            (int(group), prompt.tolist())
            for batch in counting[begin : begin + 4]
            for group, prompt in zip(batch["group_id"], batch["prompt_ids"], strict=True)
        ]
        by_group = {group: [prompt for other, prompt in rows if other == group] for group, _ in rows}
        assert sorted(by_group) == [0, 1, 2, 3]
        assert all(len(prompts) == 2 and prompts[0] == prompts[1] for prompts in by_group.values())
        assert len({tuple(prompts[0]) for prompts in by_group.values()}) == 4
    shuffled = [batch["group_id"].tolist() for batch in counting]
    assert any(groups[0] != groups[1] for groups in shuffled), "TRL's shuffle did not move anything"


def test_nothing_is_learned_differently(tiny, tmp_path, text_rows, counting):
    def train(fast: bool) -> list[float]:
        trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.0, max_steps=3)
        if fast:
            speed_up(trainer)
        trainer.train()
        return losses(trainer)

    assert train(True) == train(False)
    assert counting


def test_a_speed_up_that_fell_back_says_so(tiny, tmp_path, text_rows, counting, caplog):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, beta=0.0)
    found = speed_up(trainer)
    found._installed["counting"].fall_back("its self-check failed")
    found._installed["counting"].fall_back("again")
    assert found.table() == [("counting", False, "its self-check failed")]
    assert [record.getMessage() for record in caplog.records].count(
        "speed-up counting is off from here on, training goes on without it: its self-check failed"
    ) == 1


def test_self_check_compares_once(caplog):
    from grpo_autotune.speedups.selfcheck import SelfCheck

    wanted = torch.tensor([[-1.0, -2.0]])
    good, installed = SelfCheck(Installed("good")), Installed("bad")
    assert good.run(lambda: wanted, lambda: wanted + 1e-6, torch.float32, "log-probs")
    assert good.run(lambda: wanted, lambda: wanted + 1, torch.float32, "log-probs"), "only the first use is checked"
    bad = SelfCheck(installed)
    assert not bad.run(lambda: wanted, lambda: wanted + 0.01, torch.float32, "log-probs")
    assert installed.fell_back is not None and "off by" in installed.fell_back
    assert SelfCheck(Installed("coarse")).run(lambda: wanted, lambda: wanted + 0.01, torch.bfloat16, "log-probs")

    def unknown() -> torch.Tensor:
        raise TypeError("forward() got an unexpected keyword argument 'shared_prefix'\nmore")

    broken = Installed("broken")
    assert not SelfCheck(broken).run(lambda: wanted, unknown, torch.float32, "log-probs")
    assert broken.fell_back is not None and broken.fell_back.endswith("'shared_prefix'")


@pytest.mark.parametrize(
    ("rounding", "off", "passes"),
    [
        (0.0, 9e-4, True),
        (0.0, 2e-3, False),
        (1e-3, 2e-3, True),
        (1e-3, 4e-3, False),
        (3e-2, 6e-2, True),
        (9e-1, 1e-1, False),
    ],
)
def test_a_difference_is_measured_by_the_rounding_of_plain_values(rounding, off, passes):
    """In bfloat16: 2e-3 is a wrong position in a model of few layers, and 6e-2 right in one of many; plain values that
    are 0.9 apart are no rounding, but noise, or a mask that nobody reads."""
    from grpo_autotune.speedups.selfcheck import SelfCheck

    wanted, installed = torch.tensor([[-0.5, 0.5]]), Installed("any")
    check = SelfCheck(installed)
    found = check.run(
        lambda: wanted, lambda: wanted + off, torch.bfloat16, "log-probs", again=lambda: wanted + rounding
    )
    assert found == passes and (installed.fell_back is None) == passes


def test_a_configuration_names_its_speed_ups(tiny, tmp_path, counting):
    from grpo_autotune.train.trainer import build_trainer
    from tests.support.training import text_config

    config = text_config(tiny("qwen3"), tmp_path, {"speedups": ["counting"]}, max_steps=1, beta=0.0)
    said: list[str] = []
    build_trainer(config, say=said.append).train()
    assert "speed-up counting  on   counts" in said and counting
    assert config.from_yaml(config.to_yaml()) == config
    with pytest.raises(ConfigError, match="speedups: 'fast' is not accepted"):
        text_config(tiny("qwen3"), tmp_path, {"speedups": "fast"})
    with pytest.raises(ConfigError, match="speedups: there is no speed-up 'fast'"):
        build_trainer(text_config(tiny("qwen3"), tmp_path, {"speedups": ["fast"]}), say=said.append)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("none", []),
        ("skip_dead", ["skip_dead"]),
        (["skip_dead", "a.b:C", "shared_prefix", "skip_dead"], ["shared_prefix", "skip_dead", "a.b:C"]),
        ([{"name": "shared_prefix", "form": "flex"}], ["shared_prefix"]),
    ],
)
def test_what_the_key_stands_for(wanted, names):
    assert chosen(wanted) == names


def test_auto_is_all_in_the_order_of_installation_without_options():
    assert selections("auto") == [Selection(name) for name in registry.names("speedup")]
    assert registry.names("speedup")[0] == "shared_prefix" and registry.names("speedup")[-1] == "reward_overlap"
    for selection in selections("auto"):
        assert load(selection).name == selection.name


def test_auto_in_a_list_is_all_others():
    asked = Selection("shared_prefix", {"form": "flex"})
    wanted = selections(["auto", {"name": "shared_prefix", "form": "flex"}])
    assert wanted == [asked, *(Selection(name) for name in registry.names("speedup") if name != "shared_prefix")]
    assert selections(["a.b:C", "auto"]) == [*selections("auto"), Selection("a.b:C")]
    assert selections(["auto"]) == selections("auto")


def test_a_registered_speed_up_comes_after_those_of_the_package(monkeypatch):
    monkeypatch.setitem(registry._TABLE, "speedup", dict(registry._TABLE["speedup"]))
    registry.register("speedup", "counting")(Counting)
    assert chosen("auto")[-2:] == ["reward_overlap", "counting"]
    assert isinstance(load(Selection("counting")), Counting)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([{"name": "shared_prefx"}], "speedups: there is no speed-up 'shared_prefx'. Accepted: auto, none, or a list"),
        ([{"form": "flex"}], "speedups: there is no speed-up None. Accepted: auto, none, or a list of: shared_prefix"),
        (
            [{"name": "shared_prefix", "from": "flex"}],
            "speedups: shared_prefix has no option 'from'. Accepted: form, dropout.",
        ),
        (
            [{"name": "shared_prefix", "form": "flax"}],
            "speedups: form 'flax' of shared_prefix is not accepted. Accepted: auto, split, flex, cascade.",
        ),
        ([{"name": "skip_dead", "form": "flex"}], "speedups: skip_dead has no option 'form'. It has none."),
        (
            ["shared_prefix", {"name": "shared_prefix", "form": "flex"}],
            "speedups: shared_prefix is given twice with different options. Remove one of the two.",
        ),
    ],
)
def test_a_wrong_option_is_one_line_with_the_accepted_values(wanted, message):
    with pytest.raises(ConfigError) as caught:
        selections(wanted)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("auto", "auto"),
        ("skip_dead,length_sort", ["skip_dead", "length_sort"]),
        ("[{name: shared_prefix, form: flex}, skip_dead]", [{"name": "shared_prefix", "form": "flex"}, "skip_dead"]),
    ],
)
def test_run_reads_names_and_lists_in_yaml(text, value):
    assert values_for_script(None, text)[0].speedups == value


def test_a_script_file_and_its_baseline(tmp_path):
    with pytest.raises(ConfigError, match="form 'flax' of shared_prefix is not accepted"):
        values_for_script(None, "[{name: shared_prefix, form: flax}]")
    path = tmp_path / "values.yaml"
    path.write_text("speedups: [{name: shared_prefix, form: flex}]\n")
    assert load_script_values(path)[0]["speedups"] == [{"name": "shared_prefix", "form": "flex"}]
    assert load_stand_in([__file__]).speedups == "none", "a script has none of its own"


@pytest.mark.timeout(240)
def test_run_puts_speed_ups_on_an_unedited_script(tiny, tmp_path):
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "grpo_autotune", "run", *map(str, words)]
        environment = {**os.environ, "OUTPUT_DIR": str(tmp_path / "model"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    script = Path(__file__).parents[1] / "scripts" / "train_grpo.py"
    done = run("--speedups", "shared_prefix,length_sort", "--out", "report", script, tiny("qwen3"), "2")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[1]: line.split()[2] for line in done.stderr.splitlines() if line.startswith("speed-up ")}
    assert lines["shared_prefix"] == "on" and lines["skip_dead"] == "off"
    assert (tmp_path / "report" / "report.json").exists()
    wrong = run("--speedups", "shared_prefx", script, tiny("qwen3"), "2")
    assert wrong.returncode == ConfigError.exit_code
    assert "there is no speed-up 'shared_prefx'" in wrong.stderr and "Traceback" not in wrong.stderr
