"""A speed-up is off where it would stand in for code that is not TRL's, so that what is learned stays the same."""

from __future__ import annotations

import functools
import random
from types import MethodType

import pytest

torch = pytest.importorskip("torch")
from accelerate.hooks import ModelHook, add_hook_to_module  # noqa: E402
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor, TrainerCallback  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from grpo_autotune import speed_up  # noqa: E402
from grpo_autotune.seams.trainer_access import base_of  # noqa: E402
from grpo_autotune.speedups.base import Installed  # noqa: E402
from grpo_autotune.speedups.conditions import LOSS, overridden  # noqa: E402
from tests.support.pairs import gap, weights_of  # noqa: E402
from tests.support.trainers import make_trainer  # noqa: E402

BATCH = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "loss_type": "grpo",
}
GROUPS = ["shared_prefix", "skip_dead", "length_sort"]


def by_length(completion_ids, prompts, **kwargs):
    """Equal for all but the first prompt: the other groups are dead."""
    first = ["0" in prompt[0]["content"] for prompt in prompts]
    return [float(sum(ids) % 7) if living else 1.0 for ids, living in zip(completion_ids, first, strict=True)]


def penalised(original):
    def loss(self, *args, **kwargs):
        pull = sum((weight.float() ** 2).sum() for weight in self.model.parameters() if weight.requires_grad)
        return original(self, *args, **kwargs) + 0.01 * pull

    return loss


def clamped(original):
    @functools.wraps(original)  # which gives it TRL's own name and module
    def logps(self, *args, **kwargs):
        scores = original(self, *args, **kwargs)
        return (torch.clamp(scores[0], min=-6.0), *scores[1:])

    return logps


class Revived(GRPOTrainer):
    """Groups of equal rewards are pushed away from what they said."""

    def _prepare_inputs(self, generation_batch):
        batch = dict(super()._prepare_inputs(generation_batch))
        advantages = batch["advantages"]
        return batch | {"advantages": torch.where(advantages.abs() < 1e-3, -torch.ones_like(advantages), advantages)}


class Halved(GRPOTrainer):
    """Only the better half of a micro batch is trained on."""

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        kept = batch["advantages"].argsort(descending=True)[: len(batch["advantages"]) // 2]
        return {key: value[kept] if torch.is_tensor(value) and value.ndim else value for key, value in batch.items()}


class Mine(Halved):
    """A subclass of a subclass, with nothing of its own."""


def subclass(cls):
    def change(trainer, monkeypatch):
        trainer.__class__ = cls

    return change


def on_class(method, wrapper):
    def change(trainer, monkeypatch):
        monkeypatch.setattr(GRPOTrainer, method, wrapper(getattr(GRPOTrainer, method)))

    return change


def on_trainer(method, wrapper):
    def change(trainer, monkeypatch):
        setattr(trainer, method, MethodType(wrapper(getattr(GRPOTrainer, method)), trainer))

    return change


def around_trainers_own(method, wrapper):
    """As a decorator does it, with the names and the marks of what the trainer has."""

    def change(trainer, monkeypatch):
        own = getattr(trainer, method)
        changed = functools.partial(wrapper(lambda self, *args, **kwargs: own(*args, **kwargs)), trainer)
        setattr(trainer, method, functools.wraps(own)(lambda *args, **kwargs: changed(*args, **kwargs)))

    return change


LOGPS = "_get_per_token_logps_and_entropies"
LOSS_OFF, ROWS_OFF = {"skip_dead", "length_sort"}, {"length_sort"}
CHANGES = {
    "a loss on the class": (on_class("compute_loss", penalised), LOSS_OFF),
    "TRL's inner loss on the class": (on_class("_compute_loss", penalised), LOSS_OFF),
    "a loss on the trainer": (on_trainer("compute_loss", penalised), LOSS_OFF),
    "a loss around the trainer's own": (around_trainers_own("compute_loss", penalised), LOSS_OFF),
    "log-probs on the class": (on_class(LOGPS, clamped), {"shared_prefix"}),
    "log-probs on the trainer": (on_trainer(LOGPS, clamped), {"shared_prefix"}),
    "revived groups": (subclass(Revived), ROWS_OFF),
    "rows left out": (subclass(Mine), ROWS_OFF),
}
"""What is changed, and the speed-ups that it turns off."""


@pytest.mark.parametrize("what", CHANGES)
def test_what_somebody_changed_is_learned_as_without_speed_ups(tiny, tmp_path, text_rows, monkeypatch, what):
    change, off = CHANGES[what]

    def run(names, late=False):
        with monkeypatch.context() as patch:
            trainer = make_trainer(
                tiny("qwen3"), text_rows, tmp_path, optim="sgd", learning_rate=0.05, rewards=[by_length], **BATCH
            )
            if not late:
                change(trainer, patch)
            speedups = speed_up(trainer, names)
            if late:
                change(trainer, patch)
            trainer.train()
            return weights_of(trainer), {row.name for row in speedups.table() if row.on}

    plain, _ = run("none")
    for late in (False, True):
        mine, on = run(GROUPS, late)
        assert gap(mine, plain) < 1e-6, f"changed {'after' if late else 'before'} speed_up"
        assert on == set(GROUPS) - off


@pytest.mark.parametrize("method", LOSS)
def test_a_wrapper_that_bears_trls_name_is_told_apart(tiny, tmp_path, text_rows, monkeypatch, method):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert overridden(trainer, LOSS) is None
    monkeypatch.setattr(GRPOTrainer, method, functools.wraps(getattr(GRPOTrainer, method))(lambda self: None))
    reason = overridden(trainer, LOSS)
    assert reason is not None and f"GRPOTrainer's `{method}` was replaced by" in reason and __name__ in reason


def test_a_forward_of_another_library_is_told_apart(tiny, tmp_path, text_rows, monkeypatch):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert overridden(trainer, ("model.forward", "model.generate")) is None
    base = type(trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model)
    plain = base.forward
    monkeypatch.setattr(base, "forward", lambda self, *args, **kwargs: plain(self, *args, **kwargs))
    speedups = speed_up(trainer, ["shared_prefix"])
    (row,) = [row for row in speedups.table() if row.name == "shared_prefix"]
    assert not row.on and "`forward` was replaced by" in row.reason


def test_hooks_of_accelerate_are_no_foreign_forward(tiny, tmp_path, text_rows):
    """It puts them on a model that lies on several devices, as a partial function."""
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    base = base_of(trainer.model)
    add_hook_to_module(base, ModelHook())
    assert overridden(trainer, ("model.forward",)) is None
    base.forward = functools.partial(penalised(base.forward), trainer)
    assert "`forward` was replaced by" in overridden(trainer, ("model.forward",))


def test_generate_of_the_model_with_its_adapters_is_asked(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **BATCH)
    assert base_of(trainer.model) is not trainer.model
    own = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    rows = {row.name: row for row in speed_up(trainer, ["shared_prefill", "merge_for_generation"]).table()}
    for name in ("shared_prefill", "merge_for_generation"):
        assert not rows[name].on and "`generate` was replaced by" in rows[name].reason


class Own:
    """Somebody's own speed-up."""

    name, summary, stands_for = "own", "does nothing", ("_clip_grad_norm",)

    def applies(self, trainer):
        return None

    def install(self, trainer):
        return Installed(self.name)


def test_a_method_of_somebodys_own_speed_up_is_asked_again_when_training_begins(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **{**BATCH, "max_steps": 1})
    name = f"{__name__}:Own"
    speedups = speed_up(trainer, [name])
    own = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda *args, **kwargs: own(*args, **kwargs)
    trainer.train()
    row = next(row for row in speedups.table() if row.name == name)
    assert not row.on and "`_clip_grad_norm` was replaced by" in row.reason


class Doubled(GRPOTrainer):
    """Every row is trained on twice."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {key: torch.cat([value] * 2) if getattr(value, "ndim", 0) else value for key, value in output.items()}


def test_somebodys_own_scoring_may_return_more_rows(tiny, tmp_path, text_rows):
    half_groups = {**BATCH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path, **half_groups)
    trainer.__class__ = Doubled
    speedups = speed_up(trainer)
    trainer.train()
    assert {row.name for row in speedups.table() if row.on} == {"merge_passes", "merge_for_generation", "fused_lora"}


class OwnKl(GRPOTrainer):
    """A squared distance of log-probs from those without the adapter, beside TRL's loss."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        ids, mask = (torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], dim=1) for of in ("ids", "mask"))
        width = inputs["completion_ids"].shape[1]
        scores = self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]
        return loss + 0.1 * ((scores - reference).square() * inputs["completion_mask"]).mean()


class OwnForward(GRPOTrainer):
    """An entropy bonus from a forward pass of its own."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids, mask = (torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], dim=1) for of in ("ids", "mask"))
        chances = model(input_ids=ids, attention_mask=mask).logits.softmax(-1)
        bonus = (chances * chances.clamp(min=1e-9).log()).sum(-1).mean()
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.1 * bonus


class Memory:
    """Somebody's own object, of whatever class."""

    def __init__(self):
        self.seen = 0


class Remembering(GRPOTrainer):
    """Counts, also on an object, draws, keeps a moving mean in place, and takes an input out of its batch."""

    def start(self):
        self.calls, self.history, self.mean, self.memory = 0, [], torch.zeros(()), Memory()

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        self.memory.seen += 1
        self.history.append(random.random())
        inputs["advantages"] = inputs.pop("advantages") * (1.0 + 0.5 * torch.rand(()))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss * (1.0 + self.mean.abs() + 0.1 * self.memory.seen)


class Centred(GRPOTrainer):
    """Rewards less the mean of all, and smaller."""

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)
        return (rewards - rewards.mean()) / 3.0


class Unsorted(GRPOTrainer):
    """A sampler that lays copies of a prompt out apart, so that TRL's groups are of several prompts."""

    def _get_train_sampler(self, dataset=None):
        return [row for _ in range(64) for row in (0, 1, 2, 0, 3, 3, 1, 2)]


class Cut(GRPOTrainer):
    """The last token of each completion is not trained on."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        return output | {"completion_mask": mask * (mask.cumsum(1) < mask.sum(1, keepdim=True))}


class Whitened(GRPOTrainer):
    """Advantages normalised anew over the micro batch, in place of a group."""

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        advantages = batch["advantages"]
        return {**batch, "advantages": (advantages - advantages.mean()) / (advantages.std() + 0.1)}


class Repeated(GRPOTrainer):
    """The best row of a micro batch is trained on twice, the worst one not at all."""

    def _prepare_inputs(self, generation_batch):
        batch = super()._prepare_inputs(generation_batch)
        order = batch["advantages"].argsort(descending=True)
        rows = torch.cat([order[:1], order[:-1]])
        return {key: value[rows] if getattr(value, "ndim", 0) else value for key, value in batch.items()}


class OwnStep(GRPOTrainer):
    """A training step of its own: half of the loss goes backward, and the gradients are cut."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) * 0.5
        self.accelerator.backward(loss)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.clamp_(-0.1, 0.1)
        self._step += 1
        return loss.detach()


def revived(original):
    def rewards(self, *args, **kwargs):
        scores = original(self, *args, **kwargs)
        return scores + 0.1 * torch.arange(len(scores))[:, None]

    return rewards


def banned(original):
    def generate(self, *args, **kwargs):
        processors = LogitsProcessorList([SuppressTokensLogitsProcessor([5, 6, 7])])
        return original(*args, **kwargs, logits_processor=processors)

    return generate


def told(event, act):
    """A callback that does something at an event of its second step, or of each where that is what `act` wants."""

    def change(trainer, monkeypatch):
        def on_event(self, args, state, control, **kwargs):
            act(trainer, state, kwargs)

        trainer.add_callback(type("Told", (TrainerCallback,), {event: on_event})())

    return change


def in_second_step(act):
    return told("on_step_begin", lambda trainer, state, _: act(trainer) if state.global_step == 1 else None)


def adapters(trainer):
    return [weight for weight in trainer.model.parameters() if weight.requires_grad]


def decay(trainer, state, kwargs):
    for weight in adapters(trainer):
        weight.data.mul_(0.9)


def halve_gradients(trainer, state, kwargs):
    for weight in adapters(trainer):
        weight.grad.mul_(0.5)


def hook_optimizer(trainer, state, kwargs):
    kwargs["optimizer"].optimizer.register_step_pre_hook(lambda *_: halve_gradients(trainer, state, kwargs))


def drop(trainer):
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2


def of_model(act):
    def change(trainer, monkeypatch):
        act(base_of(trainer.model).model, monkeypatch)

    return change


def fused_norm(model, monkeypatch):
    def forward(self, states):
        return torch.nn.functional.rms_norm(states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", forward)


def own_attention(model, monkeypatch):
    """As libraries do that put one function in the place of a layer's attention, whatever the mask says."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = modeling_qwen3.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        states = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        return self.o_proj(states.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    monkeypatch.setattr(modeling_qwen3.Qwen3Attention, "forward", forward)


def noisy(model, monkeypatch):
    def add(module, given, states):
        return states + 0.02 * torch.randn_like(states) if module.training else states

    model.embed_tokens.register_forward_hook(add)


def steered(model, monkeypatch):
    """The last column of each row is pushed, as readers of activations do it."""

    def push(module, given, states):
        return torch.cat([states[:, :-1], states[:, -1:] + 0.5], dim=1)

    model.layers[0].register_forward_hook(push)


def each_weight(hook):
    def change(trainer, monkeypatch):
        for weight in adapters(trainer):
            hook(weight)

    return change


def reworded(rows):
    """Each copy of a row gets a wording of its own."""
    return [
        {**row, "prompt": [{"role": "user", "content": row["prompt"][0]["content"] + "?" * (number % 3)}]}
        for number, row in enumerate(rows)
    ]


def patch_when_training_begins(trainer, state, kwargs):
    trainer.compute_loss = MethodType(penalised(GRPOTrainer.compute_loss), trainer)


PRACTICES = {
    "KL by another formula": subclass(OwnKl),
    "a forward pass of its own": subclass(OwnForward),
    "a loss that counts and draws": subclass(Remembering),
    "rewards centred": subclass(Centred),
    "rewards changed on the trainer": around_trainers_own("_calculate_rewards", revived),
    "a sampler of its own": subclass(Unsorted),
    "a collator of its own": lambda trainer, _: setattr(trainer, "data_collator", reworded),
    "masks changed": subclass(Cut),
    "advantages normalised anew": subclass(Whitened),
    "rows twice and not at all": subclass(Repeated),
    "a training step of its own": subclass(OwnStep),
    "a logits processor": lambda trainer, _: setattr(
        trainer.model, "generate", MethodType(banned(trainer.model.generate), trainer.model)
    ),
    "a norm on its class": of_model(fused_norm),
    "attention on its class": of_model(own_attention),
    "noise by a hook": of_model(noisy),
    "activations pushed by a hook": of_model(steered),
    "gradients clamped by hooks": each_weight(lambda weight: weight.register_hook(lambda g: g.clamp(-0.1, 0.1))),
    "gradients halved behind them": each_weight(
        lambda weight: weight.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", one.grad * 0.5))
    ),
    "a hook on the optimizer": told("on_train_begin", hook_optimizer),
    "weights changed by a callback": told("on_step_end", decay),
    "a loss put on as training begins": told("on_train_begin", patch_when_training_begins),
    "KL turned on": in_second_step(lambda trainer: setattr(trainer, "beta", 0.5)),
    "dropout turned on": in_second_step(drop),
}
"""What people do, beside the above."""
LATE = {"rewards changed on the trainer", "a collator of its own", "a logits processor", "a norm on its class"}
"""Those of them that are done after `speed_up`."""


@pytest.mark.parametrize("what", PRACTICES)
def test_what_people_do_is_learned_as_without_speed_ups(tiny, tmp_path, text_rows, monkeypatch, what):
    def run(names):
        with monkeypatch.context() as patch:
            trainer = make_trainer(
                tiny("qwen3"), text_rows, tmp_path, optim="sgd", learning_rate=2.0, rewards=[by_length], **BATCH
            )
            if what not in LATE:
                PRACTICES[what](trainer, patch)
            if hasattr(trainer, "start"):
                trainer.start()
            before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
            speedups = speed_up(trainer, names)
            if what in LATE:
                PRACTICES[what](trainer, patch)
            trainer.train()
            after = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
            speedups.remove()
            return trainer, gap(after, before), after

    (plain_trainer, moved, plain), (trainer, _, mine) = run("none"), run("auto")
    assert moved > 1e-4
    assert gap(mine, plain) <= 1e-6 * moved
    assert trainer._step == plain_trainer._step
    if hasattr(trainer, "history"):
        assert (trainer.calls, trainer.history, trainer.mean) == (
            plain_trainer.calls,
            plain_trainer.history,
            pytest.approx(plain_trainer.mean),
        )
