"""The answer of a server of trained weights, held against the trainer's own."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Self

import httpx2

from grpo_autotune.errors import EnvironmentProblem
from grpo_autotune.rollout.server.http import http_client

TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""Nats, mean over tokens, that the order of sums explains by the type that both compute in."""

TOP = 20
"""Log-probs beside the token's own that a request may ask for (`max_logprobs` of vLLM)."""

ANSWER_S = 600.0
"""Seconds for the first answer: kernels may be compiled for it."""


Step = tuple[int, dict[int, float]]
"""A token that the server chose, and the log-probs of the likeliest ones by their ids."""


class Answer(NamedTuple):
    """The trainer's greedy answer to one prompt."""

    place: str  # the source of the prompt
    asked: dict[str, Any]  # the prompt in a request: `messages` or `prompt`
    prompt: list[int]  # its tokens
    tokens: list[int]  # the answer's
    logps: list[float]  # of each, in nats
    base: list[float] | None  # of each from the base without the adapter; None for whole weights
    dtype: str  # type that the model computes in

    @property
    def apart(self) -> float:
        """Mean |difference| from the base in nats; 0 without one."""
        return fmean(map(_gap, self.logps, self.base)) if self.base is not None else 0.0

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.dtype, TOLERANCE["bfloat16"])


class Agreement(NamedTuple):
    """The server's answer beside the trainer's."""

    expected: Answer
    equal: int  # tokens up to the first other one
    gaps: list[float]  # |difference| of log-probs in nats, up to that one's place

    @classmethod
    def of(cls, expected: Answer, steps: Sequence[Step]) -> Self:
        same = [token == chosen for token, (chosen, _) in zip(expected.tokens, steps, strict=False)]
        equal = [*same, False].index(False)  # what follows another token is the answer to another text
        pairs = zip(expected.tokens, expected.logps, steps[: equal + 1], strict=False)
        return cls(expected, equal, [_gap(logp, top.get(token, min(top.values()))) for token, logp, (_, top) in pairs])

    @property
    def mean(self) -> float:
        return fmean(self.gaps)

    def line(self) -> str:
        """The figures."""
        base = "" if self.expected.base is None else f" (the base alone: {self.expected.apart:.2g} on average)"
        return (
            f"{self.equal} of {len(self.expected.tokens)} greedy tokens are the trainer's, log-probs {self.mean:.2g} "
            f"nats apart on average and {max(self.gaps):.2g} at most{base}"
        )


def check_answer(address: str, name: str, expected: Answer, warn: Callable[[str], None]) -> str:
    """Ask the server for the weights' greedy answer; the line that tells how far it agrees. `warn` is told where the
    prompt cannot tell the adapter from its base.

    Raises:
        EnvironmentProblem: The server does not answer, reads the prompt otherwise, or answers as another model.
    """
    prompt, steps = _ask(address, name, expected)
    if prompt != expected.prompt:
        what = f"the server reads the prompt as {len(prompt)} tokens, and the trainer as {len(expected.prompt)} others"
        fix = "Its tokenizer or chat template is not the trained one."
        raise EnvironmentProblem(what, where=expected.place, fix=fix)
    agreement = Agreement.of(expected, steps)
    if agreement.mean > expected.tolerance:
        raise EnvironmentProblem(
            f"the server answers as another model than the one that was trained: {agreement.line()}",
            where=expected.place,
            fix=f"Up to {expected.tolerance:g} is rounding in {expected.dtype}. Merge it, and serve what comes out.",
        )
    if expected.base is not None and agreement.mean > expected.apart / 2:
        warn(f"this prompt cannot tell the adapter from its base: they are {expected.apart:.2g} nats apart")
    return f"checked on {expected.place}: {agreement.line()}"


def _ask(address: str, name: str, expected: Answer) -> tuple[list[int], list[Step]]:
    """Tokens of the prompt as the server has them, and its answer; the OpenAI interface of vLLM 0.31."""
    chat = "messages" in expected.asked
    how = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": len(expected.tokens)}
    tokens = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    logprobs = {"logprobs": True, "top_logprobs": TOP} if chat else {"logprobs": TOP}
    body = {"model": name, **expected.asked, **how, **tokens, **logprobs}
    route = f"{address}/v1/{'chat/' if chat else ''}completions"
    try:
        reply = http_client().post(route, json=body, timeout=ANSWER_S)
        reply.raise_for_status()
        values = reply.json()
    except httpx2.HTTPStatusError as error:
        raise _no_answer(address, error.response.text[:200]) from error
    except (httpx2.HTTPError, ValueError) as error:
        raise _no_answer(address, f"{type(error).__name__}: {error}") from error
    choice = values["choices"][0]
    steps = _of_chat(choice["logprobs"]) if chat else _of_text(choice["logprobs"])
    if not steps:
        raise _no_answer(address, "it is empty")
    return values.get("prompt_token_ids") or choice["prompt_token_ids"], steps


def _no_answer(address: str, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"the server gives no answer: {why}", where=address, fix="Its log says more.")


def _of_chat(logprobs: Any) -> list[Step]:
    items = logprobs["content"]
    return [(_id(one["token"]), {_id(top["token"]): top["logprob"] for top in one["top_logprobs"]}) for one in items]


def _of_text(logprobs: Any) -> list[Step]:
    pairs = zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    return [(_id(word), {_id(key): logp for key, logp in top.items()}) for word, top in pairs]


def _id(word: str) -> int:
    """`token_id:17` -> 17."""
    return int(word.rpartition(":")[2])


def _gap(left: float, right: float) -> float:
    return abs(left - right)
