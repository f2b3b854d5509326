"""One request with n = G where TRL sends G copies of a prompt, so that each prompt and image is prepared once.

TRL gives every rank a consecutive piece of the generation batch, in which the G completions of a prompt lie together,
so a row's place tells where its group begins; a group may be cut at a rank's edge. Rows are asked for together where
they lie in one group and have the same ids and the same images, hence one distribution. Completions come back in
TRL's order.

A completion's length and seed may be its own: vLLM makes one child request a completion, and a layer there gives each
its `max_tokens`. Copies that share a seed would all sample the same completion; member i of a group gets seed + i, as
from a server.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

from grpo_autotune.rollout.colocate.placeholders import MEDIA, PROMPT_IDS
from grpo_autotune.rollout.options import GREEDY, EngineOptions
from grpo_autotune.rollout.parts import Part
from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap

LENGTHS = "grpo_autotune_max_tokens"
"""Key of `SamplingParams.extra_args`: the children's `max_tokens`, by index."""


class JoinedRequests(Part):
    """The joined requests of one engine; ranks that share one (tensor parallelism) keep TRL's copies."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._rank, self._group, self._rows = 0, 0, 0
        self._signature = inspect.Signature()
        self.completions = 0  # that TRL asked for, so far
        self.sent = 0  # requests that the engine was sent for them

    def install(self, generation: Any) -> list[Handle]:
        if generation.tensor_parallel_size > 1:
            return []
        from vllm.v1.engine.parallel_sampling import ParentRequest

        self._rank = generation.accelerator.process_index
        self._signature = inspect.signature(generation.generate)
        return [
            wrap(AttributeSlot(generation, "generate"), self.batch, INNER),
            wrap(AttributeSlot(generation.llm, "generate"), self.requests, INNER),
            wrap(AttributeSlot(ParentRequest, "_get_child_sampling_params"), _child_params, INNER),
        ]

    def batch(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """`VLLMGeneration.generate`: its next `LLM.generate` is for these rows."""
        given = self._signature.bind(*args, **kwargs).arguments
        self._rows, self._group = len(given["prompts"]), given["num_generations"]
        try:
            return call_next(*args, **kwargs)
        finally:
            self._rows = 0

    def requests(self, call_next: Next, /, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
        """`LLM.generate`: one request for the rows of a run, and an output for each row."""
        rows = self._rows if len(prompts) == self._rows else 0
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * rows
        if not rows or any(one is None or one.n != 1 or one.temperature < GREEDY for one in params):
            # decoding greedily, vLLM takes no n above 1
            return call_next(prompts, sampling_params=sampling_params, **kwargs)
        self._rows = 0  # whatever else is asked for during this generation is not TRL's batch
        first = self._rank * rows  # this rank's first row in the generation batch
        runs = _runs(prompts, params, [(first + row) % self._group for row in range(rows)])
        self.completions, self.sent = self.completions + rows, self.sent + len(runs)
        outputs = call_next(
            [prompts[run[0]] for run in runs],
            sampling_params=[_of_run([params[row] for row in run], (first + run[0]) % self._group) for run in runs],
            **kwargs,
        )
        return [one for output in outputs for one in _single(output)]


def _runs(prompts: Sequence[Any], params: Sequence[Any], members: Sequence[int]) -> list[list[int]]:
    """Rows that are asked for together; `members` are their places in their groups."""
    runs: list[list[int]] = []
    for row, member in enumerate(members):
        last = runs[-1][-1] if runs and member else None
        if last is not None and _same_prompt(prompts[last], prompts[row]) and _same_params(params[last], params[row]):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _same_prompt(left: Any, right: Any) -> bool:
    """True if ids and images are equal; an image is compared by its pixels where it is another object."""
    return bool(left[PROMPT_IDS] == right[PROMPT_IDS] and left.get(MEDIA) == right.get(MEDIA))


def _same_params(left: Any, right: Any) -> bool:
    if left is right:
        return True
    left, right = copy.copy(left), copy.copy(right)
    left.max_tokens = right.max_tokens = 1
    return bool(left == right)


def _of_run(params: Sequence[Any], member: int) -> Any:
    """The parameters of a run's request, from those of its rows; `member` is its first row's place in the group."""
    joined = params[0].clone()
    if joined.seed is not None:
        joined.seed += member
    joined.n = len(params)
    lengths = [one.max_tokens for one in params]
    joined.max_tokens = max(lengths)
    if len(set(lengths)) > 1:
        joined.extra_args = {**(joined.extra_args or {}), LENGTHS: lengths}
    return joined


def _child_params(call_next: Next, parent: Any, index: int, /) -> Any:
    """`ParentRequest._get_child_sampling_params`: a child's own length."""
    params = call_next(parent, index)
    extra = params.extra_args or {}
    if LENGTHS not in extra:
        return params
    child = copy.copy(params)
    child.max_tokens = extra[LENGTHS][index]
    child.extra_args = {key: value for key, value in extra.items() if key != LENGTHS} or None
    return child


def _single(output: Any) -> list[Any]:
    """An output for each completion, with the prompt of all."""
    singles = [copy.copy(output) for _ in output.outputs]
    for single, completion in zip(singles, output.outputs, strict=True):
        single.outputs = [completion]
    return singles
