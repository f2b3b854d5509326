"""`service`: scores from any HTTP endpoint, such as retrieval, a code sandbox or a scorer of one's own."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import httpx2
import jinja2
import jinja2.meta

from grpo_autotune.config.addresses import KEY_NAME, check_address, check_variable
from grpo_autotune.errors import ConfigError
from grpo_autotune.train.rewards.guard import MOST
from grpo_autotune.train.rewards.remote.batch import RemoteReward, rows_of
from grpo_autotune.train.rewards.remote.replies import Endpoint, Failed, Reply, check_status, excerpt, failure, secret

DEFAULT_BODY = {"prompt": "{{ prompt }}", "completion": "{{ completion }}"}
STEP = r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]"
ALONE = re.compile(r"\s*\{\{((?:(?!\}\}).)*)\}\}\s*", re.DOTALL)
TEMPLATES = jinja2.Environment(undefined=jinja2.StrictUndefined)


class Service(RemoteReward):
    """A reward whose score stands in the JSON that a URL answers; docs/rewards.md has what its arguments mean.
    ConfigError where one of them cannot be used."""

    kind = "service"

    def __init__(
        self,
        *,
        url: str,
        score: str = "$.score",
        method: Literal["GET", "POST", "PUT"] = "POST",
        body: str | list[Any] | dict[str, Any] = DEFAULT_BODY,
        headers: dict[str, str] | None = None,
        headers_env: dict[str, str] | None = None,
        warmup: int = 2,
        timeout_s: float = 30.0,
        rpm: int | None = None,
    ) -> None:
        check_address(url, "url", "headers_env")
        for header in filter(KEY_NAME.search, headers or {}):
            fix = "Put its value into an environment variable, and name that in headers_env."
            raise ConfigError("a key in it would stand in run folders", where=f"headers.{header}", fix=fix)
        for header, variable in (headers_env or {}).items():
            check_variable(variable, f"headers_env.{header}")
        if re.fullmatch(rf"\$({STEP})*", score) is None:
            raise ConfigError(f"{score!r} is no JSON path", where="score", fix="Write $.key or $.list[0].key.")
        for name, value in {"timeout_s": timeout_s, "rpm": rpm}.items():
            if value is not None and value <= 0:
                raise ConfigError(f"{value} is not above 0", where=name)
        super().__init__([Endpoint(httpx2.URL(url).netloc.decode(), self._request, rpm, timeout_s, "params.url")])
        self.url, self.method, self.warmup, self.path = url, method, warmup, score
        self._headers, self._variables = headers or {}, headers_env or {}
        self._secrets()
        self._steps = [name or quoted or int(index) for name, quoted, index in re.findall(STEP, score)]
        self._body = _template(body, "body", self.columns)

    def rows(self, batch: Mapping[str, Any]) -> list[Any]:
        """The bodies."""
        return [self._body(row) for row in rows_of(batch)]

    def _secrets(self) -> dict[str, str]:
        return {header: secret(variable, f"headers_env.{header}") for header, variable in self._variables.items()}

    async def _request(self, body: Any) -> Reply:
        secrets = self._secrets()
        kind = "params" if self.method == "GET" else "content" if isinstance(body, str) else "json"
        call: dict[str, Any] = {kind: body, "headers": {**self._headers, **secrets}}
        try:
            answer = await self.http.request(self.method, self.url, **call)
        except httpx2.TransportError as error:
            raise failure(error, secrets.values()) from None
        if not answer.is_success:
            check_status(answer.status_code, answer.headers, answer.text, secrets.values())
        try:
            value = answer.json()
            for step in self._steps:
                value = value[step]
            if isinstance(value, int | float) and abs(value) <= MOST:
                return Reply(float(value))
            kind = "schema"
        except (ValueError, LookupError, TypeError) as error:
            kind = "json" if isinstance(error, ValueError) else "schema"
        raise Failed(kind, f"no number at {self.path} in {excerpt(answer.text, secrets.values())}")


def _template(body: Any, where: str, columns: set[str]) -> Callable[[Mapping[str, Any]], Any]:
    """From a row's columns to a JSON value; adds the names to `columns` that the texts in `body` cannot do without."""
    if isinstance(body, dict | list):
        items = body.items() if isinstance(body, dict) else enumerate(body)
        parts = {key: _template(part, f"{where}.{key}", columns) for key, part in items}
        if isinstance(body, list):
            return lambda row: [part(row) for part in parts.values()]
        return lambda row: {key: part(row) for key, part in parts.items()}
    if not isinstance(body, str):
        return lambda row: body
    try:
        names = jinja2.meta.find_undeclared_variables(TEMPLATES.parse(body))
        columns |= names if re.search(r"\b(default|defined)\b", body) is None else set()
        if alone := ALONE.fullmatch(body):
            return TEMPLATES.compile_expression(alone[1], undefined_to_none=False)
        return TEMPLATES.from_string(body).render
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"this is no template: {error.message}", where=where) from error
