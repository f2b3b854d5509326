"""Rollout fidelity: does the engine sample from the model that is trained? Checked at every generation.

The numbers compared are log-probs of the tokens that the engine sampled: the engine's, which came with them, and the
trainer's. A large difference biases every gradient, silently; so beside the size of it, the meter collects what tells
the possible causes apart (`causes`).
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_autotune.records.rollout import Fidelity, FidelityPart
from grpo_autotune.rollout.fidelity.causes import Evidence, diagnose
from grpo_autotune.rollout.fidelity.check_text import (
    CheckText,
    Scores,
    active_dropout,
    due,
    scored_by_llm,
    scored_by_server,
)
from grpo_autotune.rollout.fidelity.rescore import rescore
from grpo_autotune.rollout.fidelity.sampling import PLAIN, differences, not_plain, others, parameters, shapes
from grpo_autotune.seams.layers import AttributeSlot, Handle, Next, wrap
from grpo_autotune.seams.trainer_access import compute_dtype

THRESHOLD_NATS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
COARSEST_NATS = max(THRESHOLD_NATS.values())
RESOLUTION = 0.1
"""A movement of the trainer's log-probs counts from this share of the threshold on."""
KEYS = 4096
"""Rows of a run that are remembered, to know them again."""

Cell = tuple[Literal["image", "text"], Literal["first", "later"], Literal["new", "repeated"]]


def threshold_nats(formats: Iterable[str]) -> float:
    """Mean difference above which it is not rounding: that of the coarsest format."""
    return max(THRESHOLD_NATS.get(name, COARSEST_NATS) for name in formats)


@dataclass(slots=True)
class Sum:
    """Mean and maximum of absolute values that come in pieces."""

    total: float = 0.0
    largest: float = 0.0
    count: int = 0

    def add(self, values: Any) -> None:
        """Take a tensor of non-negative numbers."""
        if values.numel():
            self.total += float(values.sum())
            self.largest = max(self.largest, float(values.max()))
            self.count += values.numel()

    def with_more(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total, max(self.largest, other.largest), self.count + other.count)

    def mean(self) -> float:
        """0 without values."""
        return self.total / self.count if self.count else 0.0


@dataclass(slots=True)
class Dropped:
    """Importance weights of zero: a whole sample's in TRL's `sequence_*` modes (one weight per row), else a token's."""

    zero: int = 0
    all: int = 0
    of: Literal["samples", "tokens"] | None = None

    def see(self, ratio: Any, mask: Any) -> float | None:
        """Take the weights, (B, 1) or (B, C), of a generation with its mask (B, C); the share of zeros in it."""
        if ratio is None:
            return None
        by_row = ratio.shape[1] == 1 and mask.shape[1] != 1
        self.of = "samples" if by_row else "tokens"
        counted = ratio[mask.any(dim=1)] if by_row else ratio[mask]
        self.zero += int((counted == 0).sum())
        self.all += counted.numel()
        return float((counted == 0).float().mean()) if counted.numel() else None

    def share(self) -> float | None:
        """None where no weights were seen."""
        return self.zero / self.all if self.all else None


@dataclass
class FidelityMeter:
    """Watches the rollouts of one trainer from `install` on."""

    trainer: Any  # a `GRPOTrainer` with vLLM
    # entered around work of the meter's own inside the engine's call
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    asking: bool = False  # True while the engine works for the meter, not for the trainer
    text: CheckText = field(default_factory=CheckText)
    scores: list[Scores] = field(default_factory=list)
    cells: dict[Cell, Sum] = field(default_factory=dict)
    shift: Sum = field(default_factory=Sum)
    dropped: Dropped = field(default_factory=Dropped)
    given: dict[str, float] | None = None
    # True if the engine gives back the model's log-probs, not those of the distribution that it draws from
    raw: bool = False
    server: dict[str, Any] = field(default_factory=dict)
    shaped_by: list[str] = field(default_factory=list)
    prompts: int = 0
    differ: int = 0
    lengths: tuple[int, int] | None = None
    image_tokens: tuple[int, int, int] | None = None
    dropout: str = ""
    first_step: int | None = None
    seen: int = 0
    met: dict[Any, int] = field(default_factory=dict)

    def install(self) -> list[Handle]:
        """Put layers on the engine's calls; none without vLLM."""
        generation = getattr(self.trainer, "vllm_generation", None)
        slots = [(generation, "generate", self._prompts_layer)]
        slots.append((getattr(generation, "llm", None), "generate", self._llm_layer))
        slots.append((getattr(generation, "vllm_client", None), "generate", self._client_layer))
        return [wrap(AttributeSlot(owner, name), layer) for owner, name, layer in slots if hasattr(owner, name)]

    def formats(self) -> tuple[str, str]:
        """The trainer's number format and the engine's; before a server has told, the trainer's is taken."""
        trainer = compute_dtype(self.trainer)
        config = getattr(getattr(_llm(self.trainer), "llm_engine", None), "vllm_config", None)
        told = (
            self.server if config is None else {n: vars(getattr(config, n)) for n in ("model_config", "cache_config")}
        )
        if not told:
            return trainer, trainer
        words = [str(told["model_config"]["dtype"]).removeprefix("torch.")]
        if told["cache_config"]["cache_dtype"] not in ("auto", words[0]):
            words.append(f"{told['cache_config']['cache_dtype']} keys and values")
        if told["model_config"]["quantization"] is not None:
            words.append(f"{told['model_config']['quantization']} weights")
        return trainer, " with ".join(words)

    def threshold_nats(self) -> float:
        return threshold_nats(name.split(" with ")[0] for name in self.formats())

    def see(self, output: Mapping[str, Any]) -> dict[str, float]:
        """Take what TRL made of one training generation; its metrics, none without an engine's log-probs."""
        theirs = output.get("sampling_per_token_logps")
        if theirs is None:
            return {}
        step = int(self.trainer.state.global_step)
        self.dropout = self.dropout or active_dropout(self.trainer.model)
        self.first_step = step if self.first_step is None else self.first_step
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        mask = mask.bool() & ~theirs.isnan()
        metrics = self._compare(output, theirs, mask, step)
        share = self.dropped.see(output.get("importance_sampling_ratio"), mask)
        if share is not None:
            metrics[f"rollout/dropped_{self.dropped.of}"] = share
        scores = self.text.compare(self.trainer, step, RESOLUTION * self.threshold_nats())
        if scores is not None:
            self.scores.append(scores)
            metrics["rollout/text_logp_diff"] = scores.gap_nats
        if scores is not None and scores.trainer_moved_nats is not None:
            metrics["rollout/trainer_moved"] = scores.trainer_moved_nats
            metrics["rollout/engine_moved"] = scores.engine_moved_nats or 0.0
        self.seen += 1
        return metrics

    def _compare(self, output: Mapping[str, Any], theirs: Any, mask: Any, step: int) -> dict[str, float]:
        """Add up the differences by kind of row. TRL logs the plain ones itself, so only others are a metric."""
        ours, given = output.get("old_per_token_logps"), PLAIN if self.raw else self._given()
        plain = ours is not None and not shapes(given, self.trainer.temperature)
        if self.shaped_by or not (plain or due(self.seen)):
            return {}
        shift = Sum()
        if not plain:
            scored = rescore(self.trainer, output, given)
            rows, keep = scored.plain.shape
            ours, theirs, mask = scored.drawn, theirs[:rows, :keep], mask[:rows, :keep]
            shift.add((scored.drawn - scored.plain).abs()[mask])
        gap, seen = (theirs - ours).abs(), Sum()
        seen.add(gap[mask])
        kinds = row_kinds(output)
        keys = row_keys(output) if len(self.met) < KEYS else [None] * len(kinds)
        for row, (kind, key) in enumerate(zip(kinds, keys, strict=True)):
            if row < len(gap):
                self.cells.setdefault(self._cell(kind, key, step), Sum()).add(gap[row][mask[row]])
        if plain or not seen.count:
            return {}
        self.shift = self.shift.with_more(shift)
        metrics = {"rollout/logp_diff_mean": seen.mean(), "rollout/logp_diff_max": seen.largest}
        return metrics | ({"rollout/sampling_shift": shift.mean()} if shift.total else {})

    def _cell(self, kind: Literal["image", "text"], key: Any, step: int) -> Cell:
        before = step if key is None else self.met.get(key, step)
        if key is not None and len(self.met) < KEYS:
            self.met.setdefault(key, step)
        return kind, "first" if step == self.first_step else "later", "repeated" if before < step else "new"

    def facts(self) -> Fidelity | None:
        """The fidelity so far; None where no engine took part."""
        if not (self.cells or self.scores):
            return None
        evidence, scored = self._evidence(), [scores.gap_nats for scores in self.scores]
        tokens, mean = sum(cell.count for cell in self.cells.values()), evidence.mean()
        largest = max((cell.largest for cell in self.cells.values()), default=0.0)
        if mean is None:  # what was sampled cannot be compared, and the fixed text stands for it
            tokens, mean = (len(self.text.ids) - 1) * len(scored), _mean(scored)
            largest = max((scores.largest_nats for scores in self.scores), default=0.0)
        if mean is None:  # every token was masked
            return None
        moves = [s for s in self.scores if s.followed is not None]
        shifted = bool(evidence.sampling) and self.shift.mean() > evidence.threshold_nats
        ok = mean <= evidence.threshold_nats and evidence.moved is not False and not shifted
        cause, causes = (None, []) if ok else diagnose(evidence)
        return Fidelity(
            mean_nats=mean,
            max_nats=largest,
            tokens=tokens,
            threshold_nats=evidence.threshold_nats,
            ok=ok,
            dropped_share=self.dropped.share(),
            dropped_of=self.dropped.of,
            shift_nats=self.shift.mean() if self.shift.total else None,
            sampling=not_plain(self.given or {}),
            text_nats=_mean(scored),
            moved=evidence.moved,
            updates_checked=len(moves),
            trainer_moved_nats=evidence.trainer_moved_nats,
            engine_moved_nats=evidence.engine_moved_nats,
            parts=list(evidence.parts),
            cause=cause,
            causes=causes,
        )

    def _evidence(self) -> Evidence:
        first, later = ([s.gap_nats for s in self.scores if (s.step == self.first_step) is t] for t in (True, False))
        moves = [s for s in self.scores if s.followed is not None]
        parts = [
            FidelityPart(rows=rows, when=when, seen=seen, mean_nats=s.mean(), max_nats=s.largest, tokens=s.count)
            for (rows, when, seen), s in sorted(self.cells.items())
            if s.count
        ]
        return Evidence(
            threshold_nats=self.threshold_nats(),
            parts=tuple(parts),
            text_first=_mean(first),
            text_later=_mean(later),
            moved=all(s.followed for s in moves) if moves else None,
            trainer_moved_nats=_mean([s.trainer_moved_nats or 0.0 for s in moves]),
            engine_moved_nats=_mean([s.engine_moved_nats or 0.0 for s in moves]),
            prompts=self.prompts,
            prompts_differ=self.differ,
            lengths=self.lengths,
            image_tokens=self.image_tokens,
            dropout=self.dropout,
            sampling=differences(self._given(), _wanted(self.trainer)),
            shift_nats=self.shift.mean(),
            formats=self.formats(),
        )

    def _given(self) -> dict[str, float]:
        """The parameters that the engine was last called with; before that, those that it will be called with."""
        return _wanted(self.trainer) if self.given is None else self.given

    def _take(self, source: Any) -> None:
        self.given, self.shaped_by = parameters(source), others(source)

    def _prompts_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """Compare the token ids that the engine worked on with those that it was given."""
        answer = call_next(*args, **kwargs)
        given = kwargs["prompts"] if "prompts" in kwargs else args[0]
        if self.trainer.model.training:
            for theirs, ours in zip(answer[0], given, strict=False):
                self.prompts += 1
                if list(theirs) != list(ours):
                    self.differ += 1
                    self._take_other_prompt(list(theirs), list(ours))
        return answer

    def _take_other_prompt(self, theirs: list[int], ours: list[int]) -> None:
        if self.lengths is None:
            self.lengths = len(theirs), len(ours)
            mark = getattr(self.trainer.processing_class, "image_token_id", None)
            images = sum(token == mark != before for before, token in zip([None, *ours], ours, strict=False))
            self.image_tokens = (theirs.count(mark), ours.count(mark), images) if mark is not None and images else None

    def _llm_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        outputs = call_next(*args, **kwargs)
        if self.asking or not self.trainer.model.training:
            return outputs
        given = kwargs["sampling_params"] if "sampling_params" in kwargs else args[1]
        self._take(given[0] if isinstance(given, list | tuple) else given)
        llm = _llm(self.trainer)
        self.raw = llm.llm_engine.model_config.logprobs_mode == "raw_logprobs"
        sequences = (ids for row in outputs for ids in (row.prompt_token_ids, row.outputs[0].token_ids))
        longest = llm.llm_engine.model_config.max_model_len - 1
        self._ask(sequences, longest, lambda ids: scored_by_llm(llm, ids))
        return outputs

    def _client_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        answer = call_next(*args, **kwargs)
        if self.asking or not self.trainer.model.training:
            return answer
        self._take({**kwargs, **(kwargs.get("generation_kwargs") or {})})
        self.server = self.server or self.trainer.vllm_generation.vllm_client.get_server_info()
        self.raw = self.server["model_config"]["logprobs_mode"] == "raw_logprobs"
        if not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled):
            client = self.trainer.vllm_generation.vllm_client
            sequences = [*answer["prompt_ids"], *answer["completion_ids"]]
            longest = int(self.server["model_config"]["max_model_len"]) - 1
            self._ask(sequences, longest, lambda ids: scored_by_server(client, ids))
        return answer

    def _ask(self, sequences: Iterable[Any], longest: int, score: Callable[[list[int]], list[float]]) -> None:
        special = getattr(self.trainer._tokenizer, "all_special_ids", [])
        if due(self.seen) and self.text.choose(sequences, frozenset(special), longest):
            self.asking = True
            try:
                with self.around():
                    self.text.ask(score)
            finally:
                self.asking = False


def _llm(trainer: Any) -> Any:
    return getattr(getattr(trainer, "vllm_generation", None), "llm", None)


def _wanted(trainer: Any) -> dict[str, float]:
    """The parameters that the configuration asks for; the log-probs in the loss are at its `temperature`."""
    extra = getattr(trainer.args, "generation_kwargs", None) or {}
    asked = parameters({name: getattr(trainer.args, name, None) for name in parameters({})} | dict(extra))
    return asked | {"temperature": float(trainer.temperature)}


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def row_kinds(output: Mapping[str, Any]) -> list[Literal["image", "text"]]:
    """`image` for each row of a generation whose prompt holds one, else `text`."""
    counts = output.get("num_images") or [0] * len(output["prompt_ids"])
    return ["image" if count else "text" for count in counts]


def row_keys(output: Mapping[str, Any]) -> list[tuple[Any, ...] | None]:
    """For each row a key of prompt and images, known by the sum over their patches, which one pass on the device gives;
    None where the model's images cannot be told apart row by row."""
    prompts, masks = output["prompt_ids"], output["prompt_mask"]
    ids = [zlib.crc32(row[mask.bool()].cpu().numpy().tobytes()) for row, mask in zip(prompts, masks, strict=True)]
    pixels, counts = output.get("pixel_values"), output.get("num_images")
    if pixels is None or counts is None:
        return [(key,) for key in ids]
    grid = output.get("image_grid_thw")
    if grid is None:
        return [None if count else (key,) for key, count in zip(ids, counts, strict=True)]
    patches = iter(grid.prod(dim=-1).tolist())
    lengths = [sum(next(patches) for _ in range(count)) for count in counts]
    sums = [float(part.double().sum()) for part in pixels.split(lengths)]
    return [(key, total) for key, total in zip(ids, sums, strict=True)]
