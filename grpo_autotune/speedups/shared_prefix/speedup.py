"""shared_prefix: prompt, images and vision tower go through the model once per group, not once per completion.

TRL scores a batch of G completions of one prompt as G rows of prompt and completion, in the old-policy, reference and
training passes alike. Here the batch becomes one flat sequence in which a prompt is followed by its completions
(`layout`), attention keeps the completions apart (`attention`), and TRL's own fused head
turns the hidden states of the scored tokens into log-probs. All of it happens inside one call of the model that TRL
would have called, so that DistributedDataParallel, autocast, adapters and gradient checkpointing work as before.
Where ranks are in step, each runs as many forwards as the one that needs most, the surplus on one row.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl.trainer import utils

from grpo_autotune.seams.layers import INNER, AttributeSlot, Handle, Next, wrap
from grpo_autotune.seams.ranks import InStep, forward_in_step, most
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.seams.trainer_access import (
    BOTH_KEYS,
    base_of,
    compute_dtype,
    has_fused_head,
    models_of,
    without_dropout,
)
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.batches.groups import KNOWN, Groups, groups_of
from grpo_autotune.speedups.batches.order import depends_on_partition, sort_rows
from grpo_autotune.speedups.batches.rows import widened
from grpo_autotune.speedups.conditions import GENERATION, MICRO_BATCH, active_dropout, overridden, waits
from grpo_autotune.speedups.selfcheck import SelfCheck
from grpo_autotune.speedups.shared_prefix.applies import masks_of_its_own, why_not
from grpo_autotune.speedups.shared_prefix.attention import ARGUMENT, AttentionLayer
from grpo_autotune.speedups.shared_prefix.choice import AUTO, FLEX, Choice, candidates
from grpo_autotune.speedups.shared_prefix.gated_mlp import wrap_gated
from grpo_autotune.speedups.shared_prefix.layout import Batch, Layout, batch_of, chunks, known_of, layout_of
from grpo_autotune.speedups.shared_prefix.media import INPUTS, Media

WORTH = 0.95
"""Share of TRL's tokens above which a batch is left to TRL: the savings would not pay for the calls that they cost."""

NO_GRAD_CHUNK = 4
"""Tokens of a pass without gradients, as a multiple of those that TRL would take at once: it keeps one layer's
activations where a training pass keeps those of all layers, or, checkpointed, all layers' inputs beside one layer's
activations several times over. With a micro batch smaller than a group this is what lets the group share its prompt."""

Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probs and entropies (B, C), and the router's auxiliary loss, as TRL's method returns them."""

SETTINGS = ("batch_size", "compute_entropy", "compute_aux_loss")
"""Arguments of that method that are no inputs of the model."""

Kind = tuple[bool, bool, bool]
"""Of a row: its prompt is padded (a model may count positions by the mask), it has images (a model may look at them
both ways), its completion looks back at itself. A model that passes on one kind may fail on another."""

KINDS: tuple[Kind, ...] = tuple(itertools.product((False, True), (False, True), (False, True)))


class SharedPrefix:
    """As `speedups.base.SpeedUp`. `form: auto` is `cascade` on a CPU and `split` elsewhere; on CUDA `cascade` and
    `flex` (FlexAttention) are taken where they are measured to be faster. `dropout: shared` goes on where adapters have
    dropout, with one mask for a group's prompt: not exact; `own` leaves such a model to TRL."""

    name = "shared_prefix"
    summary = "prompt, images and vision tower once per group in log-probs and backward"
    stands_for = (*GENERATION, "_get_per_token_logps_and_entropies", "model.forward")

    def __init__(self, form: str = AUTO, dropout: str = "own") -> None:
        self._form, self._one_mask = form, dropout == "shared"

    def applies(self, trainer: Any) -> str | None:
        return why_not(trainer, one_mask=self._one_mask)

    def install(self, trainer: Any) -> Installed:
        return _SharedPrefix(trainer, self._form)


class _SharedPrefix(Installed):
    """The speed-up on one trainer."""

    def __init__(self, trainer: Any, form: str) -> None:
        super().__init__(SharedPrefix.name)
        self.trainer = trainer
        self.checks: dict[Kind, SelfCheck] = {}
        self.passes = {"shared": 0, "plain": 0}
        self.tokens = {"shared": 0, "plain": 0}
        device = trainer.accelerator.device
        self.forms = Choice(next(iter(candidates(device, form)), None))
        self._no_form = f"FlexAttention needs CUDA, and this is {device.type}" if form == FLEX else ""
        self._own_masks = masks_of_its_own(base_of(trainer.model))
        self._groups = groups = groups_of(trainer)
        try:
            self.handles += wrap_seams(trainer, INNER, logps=self._scores_layer(groups), score=self._score)
            self.handles += [_wrap_backbone(model) for model in models_of(trainer)]
            self.handles += wrap_gated(trainer.model, lambda: self.fell_back is None)
            kinds = {base_of(model).config.get_text_config()._attn_implementation for model in models_of(trainer)}
            self.handles += [AttentionLayer(kind) for kind in sorted(kinds)]
            if depends_on_partition(trainer) is None:
                self.handles += sort_rows(trainer, "group")
        except BaseException:
            self.remove()
            raise

    @property
    def exact(self) -> bool:
        return active_dropout(self.trainer.model) is None

    @property
    def note(self) -> str:
        """The form of attention, where there is a choice or one was asked for; and what is not exact."""
        mask = "" if self.exact else "not exact: one dropout mask for the prompt of a group"
        return "; ".join(filter(None, (mask, self.forms.note() or self._no_form)))

    def facts(self) -> dict[str, float]:
        """Passes by either path, and the tokens of the shared ones beside what TRL would have forwarded; where there is
        a choice, the passes that took another form of attention and how many times faster it was at best."""
        return self.forms.facts() | {
            "shared_passes": self.passes["shared"],
            "plain_passes": self.passes["plain"],
            "tokens": self.tokens["shared"],
            "tokens_of_plain": self.tokens["plain"],
            "self_check_difference": max((check.difference for check in self.checks.values()), default=0.0),
        }

    def _score(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """Have the rows of a generation carry what the host has to know of them, where a device would be waited for.

        Not where somebody else's method sees micro batches, and may change them."""
        output = call_next(*args, **kwargs)
        device = output["prompt_ids"].device
        if self.fell_back is not None or not waits(device) or overridden(self.trainer, MICRO_BATCH) is not None:
            return output
        ids, mask = (
            torch.cat([output[f"prompt_{what}"], output[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
        )
        group_B = self._groups.of_generation(len(ids))
        media = {key: output[key] for key in INPUTS if key in output}
        known_B = known_of(batch_of(ids, mask, output["completion_ids"].shape[1], group_B, media))
        return output if known_B is None else {**output, KNOWN: known_B}

    def _scores_layer(self, groups: Groups) -> Callable[..., Scores]:
        def scores(
            call_next: Callable[..., Scores], /, model: Any, ids_BW: Any, mask_BW: Any, width_C: int, *size: Any,
            **given: Any,
        ) -> Scores:  # fmt: skip
            given |= zip(SETTINGS, size, strict=False)  # TRL before 1.14 gives one of them by its place
            media = {name: value for name, value in given.items() if name not in SETTINGS}
            batch = rows = None
            if groups.current is not None and self._takes(groups.current, len(ids_BW), given):
                batch = batch_of(ids_BW, mask_BW, width_C, groups.current, media, groups.known)
                rows = self._rows(batch, given.get("batch_size"))

            def one_row() -> torch.Tensor:
                alone = self.trainer.accelerator.unwrap_model(model)
                images = Media(media, len(ids_BW)).as_given([0])
                return call_next(alone, ids_BW[:1], mask_BW[:1], width_C, **images)[0]

            samples = {} if batch is None or rows is None else _samples(batch)
            passes = len(rows) if rows else math.ceil(len(ids_BW) / (given.get("batch_size") or len(ids_BW)))
            asked = [*(kind in samples for kind in KINDS), passes]
            *kinds, most_passes = most(asked, self.trainer, forward_in_step(self.trainer))
            passed = all(
                self._checked(kind, samples.get(kind), one_row, call_next, model, batch)
                for kind in itertools.compress(KINDS, kinds)
            )
            if batch is None or rows is None or not passed:
                self.passes["plain"] += 1
                scores_of_all = call_next(model, ids_BW, mask_BW, width_C, **given)
            else:
                scores_of_all = self._shared_scores(model, batch, rows, given.get("compute_entropy", False))
            with torch.no_grad():
                for _ in range(most_passes - passes if passed else 0):
                    one_row()
            return scores_of_all

        return scores

    def _takes(self, group_B: torch.Tensor | None, rows: int, given: dict[str, Any]) -> bool:
        known = group_B is not None and len(group_B) == rows
        return known and not (self.fell_back or given.get("compute_aux_loss"))

    def _shared_scores(self, model: Any, batch: Batch, rows: list[list[int]], compute_entropy: bool) -> Scores:
        self.passes["shared"] += 1
        self.tokens["shared"] += sum(batch.tokens(chunk) for chunk in rows)
        self.tokens["plain"] += batch.input_ids.numel()
        parts = [self._shared(model, batch, chunk, compute_entropy) for chunk in rows]
        entropies = torch.cat([entropy for _, entropy in parts]) if compute_entropy else None
        return torch.cat([logps for logps, _ in parts]), entropies, None

    def _rows(self, batch: Batch, batch_size: int | None) -> list[list[int]] | None:
        """The rows of each forward pass, `NO_GRAD_CHUNK` times the tokens of TRL's at most; None where TRL is to do it.

        TRL cuts only passes without gradients into chunks."""
        if not any(batch.completion_lengths):
            return None
        reason = batch.media.why_not(batch.completion_width)
        if reason is None and batch.media.images[-1]:
            reason = self._own_masks
        if reason is not None:
            self.fall_back(reason)
            return None
        count, width = batch.input_ids.shape
        everything = list(range(count))
        plain = count * width
        passes = [everything] if batch_size is None else list(chunks(batch, NO_GRAD_CHUNK * batch_size * width))
        shared = sum(batch.tokens(chunk) for chunk in passes)
        return None if shared > WORTH * plain else passes

    def _checked(
        self,
        kind: Kind,
        rows: list[int] | None,
        one_row: Callable[[], torch.Tensor],
        call_next: Callable[..., Scores],
        model: Any,
        batch: Batch | None,
    ) -> bool:
        """True if two completions of a kind, of one prompt if there are such, score the same by both paths; a rank that
        has no such `rows` runs `one_row` with those that do."""
        check = self.checks.setdefault(kind, SelfCheck(self, InStep(self.trainer)))
        if check.passed is not None:
            return check.passed
        alone = self.trainer.accelerator.unwrap_model(model)
        text = base_of(alone).config.get_text_config()
        dtype = getattr(torch, compute_dtype(self.trainer))
        relative = getattr(text, "rope_parameters", None) is not None  # else a column is a position
        if batch is None or rows is None:
            with without_dropout(alone):
                return check.run(one_row, one_row, dtype, "log-probs", one_row if relative else None)
        ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
        inputs = {"input_ids": ids, "attention_mask": mask, **batch.media.as_given(rows)}

        def plain(inputs: dict[str, Any] = inputs) -> torch.Tensor:
            media = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
            return call_next(alone, inputs["input_ids"], inputs["attention_mask"], batch.completion_width, **media)[0]

        def wider() -> torch.Tensor:
            return plain(widened(inputs, getattr(text, "pad_token_id", None) or 0))

        def shared() -> torch.Tensor:
            return self._shared(alone, batch, rows, False, self.forms.watching)[0]

        with without_dropout(alone):
            return check.run(plain, shared, dtype, "log-probs", wider if relative else None)

    def _shared(
        self,
        model: Any,
        batch: Batch,
        rows: Sequence[int],
        entropies: bool,
        with_form: Callable[[Layout], Layout] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of some rows, (rows, C), in one forward pass."""
        layout = layout_of(batch, rows)
        with self.trainer.accelerator.autocast():
            layout = (with_form or self.forms.made)(layout)
            inputs = _inputs(base_of(self.trainer.accelerator.unwrap_model(model)), batch, layout)
            scores = self._head(model, inputs, batch.input_ids.reshape(-1)[layout.target][None], layout, entropies)
        shape = (len(rows), batch.completion_width)
        logps, entropy = (
            value.new_zeros(math.prod(shape)).index_copy(0, layout.place, value[0]).view(shape) for value in scores
        )
        return logps, entropy

    def _head(
        self, model: Any, inputs: dict[str, Any], target: torch.Tensor, layout: Layout, entropies: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the scored tokens, (1, scored): by TRL's fused head, before 1.15 from logits."""
        trainer = self.trainer
        if has_fused_head():
            outputs = model(**inputs, shift_labels=target, fused_lm_head=True, **{ARGUMENT: layout})
            return outputs.log_probs, outputs.entropy if entropies else outputs.log_probs
        logits = model(**inputs, use_cache=False, **{ARGUMENT: layout}).logits / trainer.temperature
        logps = utils.selective_log_softmax(logits, target)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainer._entropy_bonus_enabled):
            return logps, utils.entropy_from_logits(logits) if entropies else logps


def _samples(batch: Batch) -> dict[Kind, list[int]]:
    """Two rows for each kind that the batch holds, of one prompt if there are such."""
    pairs: dict[Kind, list[int]] = {}
    strangers: dict[Kind, list[int]] = {}
    first: dict[int, int] = {}
    for row, group in enumerate(batch.groups):
        if not batch.completion_lengths[row]:
            continue  # nothing of it is scored
        images = batch.media.images
        kind = (
            batch.prompt_lengths[row] < batch.prompt_width,
            images[row + 1] > images[row],
            batch.completion_lengths[row] > 1,
        )
        other = first.setdefault(group, row)
        if other != row:
            pairs.setdefault(kind, [other, row])
        else:
            strangers.setdefault(kind, sorted({row, (row + 1) % len(batch.groups)}))
    return strangers | pairs


def _inputs(base: Any, batch: Batch, layout: Layout) -> dict[str, Any]:
    """Model inputs of a flat sequence; the 4-D mask is a placeholder that transformers hands on unread."""
    flat = {
        key: batch.media.given[key].reshape(-1)[layout.source][None] for key in BOTH_KEYS if key in batch.media.given
    }
    images = batch.media.of(layout.first_rows)
    return {
        "input_ids": batch.input_ids.reshape(-1)[layout.source][None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        "position_ids": _positions(base, batch, layout, images),
        **flat,
        **images,
    }


def _positions(base: Any, batch: Batch, layout: Layout, images: dict[str, Any]) -> torch.Tensor:
    """The positions that TRL's rows give these tokens: the model's own for images, else the column."""
    compute = getattr(base.base_model, "compute_3d_position_ids", None)
    if compute is not None and "image_grid_thw" in images:
        first = layout.first
        mask = batch.attention_mask[first].clone()
        mask[:, batch.prompt_width :] = 1
        positions = compute(
            input_ids=batch.input_ids[first],
            inputs_embeds=None,
            image_grid_thw=images["image_grid_thw"],
            video_grid_thw=None,
            past_key_values=None,
            attention_mask=mask,
            mm_token_type_ids=batch.media.given["mm_token_type_ids"][first],
        )
        flat_positions: torch.Tensor = positions[:, layout.prompt, layout.column][:, None]
        return flat_positions
    return layout.column[None]


def _wrap_backbone(model: Any) -> Handle:
    """Keep of the flat sequence the hidden states of the tokens to be scored, before TRL's head sees them."""

    def forward(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        outputs = call_next(*args, **kwargs)
        layout = kwargs.get(ARGUMENT)
        if layout is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, layout.scored]
        return outputs

    return wrap(AttributeSlot(base_of(model).base_model, "forward"), forward, INNER)
