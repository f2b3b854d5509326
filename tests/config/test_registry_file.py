"""Names for data sets: a configuration holds what they stand for, and a broken entry is named with its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.registry_file import named_section
from grpo_autotune.config.schema import RunConfig, load_config
from grpo_autotune.config.sections.data import DataSection
from grpo_autotune.config.yaml_text import write_yaml
from grpo_autotune.errors import ConfigError

ENTRIES: dict[str, Any] = {
    "gsm": {"path": "files/gsm.jsonl", "columns": {"prompt": "question"}, "split_ratio": 0.1, "system_prompt": "Add."},
    "verl": {"path": "files/verl.parquet", "columns": {"answer": "reward_model.ground_truth"}, "eval_path": "files/t"},
    "both": {"mix": {"gsm": 0.7, "digits": 3}, "system_prompt": "Count.", "image_size": 64},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside which two data files lie, entered by nobody; the current folder is another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "files").mkdir()
    for name in ("gsm.jsonl", "verl.parquet", "t"):
        (tmp_path / "files" / name).write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def loaded(folder: Path, data: dict[str, Any], entries: Any = None, *overrides: str) -> RunConfig:
    registry = folder / "datasets.yaml"
    registry.write_text(entries if isinstance(entries, str) else write_yaml(ENTRIES if entries is None else entries))
    values = {"model": {"name_or_path": "demo"}, "rewards": [{"name": "exact_match"}], "data": data}
    (folder / "run.yaml").write_text(write_yaml(values))
    return load_config(folder / "run.yaml", overrides)


def problem(folder: Path, data: dict[str, Any], entries: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, data, entries)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_name_stands_for_its_entry_and_the_sections_own_keys_win(folder: Path) -> None:
    columns = {"prompt": "question", "answer": "gold"}
    data = loaded(folder, {"path": "gsm", "columns": {"answer": "gold"}, "system_prompt": None}).data
    assert (data.path, data.columns, data.system_prompt) == (str(folder / "files/gsm.jsonl"), columns, None)
    assert data.split_ratio == 0.1 and data.registry is None


def test_held_out_data_of_the_section_takes_the_place_of_the_entrys(folder: Path) -> None:
    assert loaded(folder, {"path": "verl", "split_ratio": 0.2}).data.eval_path is None
    again = loaded(folder, {"path": "verl", "eval_split": "train[:3]"}).data
    assert (again.eval_path, again.eval_split) == (str(folder / "files/t"), "train[:3]")
    assert loaded(folder, {"path": "gsm", "eval_path": "rows.jsonl"}).data.split_ratio is None
    named = loaded(folder, {"path": "digits", "eval": {"far": {"path": "gsm"}}}).data.eval["far"]
    assert (named.path, named.split) == (str(folder / "files/gsm.jsonl"), "train")


def test_a_mixture_has_the_keys_of_its_data_sets_and_those_for_all_win(folder: Path) -> None:
    data = loaded(folder, {"path": "both", "prompt_format": "text", "max_samples": 9}).data
    assert {name: (part.weight, part.path) for name, part in data.mix.items()} == {
        "gsm": (0.7, str(folder / "files/gsm.jsonl")),
        "digits": (3, "digits"),
    }
    assert {part.system_prompt for part in data.mix.values()} == {"Count."}
    assert {part.prompt_format for part in data.mix.values()} == {"text"}
    assert (data.path, data.image_size, data.max_samples, data.system_prompt) == ("both", 64, 9, None)
    assert list(data.held_out) == [""] and data.mix["gsm"].split_ratio == 0.1
    inline = loaded(folder, {"mix": {"gsm": 1, "x": {"weight": 2, "path": "verl", "split": "all"}}}).data
    assert loaded(folder, {"path": "7"}, {7: {"path": "digits"}}).data.path == "digits"
    assert inline.path == "gsm + x" and inline.mix["x"].split == "all" and inline.mix["x"].columns


@pytest.mark.parametrize("name", ["gsm", "verl", "both"])
def test_a_stored_configuration_needs_no_registry(folder: Path, name: str) -> None:
    config = loaded(folder, {"path": name})
    (folder / "datasets.yaml").unlink()
    (folder / "config.yaml").write_text(config.to_yaml())
    assert load_config(folder / "config.yaml").data == config.data
    other = {name: {"path": "other.jsonl", "system_prompt": "Other."} for name in ENTRIES}
    (folder / "datasets.yaml").write_text(write_yaml(other))
    assert load_config(folder / "config.yaml").data == config.data


def test_a_folder_of_the_entrys_own_name_is_read_once_more_as_it_is(folder: Path) -> None:
    (folder / "here" / "gsm").mkdir()
    (folder / "here" / "datasets.yaml").write_text(write_yaml({"gsm": {"path": "gsm"}}))
    values = {"model": {"name_or_path": "demo"}, "rewards": [{"name": "format"}], "data": {"path": "gsm"}}
    Path("run.yaml").write_text(write_yaml(values))
    config = load_config("run.yaml")
    assert config.data.path == "./gsm"
    Path("run.yaml").write_text(config.to_yaml())
    assert load_config("run.yaml").data == config.data


@pytest.mark.parametrize(
    ("data", "entries", "expected"),
    [
        ({"path": "gms"}, None, "data.path: there is no data set gms. Nearest: gsm."),
        ({"path": "zzz", "registry": "../datasets.yaml"}, None, "zzz. Data sets of ../datasets.yaml: gsm, verl, both"),
        ({"path": "gsm", "registry": "no.yaml"}, None, "data.registry: there is no file no.yaml."),
        ({"path": "gsm", "registry": 3}, None, "data.registry: there is no file 3."),
        ({"path": "gsm"}, "a: [", "datasets.yaml, line 1, column 5: cannot read this YAML: "),
        ({"path": "gsm"}, "- a", "datasets.yaml: it is no mapping of names to data sets."),
        ({"path": "gsm"}, {"gsm": "x.jsonl"}, "datasets.yaml: gsm: a data set is a mapping, not 'x.jsonl'."),
        ({"path": "gsm"}, {"gsm": {"columns": {}}}, "datasets.yaml: gsm.path: this key is required and is missing"),
        ({"path": "gsm"}, {"gsm": {"path": "a", "colums": {}}}, "datasets.yaml: gsm.colums: unknown key. Nearest "),
        ({"path": "gsm"}, {"gsm": {"path": "a", "columns": {"prompt": 3}}}, "datasets.yaml: gsm.columns.prompt: 3 is "),
        ({"path": "gsm"}, {"gsm": {"path": "a", "eval": {"x": {}}}}, "datasets.yaml: gsm.eval.x: a set needs "),
        ({"path": "digits"}, {"digits": {"path": "a"}}, "datasets.yaml: digits: a registered data set has this name."),
        ({"path": "m"}, {"m": {"mix": {}}}, "datasets.yaml: m.mix: the mixture is empty."),
        ({"path": "m"}, {"m": {"mix": {"digits": "many"}}}, "datasets.yaml: m.mix.digits: 'many' is no weight."),
        ({"path": "m"}, {"m": {"mix": {"n": 1}}, "n": {"mix": {"digits": 1}}}, "m.mix.n: n is a mixture itself."),
        ({"mix": {"gms": 1}}, None, "data.mix.gms: there is no data set gms. Nearest: gsm."),
        ({"mix": {"gsm": -1}}, None, "data.mix.gsm.weight: -1 is not accepted. Accepted: a number above 0.0."),
        (
            {"mix": {"gsm": 1}, "eval": {"a": {"path": "digits"}}},
            None,
            "have this key, each its own. Write data.mix.gsm.eval_path.",
        ),
        ({"path": "both", "eval_path": "gsm"}, None, "have this key, each its own. Write data.mix.gsm.eval_path."),
        (
            {"mix": {"s": 1}},
            {"s": {"path": "a", "eval": {"x": {"path": "b"}}}},
            "data.mix.s.eval: the held-out rows of a ",
        ),
        ({"path": "gsm", "eval_path": "both"}, None, "data.eval_path: both is a mixture, which is not held out whole."),
        ({"path": "gsm", "eval": {"a": {"path": "both"}}}, None, "data.eval.a.path: both is a mixture, which is not "),
        ({"path": "gsm", "split_ratio": 1.0}, None, "data.split_ratio: 1.0 is not accepted. Accepted: a number below "),
        ({"path": "gsm", "subsample": 2.5}, None, "data.subsample: 2.5 is neither a number of rows nor a share"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(folder: Path, data: dict[str, Any], entries: Any, expected: str) -> None:
    assert expected in problem(folder, data, entries)


def test_a_mixture_that_no_registry_resolved_leaves_the_keys_of_rows_to_its_parts() -> None:
    mix = {"a": {"weight": 1, "path": "digits"}}
    values = {"model": {"name_or_path": "demo"}, "rewards": [{"name": "exact_match"}]}
    with pytest.raises(ConfigError, match=r"^data\.columns: the data sets .* its own\. Write data\.mix\.a\.columns\."):
        RunConfig.from_dict({**values, "data": {"path": "m", "mix": mix, "columns": {"prompt": "question"}}})
    config = RunConfig.from_dict({**values, "data": {"path": "m", "mix": mix}})
    assert RunConfig.from_yaml(config.to_yaml()) == config


def test_other_data_by_a_name_are_read_as_their_entry_says_and_else_as_the_run(folder: Path) -> None:
    entries = {**ENTRIES, "gsm": {**ENTRIES["gsm"], "path": "../files/gsm.jsonl"}, "plain": {"path": "digits"}}
    (folder / "here" / "datasets.yaml").write_text(write_yaml(entries))
    columns, as_trained = {"answer": "a", "prompt": "p"}, {"system_prompt": "Think.", "image_size": 32}
    run = DataSection.model_validate({"path": "rows.jsonl", "split": "one", "columns": columns, **as_trained})
    gsm, plain, both = (named_section(run, name) for name in ("gsm", "plain", "both"))
    assert gsm and (gsm.columns, gsm.system_prompt, gsm.image_size) == ({"prompt": "question"}, "Add.", 32)
    assert gsm.split_ratio == 0.1 and gsm.held_out
    assert plain and (plain.path, plain.split, plain.columns) == ("digits", "train", columns)
    assert both and (list(both.mix), both.image_size) == (["gsm", "digits"], 64)
    part = named_section(both, "gsm")
    assert part and (part.columns, part.system_prompt, part.split_ratio) == (gsm.columns, "Count.", 0.1)
    assert named_section(run, "rows.jsonl") is named_section(run, "digits") is None
    with pytest.raises(ConfigError, match=r"no data set plai\. Nearest: plain"):
        named_section(run, "plai")
