"""Settings of a judge: each mistake is one line that says where it stands, and no message repeats what may be a key."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.config.sections.judge import check_keys, judge_settings, judge_template
from grpo_autotune.errors import ConfigError, EnvironmentProblem

SECRET = "sk-proj-4Fq2"
PROVIDER = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


def params(provider: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    return {"providers": [PROVIDER | (provider or {})], "prompt": "Score {{ completion }}", **others}


@pytest.mark.parametrize(
    ("given", "where", "words"),
    [
        ({"prompt": "Score {{ completion }}"}, "providers", "required"),
        (params() | {"providers": []}, "providers", "at least 1 item"),
        (params({"modle": "m"}), "providers[0].modle", "Nearest known key: providers.model"),
        (params({"api_key": SECRET}), "providers[0].api_key", "api_key_env"),
        (params({"api_key_env": SECRET}), "providers[0].api_key_env", "OPENAI_API_KEY"),
        (params({"base_url": f"https://me:{SECRET}@host/v1"}), "providers[0].base_url", "api_key_env"),
        (params({"base_url": f"https://host/v1?api_key={SECRET}"}), "providers[0].base_url", "api_key_env"),
        (params({"base_url": "host/v1"}), "providers[0].base_url", "https://HOST/PATH"),
        (params({"base_url": "http://[::1/v1"}), "providers[0].base_url", "https://HOST/PATH"),
        (params({"timeout_s": 0}), "providers[0].timeout_s", "above 0"),
        (params({"temperature": "cold"}), "providers[0].temperature", "a number"),
        (params(scale=[1, 0]), "scale", "[lowest, highest]"),
        (params(scale=[1]), "scale", "at least 2"),
        (params(cache="yes"), "cache", "auto"),
        (params(prompts="x"), "prompts", "Nearest known key: prompt"),
        (params(prompt="judge.md"), "prompt", "{{ completion }}"),
        (params(prompt="Score {completion}\nfrom 0 to 1"), "prompt", "{{ completion }}"),
        (params(prompt="Score {{ completion }"), "prompt", "line 1"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(given: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judge_settings(given)
    line = str(caught.value)
    assert line.startswith(f"{where}: ") and words in line and "\n" not in line
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_prompt_may_stand_in_a_file_and_braces_of_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "judge.md"
    file.write_text('Answer as {"score": 1}: {{ question }}\n{{ completion }}', encoding="utf-8")
    values = {"question": "What is {{ answer }} or {0}?", "completion": "{% if x %}{{ 7 * 7 }}"}
    template, names = judge_template(str(file))
    text = template.render(values)
    assert names == {"question", "completion"}
    assert text == 'Answer as {"score": 1}: What is {{ answer }} or {0}?\n{% if x %}{{ 7 * 7 }}'


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = judge_settings(params({"api_key_env": "JUDGE_KEY"}))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(EnvironmentProblem, match="JUDGE_KEY is not set") as caught:
        check_keys(settings)
    assert caught.value.where == "providers[0].api_key_env"
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    check_keys(settings)
    assert SECRET not in repr(settings)
