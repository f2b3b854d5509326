"""YAML and JSON with lines, Hydra's defaults, and OmegaConf's interpolations."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.reading.files import resolved, with_defaults, yaml_settings
from grpo_autotune.interop.source import Setting


def test_settings_with_the_lines_of_their_keys() -> None:
    text = "a: 1e-6\nb:\n  c:\n    - x\n    - y\n  d: {e: null}\nday: 2024-01-01\nv: 7.3.0\nempty: {}\n"
    assert yaml_settings(text, "x.yaml") == {
        "a": Setting(1e-6, 1), "b.c": Setting(["x", "y"], 3), "b.d.e": Setting(None, 6),
        "day": Setting("2024-01-01", 7), "v": Setting("7.3.0", 8), "empty": Setting({}, 9),
    }  # fmt: skip


def test_flat_keys_keep_their_mappings() -> None:
    assert yaml_settings("a:\n  b: 1\n", "x", ()) == {"a": Setting({"b": 1}, 1)}


def test_json_with_tabs_and_a_later_document() -> None:
    assert yaml_settings('{\n\t"a": {"b": 1.5e3},\n\t"c": true}', "x.json") == {
        "a.b": Setting(1500.0, 2), "c": Setting(True, 3),
    }  # fmt: skip
    assert yaml_settings("a: 1\nb: 2\n---\na: 3\n", "x")["a"] == Setting(3, 4)


def test_anchors_are_followed() -> None:
    assert yaml_settings("x: &x {a: 1}\ny:\n  <<: *x\n  b: 2\n", "x")["y.a"].value == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "x.yaml, line 1"),
        ("- a\n- b\n", "no mapping"),
        ("a: &a\n  b: *a\n", "cannot be read"),
        ("a: !!python/object:os.system {}\n", "cannot be read"),
        ("just words", "no mapping"),
    ],
)
def test_what_is_no_yaml_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        yaml_settings(text, "x.yaml")


def test_a_bomb_of_aliases_ends() -> None:
    levels = "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))
    assert len(yaml_settings("a0: &a0 {x: 1}\n" + levels, "x.yaml")) <= 20_000


def test_defaults_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "small.yaml").write_text("lr: 1\nn: 2\n")
    (tmp_path / "base.yaml").write_text("seed: 3\ndefaults:\n  - actor: small\n")
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - ppo_trainer\n  - base\n  - actor@x.y: small\n  - _self_\nactor:\n  lr: 9\n")
    settings = with_defaults(yaml_settings(file.read_text(), file.name), file)
    assert settings["actor.lr"] == Setting(9, 7)
    assert settings["actor.n"] == Setting(2, 2, "small.yaml")
    assert settings["x.y.n"].value == 2 and settings["seed"] == Setting(3, 1, "base.yaml")


def test_defaults_that_name_each_other_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [{other}]\n{name}: 1\n")
    settings = with_defaults(yaml_settings("defaults: [b]\na: 1\n", "a.yaml"), tmp_path / "a.yaml")
    assert {"a", "b"} <= settings.keys()


def test_interpolations() -> None:
    settings = yaml_settings(
        "data:\n  p: 512\n  q: ${data.p}\n  rel: ${.p}\n  text: 'n${data.p}'\nenv: ${oc.env:N,2e-3}\n"
        "home: ${oc.env:H}\nloop: ${loop}\nother: ${data.none}\nsum: ${eval:1+1}\n"
        "one: ${oc.select:data.p,4}\ntwo: ${oc.select:none,4}\nmap: ${oc.select:data,null}\n",
        "x",
    )
    values = {key: setting.value for key, setting in resolved(settings, {"H": "7"}).items()}
    assert values == {
        "data.p": 512, "data.q": 512, "data.rel": 512, "data.text": "n512", "env": 2e-3, "home": 7, "loop": "${loop}",
        "other": "${data.none}", "sum": "${eval:1+1}", "one": 512, "two": 4,
        "map": "${oc.select:data,null}",
    }  # fmt: skip
    assert resolved(settings, {})["data.q"] == Setting(512, 3, text="${data.p}")
