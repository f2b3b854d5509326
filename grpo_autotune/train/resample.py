"""`resample`: places of zero-advantage groups go to groups of further prompts (DAPO's dynamic sampling, Yu et al. 2025,
arXiv:2503.14476, section 3.2).

It works inside TRL's scoring, between generation and all that follows: log-probs are computed for the rows that are
trained on, and no others. Prompts come in the data's own order, from the first rollout on, a rollout's worth at a time;
a group stays where it is, and only those that move into another rank's places are sent.

Legend: n rows of this process, N of all processes, P groups, G completions of a group, F reward functions.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import SequentialSampler
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import RepeatSampler

from grpo_autotune.config.sections.sampled import Resample
from grpo_autotune.records.probe import ResampleFacts
from grpo_autotune.seams.layers import INNER, Next
from grpo_autotune.seams.stored_images import image_columns
from grpo_autotune.seams.table import PREPARE_INPUTS, wrap_rows, wrap_seams
from grpo_autotune.speedups.batches.skip_dead import living_rows
from grpo_autotune.units import plural

CARRIED = "resample"
"""Key of `trainer.carried`: prompts drawn so far."""

Row = tuple[Any, ...]
"""A row: its data, prompt, prompt ids, completion ids, completion, log-probs, images, and what rewards log of it."""
IMAGES = 6
"""Place of the images in a row."""


class Resampling:
    """The layers on one trainer, and what they did."""

    def __init__(self, trainer: Any, wish: Resample, say: Callable[[str], None]) -> None:
        self._trainer, self._wish, self._say = trainer, wish, say
        self._order: Iterator[int] | None = None
        self._data: Any = None
        self._trains = False
        self._inputs: list[Any] | None = None  # rows that are being scored; None outside of training
        self._rewards_NF: torch.Tensor | None = None  # those of the chosen rows, until TRL asks for them
        self.facts = ResampleFacts()
        outside = INNER - 3  # around all that see a rollout, and inside of the probe
        wrap_rows(trainer, [(PREPARE_INPUTS, self._prepare)], outside)
        wrap_seams(trainer, outside, score=self._score, rollout=self._rollout)
        wrap_seams(trainer, INNER + 5, rewards=self._rewards)  # inside of all that learn from rewards

    def _prepare(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        self._trains = self._trainer.model.training
        try:
            return call_next(*args, **kwargs)
        finally:
            self._trains = False

    def _score(self, call_next: Next, /, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """The rows of the data that come next, in place of those that the loader has."""
        if not self._trains:
            return call_next(inputs, *args, **kwargs)
        self._inputs = inputs
        inputs[:] = self._draw(len(inputs))
        try:
            return call_next(inputs, *args, **kwargs)
        finally:
            self._inputs = self._rewards_NF = None

    def _rewards(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        chosen_NF, self._rewards_NF = self._rewards_NF, None
        return call_next(*args, **kwargs) if chosen_NF is None else chosen_NF

    def _rollout(self, call_next: Next, /, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        if (inputs := self._inputs) is None:
            return call_next(prompts, *args, **kwargs)
        rows, rewards_NF = self._round(call_next, prompts)
        lives_P, rounds, begin = self._lives(rewards_NF), 1, time.perf_counter()
        kept, sums, pictured = rewards_NF.clone(), [self._mean(rewards_NF)], any(row[IMAGES] for row in rows)
        while not lives_P.all() and rounds < self._wish.max_rounds:
            inputs[:] = self._draw(len(inputs))
            prompts[:] = prompts_of(inputs)
            further, rewards_NF = self._round(call_next, prompts)
            rounds, came_P = rounds + 1, self._lives(rewards_NF)
            sums.append(self._mean(rewards_NF))
            places, sources = (~lives_P).nonzero().flatten().tolist(), came_P.nonzero().flatten().tolist()
            pairs, group = zip(places, sources, strict=False), self._trainer.num_generations
            moves = [(place * group + n, source * group + n) for place, source in pairs for n in range(group)]
            self._move(moves, further, rows)
            for place, source in moves:
                kept[place] = rewards_NF[source]
            lives_P = self._lives(kept)
        self._note(rounds, lives_P, sums, time.perf_counter() - begin)
        self._rewards_NF = kept
        return self._chosen(rows, inputs, prompts, pictured=pictured)

    def _round(self, call_next: Next, prompts: list[Any]) -> tuple[list[Row], torch.Tensor]:
        """Completions of this process's prompts, row by row, and the rewards of all processes' (N, F)."""
        trainer, inputs = self._trainer, list(self._inputs or ())
        prompt_ids, ids, _, completions, logprobs, _, images, _ = call_next(prompts)
        rewards_NF = trainer._calculate_rewards(self._inputs, prompts, completions, ids)
        nothing = [None] * len(inputs)
        extra = trainer._pending_extra_logs
        logged = [{name: values[row] for name, values in extra.items()} for row in range(len(ids))]
        extra.clear()
        columns = (inputs, prompts, prompt_ids, ids, completions, logprobs or nothing, images or nothing, logged)
        return list(zip(*columns, strict=True)), rewards_NF

    def _lives(self, rewards_NF: torch.Tensor) -> torch.Tensor:
        """True for each group whose rewards differ, (P,)."""
        trainer, weights_F = self._trainer, self._trainer.reward_weights
        if self._wish.reward is not None:
            only = [trainer.reward_func_names.index(self._wish.reward)]
            rewards_NF, weights_F = rewards_NF[:, only], torch.ones(1)
        group = trainer.num_generations
        return living_rows(rewards_NF, weights_F, group).view(-1, group).any(dim=1)

    def _mean(self, rewards_NF: torch.Tensor) -> float:
        weighted_NF = rewards_NF * self._trainer.reward_weights.to(rewards_NF)
        return float(weighted_NF.nansum(dim=1)[~rewards_NF.isnan().all(dim=1)].mean())

    def _move(self, moves: Sequence[tuple[int, int]], further: Sequence[Row], rows: list[Row]) -> None:
        """Put rows of a further round into their places, on whichever process these are."""
        first = self._trainer.accelerator.process_index * len(rows)
        mine = range(first, first + len(rows))
        sent = {place: further[source - first] for place, source in moves if source in mine}
        if self._trainer.accelerator.num_processes > 1:
            abroad = {place: row for place, row in sent.items() if place not in mine}
            for others in gather_object([abroad]):
                sent |= others
        for place in sent.keys() & set(mine):
            rows[place - first] = sent[place]

    def _chosen(self, rows: list[Row], inputs: list[Any], prompts: list[Any], *, pictured: bool) -> tuple[Any, ...]:
        """The chosen rows as TRL's `_generate` returns them; the lists that TRL goes on with hold them, too. Where the
        first rows were `pictured` TRL would take their images if it were given none."""
        data, texts, prompt_ids, ids, completions, logprobs, images, logged = map(list, zip(*rows, strict=True))
        inputs[:], prompts[:] = data, texts
        for name in dict.fromkeys(name for row in logged for name in row):
            self._trainer._pending_extra_logs[name].extend(row.get(name) for row in logged)
        given = logprobs if any(logprobs) else None
        return prompt_ids, ids, None, completions, given, {}, images if pictured or any(images) else None, []

    def _note(self, rounds: int, lives_P: torch.Tensor, means: Sequence[float], seconds: float) -> None:
        """Log a rollout, and say it once where the rounds were not enough."""
        groups, dead, facts = len(lives_P), int((~lives_P).sum()), self.facts
        if dead and not facts.dead_groups:
            told = f"{dead} of {plural(groups, 'group')} have equal rewards after {rounds} rounds, and stay as they are"
            self._say(f"step {self._trainer.state.global_step + 1}: resample: {told} (resample/dead logs their share)")
        for name, number in {"rounds": rounds, "dead": dead / groups, "reward": sum(means) / len(means)}.items():
            self._trainer._metrics["train"][f"resample/{name}"].append(number)
        self.facts = ResampleFacts(
            rollouts=facts.rollouts + 1,
            rounds=facts.rounds + rounds,
            groups=groups,
            dead_groups=facts.dead_groups + dead,
            further_s=facts.further_s + (seconds if rounds > 1 else 0.0),
        )

    def _draw(self, count: int) -> list[Any]:
        """This process's rows of the next prompts, G of each, of which a rollout has P."""
        trainer = self._trainer
        group, first = trainer.num_generations, trainer.accelerator.process_index * count
        size = count * trainer.accelerator.num_processes // group
        drawn = trainer.carried.setdefault(CARRIED, 0)
        if self._order is None:  # not before: a checkpoint may say how far it is
            how = {"description": "Training", "batch_size": trainer.accelerator.num_processes}  # of which nothing comes
            loader = trainer._get_dataloader(dataset=trainer.train_dataset, sampler_fn=SequentialSampler, **how)
            self._data = loader.dataset
            epoch = RepeatSampler(self._data, 1, shuffle=trainer.shuffle_dataset, seed=trainer.args.seed)
            self._order = itertools.chain.from_iterable(itertools.repeat(epoch))
            next(itertools.islice(self._order, drawn, drawn), None)
        prompts = list(itertools.islice(self._order, size))
        trainer.carried[CARRIED] = drawn + size
        return [self._data[prompts[row // group]] for row in range(first, first + count)]


def prompts_of(rows: Sequence[Any]) -> list[Any]:
    """Prompts with the images of their rows in them, as `_generate_and_score_completions` makes them (TRL 1.16)."""
    prompts = [row["prompt"] for row in rows]
    if not image_columns(rows[0]):
        return prompts
    images = [row["images"] if "images" in row else row["image"] and [row["image"]] for row in rows]
    if all(some == [] for some in images):
        return prompts
    return [prepare_multimodal_messages(prompt, images=some) for prompt, some in zip(prompts, images, strict=True)]
