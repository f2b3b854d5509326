"""A fixed text that engine and trainer both score: no sampling, no image, no cache in the way, so only weights count.

The engine is asked inside the call that generates, while it is awake and holds the weights of the moment; the trainer
scores the same text once the generation is over. Over an optimizer step both must move alike.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from grpo_autotune.seams.trainer_access import without_dropout

LONGEST = 64
SHORTEST = 8
DENSE = 8
SPARSE = 16
"""Of a long run the first generations are looked at, and then one in so many."""
FOLLOWED = 0.1
"""The engine followed an optimizer step if its log-probs moved by this share of the trainer's movement at least."""


@dataclass(slots=True)
class Scores:
    """The comparison of one generation; the movement is None where the trainer's was too small to tell."""

    step: int
    gap_nats: float
    largest_nats: float
    trainer_moved_nats: float | None = None
    engine_moved_nats: float | None = None

    @property
    def followed(self) -> bool | None:
        """True if the engine moved with the trainer; None where the trainer's movement was too small to tell."""
        if self.trainer_moved_nats is None or self.engine_moved_nats is None:
            return None
        return self.engine_moved_nats >= FOLLOWED * self.trainer_moved_nats


@dataclass(slots=True)
class CheckText:
    """The text, and both sides' log-probs of its tokens (but the first)."""

    ids: list[int] = field(default_factory=list)
    asked: torch.Tensor | None = None
    anchor: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def choose(self, sequences: Iterable[Sequence[int]], special: Collection[int], longest: int) -> bool:
        """Take the text from what the engine has just seen, less special tokens; True if there is one now."""
        if not self.ids:
            tokens = [token for sequence in sequences for token in sequence if token not in special]
            if len(tokens) >= SHORTEST and longest > SHORTEST:
                self.ids = tokens[: min(LONGEST, longest)]
        return bool(self.ids)

    def ask(self, score: Callable[[list[int]], list[float]]) -> None:
        self.asked = torch.tensor(score(self.ids))

    def compare(self, trainer: Any, step: int, resolution_nats: float) -> Scores | None:
        """Score the text with the weights of a trainer that has made `step` optimizer steps, and hold it against what
        the engine said of it. Below a mean movement of the trainer by `resolution_nats` nothing follows for the engine.
        """
        theirs, self.asked = self.asked, None
        if theirs is None:
            return None
        ours = self._scored_by(trainer)
        scores = Scores(step, _mean(ours - theirs), float((ours - theirs).abs().max()))
        before, trainer_before, engine_before = self.anchor or (step, ours, theirs)
        moved_nats = _mean(ours - trainer_before)
        if step != before and moved_nats >= resolution_nats:
            scores.trainer_moved_nats, scores.engine_moved_nats = moved_nats, _mean(theirs - engine_before)
            self.anchor = None
        self.anchor = self.anchor or (step, ours, theirs)
        return scores

    def _scored_by(self, trainer: Any) -> torch.Tensor:
        ids = torch.tensor([self.ids], device=trainer.accelerator.device)
        with undisturbed(trainer, dropout=False), trainer.accelerator.autocast():
            logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logps = logits[0, :-1].float().log_softmax(dim=-1)
        scores: torch.Tensor = logps.gather(-1, ids[0, 1:, None])[:, 0].cpu()
        return scores


def scored_by_llm(llm: Any, ids: list[int]) -> list[float]:
    """Log-probs of a text's tokens but the first, by an engine of this process."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scored = llm.generate([{"prompt_token_ids": ids}], sampling_params=wanted, use_tqdm=False)[0].prompt_logprobs
    return [row[token].logprob for row, token in zip(scored[1:], ids[1:], strict=True)]


def scored_by_server(client: Any, ids: list[int]) -> list[float]:
    """Log-probs of a text's tokens but the first, by a server, through TRL's client."""
    scored = client.get_sequence_logprobs([ids], [1], top_logprobs=1)
    return [row[0] for row in scored["actual_logprobs"][0]]


def due(generation: int) -> bool:
    """True at the generations (counted from 0) that are worth a pass of their own."""
    return generation < DENSE or generation % SPARSE == 0


def active_dropout(model: Any) -> str:
    """Name of the first module of a model that drops something as the model is now; empty without one."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, _DropoutNd))
    return next((name for name, module in layers if module.training and module.p > 0.0), "")


@contextmanager
def undisturbed(trainer: Any, *, dropout: bool) -> Iterator[None]:
    """A forward pass that leaves gradients, random numbers and modes as they are; without `dropout`, none is active."""
    device = trainer.accelerator.device
    switched = nullcontext() if dropout else without_dropout(trainer.model)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), switched:
        yield


def _mean(gap: torch.Tensor) -> float:
    return float(gap.abs().mean())
