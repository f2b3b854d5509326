"""The proof that one model is another: log-probs of the same tokens, in nats, from both.

What is asked are prompts of the run's held-out data with their images, else of its training data, else fixed sequences
of tokens, each followed by the greedy answer of the trained model. Rows go one by one: nothing is padded. The tokens in
an image's place are left out: no model is asked for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image
from trl.trainer.utils import selective_log_softmax

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import AutotuneError
from grpo_autotune.records.trained import Difference, Proof
from grpo_autotune.trained.prompts import first_prompts, inputs_of, prompt_of, template_options

ANSWER_TOKENS = 32
FIXED_TOKENS = 64
"""Length of a fixed sequence."""
NOISE = 112
"""Sides of the picture beside it."""
LIMITS = {"float32": 1e-4, "float16": 2**-5, "bfloat16": 2**-2}
"""Most nats between the merged and the trained model, by dtype: in float32 what the order of additions changes, else
what rounding each weight once more does: 64 times 2^-11 and 2^-8, by which it changes a weight at most. (Measured on
SmolLM2-135M: 0.009 and 0.04.)"""
FACTOR = 10.0
"""The base is at least so many times further from the trained model than the merged one is, on average."""

Tokens = dict[str, Any]
"""Inputs of one forward pass: `input_ids` (1, T), and what else the processor gives."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prompts:
    """Tokens that the models are given, and how many of what kind in words."""

    told: str  # `8 held-out prompts`
    rows: tuple[Tokens, ...]


class Exam:
    """Prompts with the answers of the trained model, and the log-probs that it gives them; `step` is told what comes
    next, for each prompt."""

    def __init__(self, model: Any, prompts: Prompts, step: Say) -> None:
        self.told, self._step = prompts.told, step
        self._rows = [answered(model, row) for row in self._each(prompts.rows, "answers of the trained model")]
        self._expected = self._ask(model, "the trained model")
        self.tokens = len(self._expected)

    def difference(self, model: Any, name: str) -> Difference:
        """Mean and largest |difference| of the log-probs of another model; infinite where one is no number."""
        apart = (self._ask(model, name) - self._expected).abs().double().nan_to_num(torch.inf, torch.inf)
        return Difference(mean=float(apart.mean()), max=float(apart.max()))

    def _ask(self, model: Any, name: str) -> torch.Tensor:
        return torch.cat([log_probs(model, row) for row in self._each(self._rows, f"log-probs of {name}")])

    def _each(self, rows: Sequence[Tokens], what: str) -> Iterator[Tokens]:
        for row in rows:
            self._step(what)
            yield row


def prompts_of(config: RunConfig | None, processor: Any, count: int, say: Say) -> Prompts:
    """At most `count` prompts of a run; fixed sequences where there is no run, or its data cannot be read any more."""
    if config is not None:
        try:
            prompts, kind = first_prompts(config, processor, count, say)
            rows = tuple(dict(inputs_of(prompt, processor, template_options(config))) for prompt in prompts)
            return Prompts(f"{len(rows)} {kind} prompts", rows)
        except AutotuneError as error:
            say(f"the run's prompts cannot be had, fixed sequences of tokens take their place: {error}")
    tokenizer = getattr(processor, "tokenizer", processor)
    ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder)))
    fixed = torch.Generator().manual_seed(0)
    drawn = ordinary[torch.randint(len(ordinary), (count, 1, FIXED_TOKENS), generator=fixed)]
    if not (hasattr(processor, "image_processor") and processor.chat_template):
        return Prompts(f"{count} fixed sequences of tokens", tuple({"input_ids": ids} for ids in drawn))
    noise = to_pil_image(torch.rand((3, NOISE, NOISE), generator=fixed))
    texts = [[{"role": "user", "content": tokenizer.decode(ids[0])}] for ids in drawn]
    seen = [prompt_of({"prompt": text, "image": noise}, processor) for text in texts]
    rows = tuple(dict(inputs_of(prompt, processor, {})) for prompt in seen)
    return Prompts(f"{count} fixed sequences of tokens with a picture", rows)


def answered(model: Any, row: Tokens) -> Tokens:
    """The row with the model's greedy answer behind it."""
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    never = _places(model).tolist() or None
    with torch.inference_mode():
        ids = model.generate(**_on(model, row), max_new_tokens=ANSWER_TOKENS, suppress_tokens=never, **greedy).cpu()
    given = row["input_ids"].shape

    def longer(name: str, value: Any) -> Any:
        more = value.new_full((1, ids.shape[1] - given[1]), int(name == "attention_mask"))
        return torch.cat([value, more], dim=1)

    more = {name: longer(name, value) for name, value in row.items() if value.shape == given}
    return {**row, **more, "input_ids": ids}


def log_probs(model: Any, row: Tokens) -> torch.Tensor:
    """Log-probs (T,) of the row's tokens after the first, without places of images, in float32 on the CPU."""
    ids = row["input_ids"][0, 1:]
    kept = ~torch.isin(ids, _places(model))
    with torch.inference_mode():
        logits = model(**_on(model, row), use_cache=False).logits[0, :-1]
        kept, ids = kept.to(logits.device), ids.to(logits.device)
        given: torch.Tensor = selective_log_softmax(logits[kept].float(), ids[kept])
    return given.cpu()


def flaw(proof: Proof) -> str | None:
    """The reason why a proof fails, with figures; None where it holds."""
    merged, base = proof.merged, proof.base
    if not merged.max <= proof.limit:
        told = f"log-probs differ by {merged.max:.3g} nats, and may by {proof.limit:g}"
        return f"the merged model is not the trained one: {told}"
    if base is not None and base.max == 0:
        return "nothing was learned: no log-prob of the trained model differs from the base's"
    if base is not None and base.mean < proof.factor * merged.mean:
        return (
            f"rounding hides what was learned: log-probs differ by {merged.mean:.3g} nats from the trained model and "
            f"by {base.mean:.3g} from the base, on average, which has to be {proof.factor:g} times as far"
        )
    return None


def _places(model: Any) -> torch.Tensor:
    """Token ids of places that images and videos take."""
    names = ("image_token_id", "video_token_id")
    return torch.tensor([getattr(model.config, name) for name in names if hasattr(model.config, name)]).long()


def _on(model: Any, row: Tokens) -> Tokens:
    return {name: value.to(model.device) for name, value in row.items()}
