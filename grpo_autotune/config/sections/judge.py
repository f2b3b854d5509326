"""Parameters of the reward `judge`: its providers, its prompt, and the scale of its verdicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from grpo_autotune.config.addresses import check_address, check_variable
from grpo_autotune.config.messages import from_validation
from grpo_autotune.config.sections.section import Section
from grpo_autotune.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from jinja2 import Template


class Provider(Section):
    """An endpoint with OpenAI's chat completions; the sampling keys are those of its API, and null leaves one out."""

    base_url: str
    model: str
    api_key_env: str | None = None  # name of the environment variable with the key; a local endpoint needs none
    timeout_s: float = Field(default=60, gt=0, allow_inf_nan=False)
    rpm: int | None = Field(default=None, ge=1)  # calls per minute
    price_in: float = Field(default=0, ge=0, allow_inf_nan=False)  # per million tokens
    price_out: float = Field(default=0, ge=0, allow_inf_nan=False)
    temperature: float | None = Field(default=0, ge=0, allow_inf_nan=False)
    seed: int | None = None
    max_tokens: int | None = Field(default=512, ge=1)
    extra_body: dict[str, Any] = {}  # more keys of the request

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling keys that a request carries."""
        return self.model_dump(include={"temperature", "seed", "max_tokens"}, exclude_none=True)


class JudgeSettings(Section):
    """All `params` of a judge."""

    providers: list[Provider] = Field(min_length=1)  # in fall-back order
    prompt: str  # path of a template, or the template
    system: str | None = None
    scale: list[float] = Field(default=[0, 1], min_length=2, max_length=2)
    cache: Literal["auto", True, False] = "auto"


KNOWN = [*JudgeSettings.model_fields, *(f"providers.{name}" for name in Provider.model_fields)]


def judge_settings(params: Mapping[str, Any]) -> JudgeSettings:
    """The settings of a judge; a ConfigError's `where` is the path inside `params`.

    Raises:
        ConfigError: A key is unknown, missing or of another type, an address is none or holds a key, the scale does not
            rise, or the prompt is no template that shows the completion."""
    try:
        settings = JudgeSettings.model_validate(dict(params))
    except ValidationError as error:
        raise from_validation(error, KNOWN) from None
    for place, provider in enumerate(settings.providers):
        check_address(provider.base_url, f"providers[{place}].base_url", "api_key_env")
        if provider.api_key_env is not None:
            check_variable(provider.api_key_env, f"providers[{place}].api_key_env")
    if not settings.scale[0] < settings.scale[1]:
        raise ConfigError("the scale does not rise", where="scale", fix="Write [lowest, highest].")
    judge_template(settings.prompt)
    return settings


def check_keys(settings: JudgeSettings) -> None:
    """Look for the key of each provider; EnvironmentProblem names the environment variable that is not set."""
    for place, provider in enumerate(settings.providers):
        name, fix = (
            provider.api_key_env,
            "Put the provider's key into it; an endpoint without keys needs no api_key_env.",
        )
        if name and not os.environ.get(name, "").strip():
            where = f"providers[{place}].api_key_env"
            raise EnvironmentProblem(f"the environment variable {name} is not set", where=where, fix=fix)


def judge_template(prompt: str) -> tuple[Template, set[str]]:
    """The Jinja template of a judge's prompt, and the names in it.

    Raises:
        ConfigError: It cannot be read, is no template, or does not show the completion."""
    from jinja2 import StrictUndefined, TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment, fix = ImmutableSandboxedEnvironment(undefined=StrictUndefined), "Write {{ completion }} in it."
    try:
        text = prompt if "\n" in prompt or "{{" in prompt else Path(prompt).read_text(encoding="utf-8")
        names = meta.find_undeclared_variables(environment.parse(text))
    except TemplateSyntaxError as error:
        raise ConfigError(f"line {error.lineno} of the template: {error.message}", where="prompt") from None
    except (OSError, ValueError) as error:
        fix = f"Name a file, or write the template itself. {fix}"
        raise ConfigError(f"the template cannot be read: {error}", where="prompt", fix=fix) from None
    if "completion" not in names:
        raise ConfigError("it does not show the judge what to score", where="prompt", fix=fix)
    return environment.from_string(text), names
