"""Which form of a shared prompt is faster: one flat sequence, or the completions against the prompt's cache.

    python -m benchmarks.prefix_forms [--cases 768px text ...] [--forms plain flat cascade cache] [--rounds 6] [--add]

`shared_prefix` sends one row a group, the prompt followed by its completions, through the model. `flat` cuts attention
into the prompt by itself and the completions as a batch whose keys are copies of the prompt's and their own (`split`);
`cascade` has prompts, completions, and completions against their prompt as calls of flash attention that are merged.
`cache` runs the model twice: on the prompt with
`use_cache=True`, and on the completions as a batch against the prompt's keys and values, repeated once a completion
(`DynamicCache.batch_repeat_interleave`); gradients flow through the cache. Gradient checkpointing forbids a cache, so
that form can only serve passes without gradients there; the training pass is measured without checkpointing.

One trainer a case, completions of random tokens and one length, all of a group in one micro batch. Both forms score
the same batch in turns within a round, and which comes first turns from round to round; a round before the first warms
up. Seconds are the processor's, torch runs on one thread: what else runs on the machine counts for little. A ratio is
that of the flat sequence's seconds to those of the cache in the same round: above 1 the cache is faster; `plain` is TRL
without a shared prompt. Memory is the most that torch held at one time of what it allocated in one training pass.
glibc maps and unmaps tensors of more than 32 MiB anew each time, which one form's may just reach where the other's do
not (cases `long` and `longer`), and gives memory back and takes it anew as its heap shrinks and grows. That is set
apart by `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184` in the environment, as in
`--cases text long 768px-256 --name prefix_forms_heap`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.result import FOLDER, ratio, write
from grpo_autotune.commands.imports import mend_torchvision

mend_torchvision()

import torch  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402

from benchmarks import speedups  # noqa: E402
from benchmarks.speedups import Case, alone, config_of, peak_bytes  # noqa: E402
from grpo_autotune.probe.startup import Startup  # noqa: E402
from grpo_autotune.seams.layers import INNER, AttributeSlot, wrap  # noqa: E402
from grpo_autotune.seams.table import find, wrap_rows  # noqa: E402
from grpo_autotune.seams.trainer_access import base_of  # noqa: E402
from grpo_autotune.speedups.batches.groups import groups_of  # noqa: E402
from grpo_autotune.speedups.install import speed_up  # noqa: E402
from grpo_autotune.speedups.shared_prefix.attention import ARGUMENT  # noqa: E402
from grpo_autotune.speedups.shared_prefix.choice import Choice, candidates  # noqa: E402
from grpo_autotune.speedups.shared_prefix.layout import Layout, Span  # noqa: E402
from grpo_autotune.train.trial_trainer import quiet_trainer  # noqa: E402

CASES = {**speedups.CASES, "longer": Case(0, 200, 1060)}
"""`long` is the case whose tensors are of more than 32 MiB in one form alone, `longer` in both."""

FORMS = ("flat", "cascade", "cache")
QUOTIENTS = (("flat", "cache"), ("flat", "cascade"), ("plain", "flat"), ("plain", "cascade"))
MEDIA = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
IMAGES = ("pixel_values", "image_grid_thw")


class Forms:
    """A trainer whose passes share prompts, in the form that `form` names."""

    def __init__(self, case: Case, size: str) -> None:
        self._form = "flat"
        self.trainer = quiet_trainer(config_of(case, size, checkpointing=False), Startup(), lambda line: None)
        self.installed = speed_up(self.trainer, ["shared_prefix"])
        wrap(AttributeSlot(base_of(self.trainer.model).base_model, "forward"), self._layer, INNER + 1)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batch = self._batch(case)

    @property
    def form(self) -> str:
        """Which form the next pass takes; `plain` leaves it to TRL."""
        return self._form

    @form.setter
    def form(self, form: str) -> None:
        self._form = form
        shared: Any = self.installed._installed["shared_prefix"]
        shared.fell_back = "its turn is over" if form == "plain" else None
        shared.forms = Choice(next(iter(candidates(torch.device("cpu"), form)), None))

    def _batch(self, case: Case) -> dict[str, Any]:
        """A generation batch of one group; TRL is handed random completions in place of its own."""
        generator = torch.Generator().manual_seed(0)
        digits = torch.tensor(self.trainer.processing_class(text="0 1 2 3 4 5 6 7 8 9")["input_ids"]).flatten()
        drawn = digits[torch.randint(len(digits), (case.generations, case.completion), generator=generator)].tolist()
        turn = wrap_rows(self.trainer, [(find("turn"), lambda call_next, *args, **kwargs: (drawn, None))])
        batch: dict[str, Any] = self.trainer._generate_and_score_completions(
            next(iter(self.trainer.get_train_dataloader()))
        )
        for handle in turn:
            handle.remove()
        batch["advantages"] = torch.randn(batch["advantages"].shape, generator=generator)
        return batch

    def scores(self) -> torch.Tensor:
        """The log-probs of a pass without gradients, such as that of the reference."""
        batch = self.batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        media = {key: batch[key] for key in MEDIA if key in batch}
        with torch.no_grad(), groups_of(self.trainer).under_way(batch["group_id"]):
            found: torch.Tensor = self.trainer._get_per_token_logps_and_entropies(
                self.trainer.model, ids, mask, batch["completion_ids"].shape[1], **media
            )[0]
        return found

    def backward(self) -> None:
        """A training pass, forward and backward."""
        self.trainer.model.zero_grad()
        self.trainer.compute_loss(self.trainer.model_wrapped, dict(self.batch)).backward()

    def train(self) -> torch.Tensor:
        """All gradients of a training pass, as one vector."""
        self.backward()
        gradients = [weight.grad.flatten() for weight in self.trainer.model.parameters() if weight.grad is not None]
        return torch.cat(gradients)

    def _layer(self, call_next: Callable[..., Any], /, **inputs: Any) -> Any:
        layout = inputs.get(ARGUMENT)
        if layout is None or self.form != "cache":
            return call_next(**inputs)
        parts = [self._group(call_next, inputs, layout, span) for span in layout.spans]
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(parts, dim=1))

    def _group(self, call_next: Callable[..., Any], inputs: dict[str, Any], layout: Layout, span: Span) -> torch.Tensor:
        """The hidden states of one prompt and its completions, (1, T, D), by way of the cache."""
        assert len(layout.spans) == 1 and span.spread is None, "one group, all of one length"
        prompt, rest = slice(span.start, span.prompt_end), slice(span.begin, span.end)
        length, ids, positions = span.prompt, inputs["input_ids"], inputs["position_ids"]
        kinds = inputs.get("mm_token_type_ids")
        cache = DynamicCache(config=base_of(self.trainer.model).config.get_text_config())
        first = call_next(
            input_ids=ids[:, prompt],
            position_ids=positions[..., prompt],
            attention_mask=ids.new_ones(1, length),
            past_key_values=cache,
            use_cache=True,
            **{key: inputs[key] for key in IMAGES if key in inputs},
            **({} if kinds is None else {"mm_token_type_ids": kinds[:, prompt]}),
        )
        cache.batch_repeat_interleave(span.rows)
        own = positions[..., rest]
        second = call_next(
            input_ids=ids[:, rest].view(span.rows, span.width),
            position_ids=own.reshape(*own.shape[:-2], span.rows, span.width),
            attention_mask=ids.new_ones(span.rows, length + span.width),
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([first.last_hidden_state, second.last_hidden_state.flatten(0, 1)[None]], dim=1)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def measure(name: str, options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Rows and ratios of one case."""
    forms = Forms(CASES[name], options.size)
    order = options.forms
    works: dict[str, Callable[[], torch.Tensor]] = {"without gradients": forms.scores, "training": forms.train}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    for what, work in works.items():
        seconds: dict[str, list[float]] = {form: [] for form in order}
        found: dict[str, torch.Tensor] = {}
        for number in range(options.rounds + 1):
            for forms.form in order if number % 2 else order[::-1]:
                begin = time.process_time()
                found[forms.form] = work()
                seconds[forms.form].append(time.process_time() - begin)
        rows += [
            {"case": name, "pass": what, "round": number, "form": form, "seconds": second}
            for form in order
            for number, second in enumerate(seconds[form])
            if number  # the first warms up
        ]
        for one, other in QUOTIENTS:
            if {one, other} <= {*order}:
                pairs = list(zip(seconds[one], seconds[other], strict=True))[1:]
                ratios[f"{name}: {what}, {one} over {other}"] = ratio([a / b for a, b in pairs])
                difference = apart(found[one], found[other])
                rows.append({"case": name, "pass": what, "forms": [one, other], "difference": difference})
    memory = {}
    for forms.form in order:
        memory[forms.form] = peak_bytes(forms.backward)
    for one, other in QUOTIENTS:
        if {one, other} <= {*order}:
            ratios[f"{name}: memory of the training pass, {one} over {other}"] = alone(memory[one] / memory[other])
    rows.append({"case": name, "training_pass_bytes": memory, "facts": forms.installed.facts()["shared_prefix"]})
    return rows, ratios


def main() -> None:
    """Measure every case asked for and write `docs/benchmarks/prefix_forms.json`."""
    parser = argparse.ArgumentParser(description="A shared prompt as one sequence against its cache.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--forms", nargs="+", choices=["plain", *FORMS], default=["flat", "cache"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", choices=["14m", "100m"], default="14m")
    parser.add_argument("--name", default="prefix_forms")
    parser.add_argument("--add", action="store_true", help="keep what a file that is there says of other cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = FOLDER / f"{options.name}.json"
    before = json.loads(file.read_text()) if options.add and file.exists() else {"rows": [], "ratios": {}}
    rows: list[Any] = before["rows"]
    ratios: dict[str, Any] = before["ratios"]
    for case in options.cases:
        found, more = measure(case, options)
        rows, ratios = rows + found, ratios | more
        for row in found:
            if "difference" in row:
                sys.stderr.write(f"{case}: {row['pass']}: {row['difference']:.1e} apart\n")
        for name, value in more.items():
            sys.stdout.write(f"{value['median']:7.3f}  {value['low']:.3f} .. {value['high']:.3f}  {name}\n")
        sys.stdout.flush()
        write(options.name, f"python -m benchmarks.{' '.join(['prefix_forms', *sys.argv[1:]])}", rows, ratios)


if __name__ == "__main__":
    main()
