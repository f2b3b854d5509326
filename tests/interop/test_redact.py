"""Secrets in a source: none comes through, and nothing else is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_autotune.interop.source import Setting, Source, hidden, hidden_text, redacted

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("WANDB_API_KEY", "abc-def"), ("HF_TOKEN", "something"), ("MY_SECRET_2", "s"), ("DB_PASSWORD", "1234567"),
        ("hub_token", "x"), ("trainer.api_key", "x"), ("token", "x"), ("swanlab_token", "x"), ("note", f"key {HEX}"),
        ("x", "hf_abcdefghijklmnop"), ("x", "sk-proj-abcdefghijkl"), ("x", "--api_key=abcdefgh rest"),
        ("x", "https://me:sesame99@host/x"), ("x", "Authorization: Bearer abcdefgh1234"),
        ("x", "export WANDB_TOKEN=abcdefgh"), ("x", "git clone https://abcdefghijklmnop@host/x"),
        ("x", "wandb.login(key='abcdefgh')"), ("x", "hf auth login --token abcdefgh"),
        ("env", {"OPENAI_API_KEY": "abc"}), ("x", ["ok", "ghp_abcdefghijklmno"]),
    ],
)  # fmt: skip
def test_a_secret_is_hidden(key: str, value: object) -> None:
    assert "***" in str(hidden(value, key))
    for secret in ("abc", "something", "sesame99", HEX, "1234567"):
        assert secret not in str(hidden(value, key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.prompt_key", "prompt"), ("PROMPT_KEY", "prompt"), ("reward_fn_key", "data_source"),
        ("pad_token", "<eos>"),
        ("use_token_level_loss", "True"), ("MAX_TOKEN", "4096"), ("model_revision", HEX), ("HF_TOKEN", "$HF_TOKEN"),
        ("path", "/data/hf_models/qwen"), ("max_num_batched_tokens", 8192), ("tokenizer", "a/b"), ("x", "http://h:80/x"),
        ("WANDB_API_KEY", ""), ("monkey", "banana"), ("task", "sk-learn"), ("token", None), ("IMAGE_KEY", "images"),
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(key: str, value: object) -> None:
    assert hidden(value, key) == value


def test_every_part_of_a_source() -> None:
    secret = "hf_abcdefghijklmnopqrst"
    one = {"TOKEN": Setting(secret, 1, text=f"${{TOKEN:-{secret}}}")}
    source = Source("verl", Path("x"), one, one, one, hints={"a": secret}, warnings=(f"line 1: {secret}",))
    assert secret not in repr(redacted(source))
    assert hidden_text(f"https://me:{secret}@host") == "https://me:***@host"
