"""RunConfig: every mistake is one line that names its key path; every legal configuration survives YAML."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.config.batch import COUNTS, batch_plan
from grpo_autotune.config.foreign_keys import CHOICES, grpo_keys, peft_keys
from grpo_autotune.config.schema import OWNED_ELSEWHERE, PEFT_FIXED, RunConfig, known_paths, load_config
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.config.sources import profile_names
from grpo_autotune.config.yaml_text import parse_yaml, write_yaml
from grpo_autotune.errors import ConfigError

Values = dict[str, Any]


def minimal(**sections: Any) -> Values:
    """The smallest legal configuration, sections put over it."""
    base: Values = {"model": {"name_or_path": "demo"}, "data": {"path": "digits"}, "rewards": [{"name": "exact_match"}]}
    return base | sections


def message(values: Values) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"modle": {}}, "modle: unknown key. Nearest known key: model."),
        ({"num_generations": 4}, "num_generations: unknown key. Nearest known key: grpo.num_generations."),
        ({"grpo": {"num_generation": 4}}, "grpo.num_generation: unknown key. Nearest known key: grpo.num_generations."),
        ({"grpo": {"lora_alpha": 4}}, "grpo.lora_alpha: unknown key. Nearest known key: peft.lora_alpha."),
        ({"peft": {"lora_dropuot": 0}}, "peft.lora_dropuot: unknown key. Nearest known key: peft.lora_dropout."),
        (
            {"vllm": {"max_model_length": 9}},
            "vllm.max_model_length: unknown key. Use vllm.max_model_len.",
        ),
        (
            {"rewards": [{"name": "x", "wieght": 1}]},
            "rewards[0].wieght: unknown key. Nearest known key: rewards.weight.",
        ),
        ({"grpo": {"output_dir": "x"}}, "grpo.output_dir: this key belongs to another section. Use output.dir."),
        ({"grpo": {"vllm_max_model_length": 9}}, "Use vllm.max_model_len."),
        ({"peft": {"peft_type": "LORA"}}, "peft.peft_type: PEFT fills this in itself."),
        ({"data": {}}, "data.path: this key is required and is missing"),
        ({"rewards": []}, "rewards: [] is not accepted. Accepted: at least 1 item."),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest(sections: Values, expected: str) -> None:
    assert expected in message(minimal(**sections))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"grpo": {"beta": "0.1"}}, "grpo.beta: '0.1' is not accepted. Accepted: a number."),
        ({"grpo": {"beta": True}}, "grpo.beta: true is not accepted. Accepted: a number."),
        ({"grpo": {"max_steps": 1.5}}, "grpo.max_steps: 1.5 is not accepted. Accepted: a whole number."),
        ({"grpo": {"use_vllm": "yes"}}, "grpo.use_vllm: 'yes' is not accepted. Accepted: true or false."),
        ({"grpo": {"save_strategy": False}}, "grpo.save_strategy: false is not accepted. Accepted: text."),
        ({"grpo": {"loss_type": "grpoo"}}, "grpo.loss_type: 'grpoo' is not accepted. Accepted: 'bnpo' or 'cispo' or"),
        ({"grpo": {"scale_rewards": "off"}}, "Accepted: 'batch' or 'group' or 'none' or true or false."),
        ({"peft": {"r": "8"}}, "peft.r: '8' is not accepted. Accepted: a whole number."),
        ({"peft": {"bias": "some"}}, "peft.bias: 'some' is not accepted. Accepted: 'all' or 'lora_only' or 'none'."),
        ({"model": {"name_or_path": "x", "dtype": "fp16"}}, "Accepted: 'auto', 'float32', 'bfloat16' or 'float16'."),
        (
            {"data": {"path": "x", "max_samples": "5"}},
            "data.max_samples: '5' is not accepted. Accepted: a whole number.",
        ),
        ({"data": {"path": "x", "image_size": 0}}, "data.image_size: 0 is not accepted. Accepted: at least 1."),
        ({"rewards": [{"name": "x", "weight": float("nan")}]}, "rewards[0].weight: nan is not accepted."),
        ({"vllm": {"gpu_memory_utilization": 30}}, "vllm.gpu_memory_utilization: 30 is not accepted."),
        ({"vllm": {"mode": "local"}}, "vllm.mode: 'local' is not accepted. Accepted: 'colocate' or 'server'."),
        ({"grpo": [1]}, "grpo: [1] is not accepted. Accepted: a mapping."),
    ],
)
def test_a_wrong_type_names_the_path_the_value_and_what_is_accepted(sections: Values, expected: str) -> None:
    assert expected in message(minimal(**sections))


@pytest.mark.parametrize(
    ("grpo", "expected"),
    [
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 3, "num_generations": 4},
            "must be a multiple of num_generations 4, and is 6 (per_device_train_batch_size 2 x world size 1 x "
            "steps_per_generation 3). Nearest legal: num_generations 3 or 6, or per_device_train_batch_size 4.",
        ),
        ({"generation_batch_size": 30}, "30 is not a multiple of per_device_train_batch_size 8 x world size 1 = 8. "
         "Nearest legal: 24 or 32."),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "each decides the other. Remove one of them."),
        ({"num_generations": 1}, "grpo.num_generations: must be at least 2, and is 1. Nearest legal: 2."),
        ({"gradient_accumulation_steps": 0}, "grpo.gradient_accumulation_steps: must be at least 1, and is 0."),
        ({"per_device_train_batch_size": 10**400}, "grpo.per_device_train_batch_size: must be at most 1048576."),
        ({"per_device_train_batch_size": 999_983, "gradient_accumulation_steps": 999_983}, "Nearest legal: per_d"),
    ],
)  # fmt: skip
def test_impossible_arithmetic_says_the_rule_and_the_nearest_legal_values(grpo: Values, expected: str) -> None:
    assert expected in message(minimal(grpo=grpo))


def test_the_evaluation_batch_holds_whole_groups_too() -> None:
    grpo = {"eval_strategy": "steps", "per_device_eval_batch_size": 3}
    assert "there is no held-out data" in message(minimal(grpo={"eval_strategy": "steps"}))
    text = message(minimal(grpo=grpo, data={"path": "digits", "eval_split": "test"}))
    assert "Nearest legal: num_generations_eval 3, or per_device_eval_batch_size 8." in text


def test_the_world_size_of_torchrun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    grpo = {"per_device_train_batch_size": 2, "num_generations": 4}
    assert "and is 2" in message(minimal(grpo=grpo))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert RunConfig.from_dict(minimal(grpo=grpo)).batch.generation_batch == 4
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert message(minimal(grpo=grpo)).startswith("WORLD_SIZE: 'two' is not a number of processes")


@settings(max_examples=200, deadline=None)
@given(micro=st.integers(1, 24), steps=st.integers(1, 12), group=st.integers(2, 40), evaluate=st.booleans())
def test_nearest_legal_values_are_legal(micro: int, steps: int, group: int, evaluate: bool) -> None:
    grpo: Values = {"num_generations": group, "eval_strategy": "steps" if evaluate else "no"}
    grpo |= {"per_device_train_batch_size": micro, "steps_per_generation": steps, "per_device_eval_batch_size": group}
    try:
        assert batch_plan(grpo).generation_batch == micro * steps
        assert micro * steps % group == 0
    except ConfigError as error:
        assert micro * steps % group and error.fix is not None
        for choice in error.fix.removeprefix("Nearest legal: ").rstrip(".").split(", or "):
            key, *values = choice.replace(" or ", " ").split()
            for value in values:
                changed = grpo | {key: int(value)}
                assert batch_plan(changed | {"per_device_eval_batch_size": changed["num_generations"]})


def test_keys_types_and_defaults_are_those_of_the_installed_classes() -> None:
    """The keys read from source text, against the classes themselves."""
    from dataclasses import MISSING, fields

    from peft import LoraConfig
    from trl import GRPOConfig

    for keys, cls in ((grpo_keys(), GRPOConfig), (peft_keys(), LoraConfig)):
        real = {field.name: field for field in fields(cls) if field.init}
        assert set(keys) == set(real)
        for name, key in keys.items():
            default = real[name].default
            if key.default is not None and default is not MISSING:
                assert key.default_value() == getattr(default, "value", default), name
                assert key.allows(key.default_value()), name


def test_choices_are_those_that_trls_step_compares_with() -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    step = (Path(spec.origin).parent / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    compared: dict[str, set[Any]] = {key: set() for key in CHOICES}
    for node in ast.walk(ast.parse(step)):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in CHOICES:
            texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            compared[node.left.attr] |= texts
    assert compared == {key: set(choices) for key, choices in CHOICES.items()}


def test_batch_arithmetic_agrees_with_trl() -> None:
    from trl import GRPOConfig

    legal = 0
    for micro in (1, 2, 3, 4):
        for extra in (
            {},
            {"steps_per_generation": 3},
            {"generation_batch_size": 12},
            {"gradient_accumulation_steps": 2},
        ):
            grpo = {"per_device_train_batch_size": micro, "num_generations": 2, **extra}
            try:
                plan = batch_plan(grpo)
            except ConfigError:
                with pytest.raises(ValueError, match="divisible"):
                    GRPOConfig(output_dir="x", use_cpu=True, bf16=False, **grpo)
                continue
            trl = GRPOConfig(output_dir="x", use_cpu=True, bf16=False, **grpo)
            assert (plan.generation_batch, plan.steps_per_generation) == (
                trl.generation_batch_size,
                trl.steps_per_generation,
            )
            legal += 1
    assert legal >= 8


def test_vllm_keys_become_existing_grpo_arguments() -> None:
    config = RunConfig.from_dict(
        minimal(vllm={"max_model_len": 512, "enable_sleep_mode": True}, grpo={"use_vllm": True})
    )
    assert config.vllm.grpo_kwargs() == {"vllm_max_model_length": 512, "vllm_enable_sleep_mode": True}
    assert set(VLLM_TO_TRL.values()) <= set(grpo_keys())
    assert set(OWNED_ELSEWHERE) <= set(grpo_keys()) and set(COUNTS) <= set(grpo_keys())
    assert set(PEFT_FIXED) <= set(peft_keys())
    assert "grpo.beta" in known_paths() and "grpo.output_dir" not in known_paths()


def test_engine_keys_pass_through_under_vllms_names() -> None:
    keys = {"max_num_seqs": 64, "kv_cache_dtype": "fp8", "block_size": 32, "limit_mm_per_prompt": {"image": 2}}
    config = RunConfig.from_dict(minimal(vllm={**keys, "gpu_memory_utilization": 0.4}, grpo={"use_vllm": True}))
    assert config.vllm.engine_kwargs() == keys
    assert config.vllm.grpo_kwargs() == {"vllm_gpu_memory_utilization": 0.4}
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert config != RunConfig.from_dict(minimal(vllm={"max_num_seqs": 64}, grpo={"use_vllm": True}))


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        ({"max_num_seq": 4}, r"^vllm.max_num_seq: unknown key. Nearest known key: vllm.max_num_seqs."),
        ({"enable_prefix_cashing": True}, r"Nearest known key: vllm.enable_prefix_caching."),
        ({"block_sizes": 16}, r"Nearest known key: vllm.block_size."),
        ({"model": "x"}, r"^vllm.model: this engine key is set elsewhere. Use model.name_or_path."),
        ({"max_num_seqs": 0}, r"^vllm.max_num_seqs: 0 is not accepted"),
        ({"sleep_level": 3}, r"^vllm.sleep_level: 3 is not accepted"),
        ({"weight_sync": "lora"}, r"^vllm.weight_sync: 'lora' is not accepted"),
        ({"sleep_level": 1, "enable_sleep_mode": False}, r"^vllm.sleep_level: the level is 1, and"),
    ],
)
def test_engine_keys_are_judged(vllm: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(minimal(vllm=vllm, grpo={"use_vllm": True}))


def test_a_sleep_level_is_trls_sleep_mode() -> None:
    config = RunConfig.from_dict(minimal(vllm={"sleep_level": 1}, grpo={"use_vllm": True}))
    assert config.vllm.grpo_kwargs() == {"vllm_enable_sleep_mode": True}


LOOKALIKES = ["1e-6", "no", "yes", "010", "2024-01-01", "1:30", "~", "", ".inf", "0x1", "1_000", "=", "<<", "NULL"]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(LOOKALIKES)
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(min_size=1), scalars))
def test_yaml_text_gives_back_every_value_with_its_type(values: dict[str, Any]) -> None:
    again = parse_yaml(write_yaml(values), "text")
    assert again == values
    assert {key: type(value) for key, value in again.items()} == {key: type(value) for key, value in values.items()}


def test_yaml_reads_what_people_write() -> None:
    text = "a: 1e-6\nb: no\nc: 010\nd: 2024-01-01\ne:\nf: .5\ng: -3\nh: off\ni: true"
    wanted = {"a": 1e-6, "b": "no", "c": "010", "d": "2024-01-01", "e": None, "f": 0.5, "g": -3, "h": "off", "i": True}
    assert parse_yaml(text, "text") == wanted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "f.yaml, line 2, column 1: cannot read this YAML: the key a is given twice"),
        ("a: [1", "f.yaml, line 1"),
        ("\tb: 1", "f.yaml, line 1"),
    ],
)
def test_broken_yaml_names_file_and_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match="cannot read this YAML") as caught:
        parse_yaml(text, "f.yaml")
    assert expected in str(caught.value)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {"seed": st.integers(0, 99)},
        optional={
            "learning_rate": st.floats(1e-9, 1.0),
            "beta": st.sampled_from([0, 0.04, 1e-3]),
            "save_strategy": st.sampled_from(["no", "steps"]),
            "max_steps": st.integers(1, 10**9),
        },
    ),
    st.text(min_size=1),
)
def test_a_configuration_survives_yaml_and_json(grpo: Values, template: str) -> None:
    values = minimal(grpo=grpo, data={"path": "digits", "prompt_template": template}, peft={"r": 4})
    config = RunConfig.from_dict(values)
    assert RunConfig.from_yaml(config.to_yaml()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert config.to_dict() == {**values, "speedups": "auto"}


def test_a_configuration_is_frozen() -> None:
    config = RunConfig.from_dict(minimal())
    with pytest.raises(ValueError, match="frozen"):
        config.peft = {}  # type: ignore[misc]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_overrides_reach_everywhere_and_the_last_wins(here: Path) -> None:
    (here / "mine.yaml").write_text(write_yaml(minimal()))
    config = load_config(
        "mine.yaml", ["grpo.beta=0.1", "grpo.beta=0.2", "rewards.0.weight=2.5", "peft.r=4", "data.split=train[:50%]"]
    )
    assert (config.grpo, config.peft, config.rewards[0].weight) == ({"beta": 0.2}, {"r": 4}, 2.5)
    assert (config.data.split, config.output.name, str(config.run_dir)) == ("train[:50%]", "mine", "runs/mine")
    assert load_config(here / "mine.yaml", ["output.dir=out"]).run_dir == Path("out")
    assert load_config("mine.yaml", ["output.name=other"]).run_dir == Path("runs/other")
    swapped = load_config("mine.yaml", ["model.name_or_path=null", "model.random_init=qwen3-0.6b"])
    assert swapped.model.random_init == "qwen3-0.6b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.beta", "'grpo.beta' is not of the form section.key=value. Example: --set grpo.beta=0.02."),
        ("grpo.betta=1", "grpo.betta: unknown key. Nearest known key: grpo.beta."),
        ("rewards.3.weight=1", "the list rewards has 1 items"),
        ("data.path.x=1", "data.path holds 'digits', which has no keys"),
        ("grpo.beta=[", "--set grpo.beta, line 1"),
        ("model.random_init=qwen3-0.6b", "give exactly one of model.name_or_path and model.random_init"),
        ("model.load_in_4bit=true", "model.load_in_4bit: weights in 4 bits cannot be trained without an adapter"),
    ],
)
def test_a_wrong_override_is_one_line(here: Path, override: str, expected: str) -> None:
    (here / "grpo.yaml").write_text(write_yaml(minimal()))
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nothing-like-it", "there is neither a file nor a shipped profile of this name. Profiles: "),
        ("qwen3-1.7b-gsm8k", "Nearest: qwen3-1.7b-gsm8k-1gpu."),
        ("absent.yaml", "absent.yaml: there is no such file"),
        ("folder", "folder: this is a folder. Name the YAML file in it."),
        ("list.yaml", "list.yaml: a configuration is a mapping of sections"),
        ("binary.yaml", "binary.yaml: cannot read this file"),
    ],
)
def test_a_source_that_cannot_be_used(here: Path, source: str, expected: str) -> None:
    (here / "folder").mkdir()
    (here / "list.yaml").write_text("- a")
    (here / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert expected in str(caught.value)


@pytest.mark.slow
def test_reading_a_configuration_loads_no_heavy_library() -> None:
    code = (
        "import sys; from grpo_autotune.config.schema import load_config; load_config('qwen3-1.7b-gsm8k-1gpu');"
        "print([m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_committed_reference_page_is_up_to_date() -> None:
    from tools.config_reference import markdown

    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == markdown(), "python -m tools.config_reference > docs/configuration.md"


def test_the_reference_example_is_legal_and_every_key_has_a_meaning() -> None:
    from tools.config_reference import markdown

    page = markdown()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    assert RunConfig.from_yaml(example).batch.generation_batch == 8
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 40 and all(row[-1].strip(" |") not in {"", "None"} for row in rows)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grpo": {"eval_on_start": True}}, "grpo.eval_on_start: evaluation is on"),
        ({"vllm": {"max_model_len": 64}}, "vllm: the vllm section has keys"),
        ({"data": {"path": "rows.jsonl", "max_eval_samples": 3}}, "data.max_eval_samples"),
        ({"grpo": {"logging_nan_inf_filter": True}}, "grpo.logging_nan_inf_filter"),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        RunConfig.from_dict(minimal(**changes))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"eval": "test"}, "data.eval: "),
        ({"eval": ["a.jsonl"]}, "data.eval: "),
        ({"eval": {"a": "test"}}, "data.eval.a: "),
        ({"eval": {"a": {}}}, "data.eval.a: a set needs a name, and a path or a split"),
        ({"eval": {"a": {"splits": "test"}}}, "data.eval.a.splits: unknown key"),
        ({"eval": {"a": {"split": "test"}}, "eval_split": "test"}, "data.eval: it takes the place of data.eval_path"),
    ],
)
def test_held_out_sets_of_another_shape(data: dict[str, Any], told: str) -> None:
    text = message(minimal(data={"path": "digits", **data}))
    assert text.startswith(told) and len(text) < 400
    whole = RunConfig.from_dict(minimal(data={"path": "digits", "eval": {"a": {"split": "test"}}}))
    assert RunConfig.from_yaml(whole.to_yaml()) == whole


def test_a_key_of_a_mapping_is_a_plain_word() -> None:
    with pytest.raises(ConfigError, match="plain word"):
        parse_yaml("{[a]: 1}", "--set")


def test_speed_ups_are_on_unless_a_configuration_says_otherwise() -> None:
    base: Values = {"model": {"name_or_path": "demo"}, "data": {"path": "digits"}, "rewards": [{"name": "exact_match"}]}
    assert RunConfig.from_dict(base).speedups == "auto"
    assert RunConfig.from_dict(base).to_dict()["speedups"] == "auto", "a stored run says what it had"
    assert load_config("demo").speedups == "none"
    for profile in set(profile_names()) - {"demo"}:
        assert load_config(profile).speedups == "auto"


@pytest.mark.parametrize(
    "value", ["auto", "none", ["skip_dead"], [{"name": "shared_prefix", "form": "flex"}, "images_once"], []]
)
def test_speed_ups_survive_a_trip(value: Any) -> None:
    config = load_config("demo", [f"speedups={json.dumps(value)}"])
    assert config.speedups == value
    assert RunConfig.from_yaml(config.to_yaml()) == config and RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("value", ["fast", 3, {"name": "shared_prefix"}, [3], [{"form": "flex"}], [{"name": 1}]])
def test_speed_ups_of_another_shape_are_one_line(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"speedups={json.dumps(value)}"])
    assert str(caught.value).startswith(
        f"speedups: {value!r} is not accepted. Accepted: auto, none, or a list of names"
    )


@pytest.mark.parametrize(
    ("section", "grpo", "line"),
    [
        ({"choose": "kl"}, {}, "checkpoints.choose: no KL is measured with grpo.beta 0. Set grpo.beta above 0."),
        ({"choose": "reward"}, {"eval_strategy": "no"}, "checkpoints.choose: nothing is evaluated, so nothing can be"),
        (
            {"choose": "reward"},
            {"metric_for_best_model": "loss"},
            "checkpoints.choose: grpo.metric_for_best_model choo",
        ),
        (
            {"choose": "reward"},
            {"load_best_model_at_end": True},
            "checkpoints.choose: grpo.load_best_model_at_end choo",
        ),
        (
            {"choose": "reward"},
            {"save_strategy": "best"},
            "checkpoints.choose: grpo.save_strategy best chooses already",
        ),
        ({"kl_band": [0.2, 0.1]}, {}, "checkpoints.kl_band: low and high, 0 or more, low first"),
        ({"mode": "lowest"}, {}, "checkpoints.mode"),
        ({"chose": "reward"}, {}, "checkpoints.chose: unknown key. Nearest known key: checkpoints.choose."),
    ],
)
def test_a_choice_of_checkpoints_that_cannot_be(section: Any, grpo: dict[str, Any], line: str) -> None:
    values = {
        "model": {"name_or_path": "m"},
        "data": {"path": "d", "eval_split": "test"},
        "rewards": [{"name": "format"}],
        "grpo": {"eval_strategy": "epoch", **grpo},
        "checkpoints": section,
    }
    with pytest.raises(ConfigError) as told:
        RunConfig.from_dict(values)
    assert str(told.value).startswith(line) and "\n" not in str(told.value)
