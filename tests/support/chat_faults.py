"""Chat completions on the fault server: good verdicts, and those that go wrong inside an answer that is well formed."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

from tests.support.fault_server import FAULTS, Call, FaultServer, Handler

TOKENS = {"prompt_tokens": 100, "completion_tokens": 20}


def chat(content: str | None, finish_reason: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": TOKENS}


def verdict(score: Any = 0.5, **more: Any) -> dict[str, Any]:
    return chat(json.dumps({"reason": "so it is", "score": score, **more}))


def judged(call: Call) -> dict[str, Any]:
    """The verdict on a completion: the number in it, else one that its length gives."""
    text = re.findall(r"<text \w+>\n(.*)\n</text", call.body["messages"][-1]["content"], re.DOTALL)[0]
    number = re.search(r"[\d.]+", text)
    return verdict(float(number[0]) if number else len(text) % 10 / 10)


def error(message: str, code: Any = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}}).encode()


def echoed(headers: Any) -> str:
    """A provider's words that repeat the key it was sent, plainly and inside an address."""
    key = headers["Authorization"].removeprefix("Bearer ")
    return f"Incorrect API key provided: {key}. See https://host/keys?key={key}&user=1"


_BODIES = {
    "refusal": chat(None, refusal="I cannot judge this"),
    "length": chat('{"reason": "it goes on', "length"),
    "content_filter": chat(None, "content_filter"),
    "no_content": chat(None),
    "cut_verdict": chat('{"reason": "it goes on'),
    "prose": chat("Score: 1"),
    "word_for_score": verdict("high"),
    "no_score": chat('{"reason": "none"}'),
    "another_key": verdict(1, verdict="good"),
    "above_scale": verdict(1.01),
    "below_scale": verdict(-1),
    "not_a_number": chat('{"reason": "x", "score": NaN}'),
    "no_choices": {"error": {"message": "upstream", "code": 502}},
}


def _answered(handler: Handler, _: bytes, body: Any) -> None:
    handler.send(200, json.dumps(body).encode())


FAULTS |= {name: partial(_answered, body=body) for name, body in _BODIES.items()}
FAULTS |= {
    "no_schema": lambda handler, _: handler.send(400, error("response_format of type json_schema is not supported")),
    "too_long": lambda handler, _: handler.send(400, error("This model's maximum context length is 64 tokens.", 400)),
    "no_credit": lambda handler, _: handler.send(429, error("You exceeded your quota", "insufficient_quota")),
    "wrong_key": lambda handler, _: handler.send(401, error(echoed(handler.headers), "invalid_api_key")),
    "broken_echo": lambda handler, _: handler.send(500, error(echoed(handler.headers))),
    "no_model": lambda handler, _: handler.send(404, error("The model `n` does not exist", "model_not_found")),
}


def base_url(server: FaultServer) -> str:
    return f"http://127.0.0.1:{server.port}/v1"
