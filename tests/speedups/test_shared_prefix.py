"""shared_prefix against plain TRL at one seed: log-probs, loss and every gradient, wherever rows and images differ."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_autotune.train.models.random_init import build_tokenizer, save_random_model
from tests.support.exactness import apart, differences, generation, loss_and_gradients, ready
from tests.support.tiny import TEXT, TEXTS
from tests.support.trainers import DEVICE, EXACT, losses, make_trainer

from grpo_autotune.speedups.shared_prefix import attention, speedup  # isort: skip
from grpo_autotune.speedups.batches.groups import KNOWN  # isort: skip
from grpo_autotune.speedups.batches.rows import one_token, take  # isort: skip
from grpo_autotune.speedups.shared_prefix.media import INPUTS  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip
from grpo_autotune.speedups.shared_prefix.attention import causal_mask  # isort: skip
from grpo_autotune.speedups.shared_prefix.layout import batch_of, layout_of  # isort: skip
import torch  # isort: skip
from datasets import Dataset, Features, Image, Sequence, Value  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode  # isort: skip
from transformers import AttentionInterface, AutoTokenizer  # isort: skip

MESSAGES = [{"role": Value("string"), "content": Value("string")}]
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def picture(number: int, size: tuple[int, int] = (56, 56)):
    from PIL import Image as Pictures

    image = Pictures.new("RGB", size, (40 * number, 90, 200 - 40 * number))
    image.putpixel((3, 5), (255, 0, 0))
    return image


@pytest.fixture
def ragged_text_rows():
    """Prompts of very different lengths."""
    return [
        {"prompt": [{"role": "user", "content": f"What is {'two plus ' * (4 * row)}three?"}], "answer": str(row)}
        for row in range(4)
    ]


@pytest.fixture
def ragged_picture_rows():
    """Prompts of different lengths with images of different sizes."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{'How many are there? ' * row}What is shown?"}],
            "image": picture(row, (56 + 28 * row, 56)),
            "answer": str(row),
        }
        for row in range(4)
    ]


def assert_exact(found, *, shared: bool = True) -> None:
    for key, difference in found.items():
        if not key.startswith("fact."):
            assert difference <= EXACT, f"{key}: {difference:.1e}"
    assert found["completion_ids"] == 0.0
    if shared:
        assert found["fact.plain_passes"] == 0
        assert found["fact.tokens"] < found["fact.tokens_of_plain"]
    else:
        assert found["fact.shared_passes"] == 0


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3", "llama"])
@pytest.mark.parametrize(("lora", "checkpointing"), list(itertools.product([True, False], repeat=2)))
def test_four_architectures(tiny, tmp_path, ragged_picture_rows, ragged_text_rows, kind, lora, checkpointing):
    def build():
        trainer = ready(
            tiny(kind),
            ragged_picture_rows if kind.endswith("vl") else ragged_text_rows,
            tmp_path,
            lora=lora,
            gradient_checkpointing=checkpointing,
            beta=0.05,
            num_iterations=2,  # so that there is an old-policy pass
            temperature=1.3,
            **GROUPS,
        )
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing is checkpointing
        return trainer

    found = differences(build, "shared_prefix")
    assert_exact(found)
    assert {"ref_per_token_logps", "old_per_token_logps"} <= found.keys()


@pytest.mark.parametrize(("kind", "checkpointing"), [("qwen3_vl", True), ("llama", False)])
def test_the_form_with_copies_of_the_prompt(tiny, tmp_path, picture_rows, ragged_text_rows, kind, checkpointing):
    def build():
        rows = picture_rows if kind.endswith("vl") else ragged_text_rows
        return ready(tiny(kind), rows, tmp_path, gradient_checkpointing=checkpointing, beta=0.05, **GROUPS)

    found = differences(build, [{"name": "shared_prefix", "form": "split"}])
    assert_exact(found)
    assert "fact.cascade_passes" not in found


class Reads(TorchDispatchMode):
    """Which functions that wait for a device are called inside."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "masked_scatter")

    def __init__(self) -> None:
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.found |= {name} & {*self.WAITING}
        return function(*args, **(kwargs or {}))


def test_rows_carry_what_the_host_has_to_know_of_them(tiny, tmp_path, picture_rows, monkeypatch):
    monkeypatch.setattr(speedup, "waits", lambda device: True)
    split = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = ready(tiny("qwen3_vl"), picture_rows, tmp_path, lora=False, beta=0.05, **split)
    speed_up(trainer, "shared_prefix")
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for batch in trainer._buffered_inputs:
        ids, mask = (torch.cat([batch[f"prompt_{of}"], batch[f"completion_{of}"]], dim=1) for of in ("ids", "mask"))
        given = {key: batch[key] for key in INPUTS if key in batch}
        width, known_B = batch["completion_ids"].shape[1], batch[KNOWN]
        read = batch_of(ids, mask, width, batch["group_id"], given)
        with Reads() as reads:
            known = batch_of(ids, mask, width, batch["group_id"], given, known_B)
            assert known.media.why_not(width) is None
        assert not reads.found
        for name in ("groups", "prompt_lengths", "completion_lengths"):
            assert getattr(known, name) == getattr(read, name)
        assert known.media.patches == read.media.patches and known.media.images == read.media.images
        mask[1, -1] = 1 - mask[1, -1]
        with pytest.raises(RuntimeError, match="a mask was changed"):
            batch_of(ids, mask, width, batch["group_id"], given, known_B)
        loss, gradients = loss_and_gradients(trainer, batch)
        without = {key: value for key, value in batch.items() if key != KNOWN}
        wanted, wanted_gradients = loss_and_gradients(trainer, without)
        assert torch.equal(loss, wanted)
        assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in gradients)
    assert torch.equal(take(batch, [2, 0])[KNOWN], known_B[[2, 0]])
    assert KNOWN not in one_token(take(batch, [2]), whole_prompt=True)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs)
    assert KNOWN not in generation(trainer), "somebody else's loss may change a batch"


def test_a_micro_batch_of_one_shares_where_no_backward_pass_follows(tiny, tmp_path, text_rows):
    def build():
        groups = {"num_generations": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        return ready(tiny("qwen3"), text_rows, tmp_path, lora=False, beta=0.05, **groups)

    found = differences(build, "shared_prefix")
    assert_exact(found)


def test_images_that_differ_in_pixels_alone_are_not_merged(tiny, tmp_path, picture_rows):
    """One question, one size: prompt ids and grids are equal, and nothing but the pixels tells the prompts apart."""

    def build():
        return ready(tiny("qwen3_vl"), picture_rows, tmp_path, lora=False, beta=0.05, **GROUPS)

    assert_exact(differences(build, "shared_prefix"))
    trainer = build()
    speed_up(trainer, "shared_prefix")
    batch = generation(trainer)
    assert torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][4])
    assert batch["group_id"].tolist() == [0] * 4 + [1] * 4
    media = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    wrong_groups = torch.zeros(8, dtype=torch.long, device=DEVICE)
    assert batch_of(ids, mask, batch["completion_ids"].shape[1], wrong_groups, media).groups == [0] * 4 + [4, 5, 6, 7]


def two_image_data() -> Dataset:
    rows = [
        {
            "prompt": [{"role": "user", "content": "What is shown? " * (row + 1)}],
            "images": [picture(row + index, (56, 56 + 28 * index)) for index in range(count)],
            "answer": "0",
        }
        for row, count in enumerate([2, 1, 3, 1])
    ]
    columns = {"prompt": MESSAGES, "answer": Value("string"), "images": Sequence(Image())}
    return Dataset.from_list(rows, features=Features(columns))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_several_images_in_a_prompt(tiny, tmp_path, picture_rows, kind):
    def build():
        trainer = ready(tiny(kind), picture_rows, tmp_path, lora=False, beta=0.05, **GROUPS)
        trainer.train_dataset = two_image_data()
        return trainer

    assert_exact(differences(build, "shared_prefix"))


def test_masked_completions_and_completions_of_one_token(tiny, tmp_path, ragged_picture_rows):
    def build():
        return ready(tiny("qwen3_vl"), ragged_picture_rows, tmp_path, beta=0.05, max_completion_length=8, **GROUPS)

    def change(batch):
        mask = batch["completion_mask"]
        mask[0] = 0  # truncated and masked
        mask[1, 1:] = 0
        mask[4:] = 0  # a group of which nothing is left
        mask[2, 3:] = 0

    assert_exact(differences(build, "shared_prefix", change))


def test_a_batch_of_which_nothing_is_left_is_left_to_trl(tiny, tmp_path, text_rows):
    trainer = ready(tiny("llama"), text_rows, tmp_path, lora=False, beta=0.05, **GROUPS)
    installed = speed_up(trainer, "shared_prefix")
    batch = generation(trainer)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss, _ = loss_and_gradients(trainer, batch)
    assert float(loss) == 0.0 and installed.facts()["shared_prefix"]["plain_passes"] == 1


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss(tiny, tmp_path, ragged_text_rows, loss_type, level):
    def build():
        return ready(
            tiny("llama"),
            ragged_text_rows,
            tmp_path,
            lora=False,
            loss_type=loss_type,
            importance_sampling_level=level,
            num_iterations=2,
            beta=0.05,
            **GROUPS,
        )

    assert_exact(differences(build, "shared_prefix"))


@pytest.mark.parametrize(
    "grpo",
    [
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1},
        {"off_policy_mask_threshold": 0.05, "num_iterations": 2},
        {"use_bias_correction_kl": True, "num_iterations": 2, "delta": 1.5},
        {"cast_lm_head_to_fp32": True},
        {"pad_to_multiple_of": 16},
        {"num_iterations": 2, "temperature": 1.3, "from_logits": True},
        {"entropy_coef": 0.1, "from_logits": True},
    ],
)
def test_entropy_and_other_terms(tiny, tmp_path, ragged_picture_rows, ragged_text_rows, grpo, monkeypatch):
    grpo = {**grpo}
    if grpo.pop("from_logits", False):  # as before TRL 1.15
        monkeypatch.setattr(speedup, "has_fused_head", lambda: False)
    kind = "llama" if "cast_lm_head_to_fp32" in grpo else "qwen3_vl"  # TRL casts tied heads of text models only

    def build():
        rows = ragged_picture_rows if kind.endswith("vl") else ragged_text_rows
        return ready(tiny(kind), rows, tmp_path, beta=0.05, **{**GROUPS, **grpo})

    assert_exact(differences(build, "shared_prefix"))


def test_autocast_to_bfloat16_is_as_far_from_float32_as_plain_trl(tiny, tmp_path, ragged_picture_rows):
    def build(**grpo):
        return ready(tiny("qwen3_vl"), ragged_picture_rows, tmp_path, lora=False, beta=0.05, **{**GROUPS, **grpo})

    exact, plain, fast = build(), build(bf16=True), build(bf16=True)
    installed = speed_up(fast, "shared_prefix")
    batch = {**generation(exact), "group_id": torch.arange(8, device=DEVICE) // 4}
    wanted, coarse, found = (loss_and_gradients(trainer, batch)[1] for trainer in (exact, plain, fast))
    by_autocast = max(apart(coarse[name], wanted[name]) for name in wanted)
    by_both = max(apart(found[name], wanted[name]) for name in wanted)
    assert by_autocast > 1e-3 and by_both < 2 * by_autocast
    assert installed.facts()["shared_prefix"]["shared_passes"] == 1


def test_four_bit_weights_with_an_adapter(tiny, tmp_path, ragged_text_rows):
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    def build():
        packed = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": "float32"}
        trainer = ready(tiny("qwen3"), ragged_text_rows, tmp_path, beta=0.05, model_init_kwargs=packed, **GROUPS)
        assert any(isinstance(module, Linear4bit) for module in trainer.model.modules())
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL keeps adapters on packed weights in bfloat16
        return trainer

    assert_exact(differences(build, "shared_prefix"))


def log(trainer):
    return [line for line in trainer.state.log_history if "completions/max_length" in line]


RUNS = {
    "groups over two micro batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "loss by micro batch": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "loss_type": "bnpo",
        "mask_truncated_completions": True,
    },
    "completions used twice": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_checkpointing": False,
    },
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["qwen3_vl", "llama"])
def test_five_steps_earn_the_same_and_end_with_the_same_weights(
    tiny, tmp_path, ragged_picture_rows, ragged_text_rows, kind, name
):
    rows = ragged_picture_rows if kind.endswith("vl") else ragged_text_rows
    end = AutoTokenizer.from_pretrained(tiny(kind)).eos_token_id
    ragged = {"generation_kwargs": {"sequence_bias": [[[end], 4.0]]}, "max_completion_length": 10}

    def train(fast: bool):
        trainer = make_trainer(
            tiny(kind), rows, tmp_path, lora=False, num_generations=4, max_steps=5, beta=0.05,
            **{"optim": "sgd", "learning_rate": 0.05, **ragged, **RUNS[name]},
        )  # fmt: skip
        start = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        found = speed_up(trainer, "shared_prefix") if fast else None
        trainer.train()
        rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
        weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        assert max(apart(weights[key], start[key]) for key in weights) > 100 * EXACT, "nothing was learned"
        assert all(line["completions/max_length"] > line["completions/min_length"] for line in log(trainer))
        return rewards, losses(trainer), weights, found

    rewards, loss, weights, _ = train(False)
    fast_rewards, fast_loss, fast_weights, installed = train(True)
    assert fast_rewards == rewards
    assert fast_loss == pytest.approx(loss, abs=1e-5)
    assert max(apart(fast_weights[key], weights[key]) for key in weights) < EXACT
    facts = installed.facts()["shared_prefix"]
    assert facts["tokens"] < 0.8 * facts["tokens_of_plain"]
    if "mask_truncated_completions" not in RUNS[name]:  # micro batches of nothing but masked rows are left to TRL
        assert facts["plain_passes"] == 0


def micro_batches(model, rows, folder, names, **grpo):
    """The completions of each micro batch in turn, torch's random state after them, and the first micro batch."""
    batch = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = ready(model, rows, folder, beta=0.0, **{**batch, **grpo})
    speed_up(trainer, names)
    torch.manual_seed(5)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    completions = [row.tolist() for batch in trainer._buffered_inputs for row in batch["completion_ids"]]
    return completions, torch.get_rng_state(), inputs


def test_regrouping_draws_the_permutation_that_trl_draws(tiny, tmp_path, text_rows):
    plain, plain_state, _ = micro_batches(tiny("llama"), text_rows, tmp_path, "none")
    fast, fast_state, inputs = micro_batches(tiny("llama"), text_rows, tmp_path, "shared_prefix")
    assert torch.equal(plain_state, fast_state)
    assert fast != plain and sorted(fast) == sorted(plain)
    assert len(set(inputs["group_id"].tolist())) == 1, "a micro batch of G rows holds one group"


@pytest.mark.parametrize("grpo", [{"loss_type": "bnpo"}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_no_row_moves_where_the_loss_depends_on_the_micro_batch(tiny, tmp_path, text_rows, grpo):
    plain, _, _ = micro_batches(tiny("llama"), text_rows, tmp_path, "none", **grpo)
    assert micro_batches(tiny("llama"), text_rows, tmp_path, "shared_prefix", **grpo)[0] == plain


def test_evaluation_scores_the_same(tiny, tmp_path, ragged_picture_rows):
    def evaluate(names):
        trainer = make_trainer(
            tiny("qwen3_vl"), ragged_picture_rows, tmp_path, beta=0.05, num_generations_eval=2,
            per_device_eval_batch_size=4,
        )  # fmt: skip
        installed = speed_up(trainer, names)
        torch.manual_seed(0)
        return trainer.evaluate(), installed.facts()

    wanted, _ = evaluate("none")
    found, facts = evaluate("shared_prefix")
    assert facts["shared_prefix"]["plain_passes"] == 0
    for key in ("eval_loss", "eval_reward", "eval_entropy", "eval_kl"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)


def test_remove_leaves_model_and_library_as_they_were(tiny, tmp_path, picture_rows):
    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, lora=False, beta=0.05)
    assert not attention._users["sdpa"], "a test before this one left its layer"
    before = dict(AttentionInterface._global_mapping)
    owners = [trainer, *trainer.model.modules(), *trainer.ref_model.modules()]
    attributes = [set(vars(owner)) for owner in owners]
    installed = speed_up(trainer, "shared_prefix")
    assert AttentionInterface._global_mapping != before
    installed.remove()
    assert AttentionInterface._global_mapping == before
    assert [set(vars(owner)) for owner in owners] == attributes


def test_attention_layer_goes_with_its_last_user_removed_or_forgotten():
    before = dict(AttentionInterface._global_mapping)
    layers = [attention.AttentionLayer("sdpa"), attention.AttentionLayer("sdpa")]
    layers[0].remove()
    layers[0].remove()
    assert AttentionInterface._global_mapping != before
    layers.clear()
    assert AttentionInterface._global_mapping == before


def why(trainer) -> str:
    row = next(row for row in speed_up(trainer, "shared_prefix").table() if row.name == "shared_prefix")
    assert not row.on
    return row.reason


def test_refusals_name_the_key(tiny, tmp_path, text_rows):
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.1)
    assert why(trainer).startswith("peft.lora_dropout is 0.1")
    eager = make_trainer(tiny("qwen3"), text_rows, tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    assert (
        why(eager)
        == "model.attn_implementation eager is not supported (supported: sdpa, flash_attention_2, flash_attention_3)"
    )
    trainer = make_trainer(tiny("qwen3"), text_rows, tmp_path)
    trainer.args.torch_compile = True
    assert "grpo.torch_compile" in why(trainer)


OTHERS = {
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
    },
    "opt": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 0,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "dropout": 0.0,
        "word_embed_proj_dim": 64,
    },
}


def other_model(kind: str, folder: Path) -> Path:
    config = OTHERS[kind] if kind == "opt" else TEXT | OTHERS[kind]
    return save_random_model(config, folder / kind, tokenizer=build_tokenizer(TEXTS))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_windows_shorter_than_the_prompt(tmp_path, ragged_text_rows, kind):
    model = other_model(kind, tmp_path)
    assert_exact(differences(lambda: ready(model, ragged_text_rows, tmp_path, beta=0.05, **GROUPS), "shared_prefix"))


def test_a_model_it_cannot_serve_is_found_out_and_trains_on_trl(tmp_path, ragged_text_rows, caplog):
    """OPT counts its positions from the mask, whatever it is told."""
    model = other_model("opt", tmp_path)
    found = differences(lambda: ready(model, ragged_text_rows, tmp_path, beta=0.05, **GROUPS), "shared_prefix")
    assert_exact(found, shared=False)
    warnings_of_ours = [record.getMessage() for record in caplog.records if "shared_prefix" in record.getMessage()]
    assert len(warnings_of_ours) == 1 and "its self-check found log-probs off by" in warnings_of_ours[0]


@pytest.mark.slow
def test_a_model_that_counts_by_the_mask_is_found_out_where_prompts_are_padded(tmp_path, caplog):
    """OPT's positions skip the padding, which the first batch does not have."""
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 0,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "dropout": 0.0,
        "init_std": 0.2,
    }
    folder = save_random_model(config, tmp_path / "opt", tokenizer=build_tokenizer(TEXTS), min_pixels=28 * 28)
    rows = [
        {"prompt": [{"role": "user", "content": "What is shown? " * repeats}], "answer": ""} for repeats in (4, 4, 6, 2)
    ]

    def train(names):
        grpo = {"num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        trainer = make_trainer(
            folder, rows, tmp_path, lora=False, optim="sgd", max_steps=2, shuffle_dataset=False, **grpo
        )
        speedups = speed_up(trainer, names)
        trainer.train()
        return speedups.facts(), dict(trainer.model.named_parameters())

    (_, wanted), (facts, found) = train("none"), train(["shared_prefix"])
    assert facts["shared_prefix"]["shared_passes"] == facts["shared_prefix"]["plain_passes"] == 1
    assert "speed-up shared_prefix is off" in caplog.text
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in wanted.items())


def test_tiny_savings_are_left_to_trl(tiny, tmp_path, text_rows):
    def build():
        grpo = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = ready(tiny("llama"), text_rows, tmp_path, beta=0.05, max_completion_length=400, **grpo)
        trainer.args.generation_kwargs = {"min_new_tokens": 400}
        trainer.generation_config.min_new_tokens = 400
        return trainer

    assert_exact(differences(build, "shared_prefix"), shared=False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_scores_as_plain_trl_scores_it(tiny_scorer, data):
    """Group sizes, prompt and completion lengths, paddings and image counts at will."""
    trainer = tiny_scorer
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), label="rows of each group")
    images = [data.draw(st.integers(0, 2), label="images") for _ in sizes]
    words = [data.draw(st.integers(1, 12), label="words of the prompt") for _ in sizes]
    lengths = [[data.draw(st.integers(0, 6), label="tokens") for _ in range(size)] for size in sizes]
    more = data.draw(st.integers(0, 3), label="padding beyond the longest")
    order = data.draw(st.permutations(range(sum(sizes))), label="order of rows")
    batch = synthetic(trainer, images, words, lengths, more, order)
    groups = batch.pop("groups")
    wanted, entropies, _ = score(trainer, batch, None)
    found, fast_entropies, _ = score(trainer, batch, groups)
    assert apart(found, wanted) <= EXACT and apart(fast_entropies, entropies) <= EXACT


@pytest.fixture(scope="module")
def tiny_scorer(tiny, tmp_path_factory, picture_rows):
    """A trainer whose every batch is shared, however little there is to share."""
    from grpo_autotune.speedups.shared_prefix import speedup

    before, speedup.WORTH = speedup.WORTH, float("inf")
    trainer = ready(tiny("qwen3_vl"), picture_rows, tmp_path_factory.mktemp("scorer"), lora=False)
    installed = speed_up(trainer, "shared_prefix")
    yield trainer
    assert installed.facts()["shared_prefix"]["shared_passes"] > 10
    assert all(row.on for row in installed.table() if row.name == "shared_prefix")
    installed.remove()
    speedup.WORTH = before


def synthetic(trainer, images, words, lengths, more, order):
    """A batch of ids without meaning: grids of 4 x 4 patches (four tokens an image), random pixels."""
    config = trainer.model.config
    generator = torch.Generator().manual_seed(len(order))
    width = config.vision_config.patch_size**2 * 3 * config.vision_config.temporal_patch_size

    def ids(count: int) -> torch.Tensor:
        found = torch.randint(config.text_config.vocab_size, (count,), generator=generator)
        return found.masked_fill((found == config.image_token_id) | (found == config.video_token_id), 1)

    placeholder = torch.full((4,), config.image_token_id)
    rows, longest = [], max(max(inside) for inside in lengths) + more
    for group, (count, size) in enumerate(zip(images, words, strict=True)):
        prompt = torch.cat([part for _ in range(count) for part in (ids(1), placeholder)] + [ids(size)])
        pixels = torch.randn(16 * count, width, generator=generator)
        rows += [(group, prompt, pixels, count, ids(inside)) for inside in lengths[group]]
    rows = [rows[index] for index in order]
    wide = max(len(row[1]) for row in rows) + more
    input_ids = torch.zeros(len(rows), wide + max(longest, 1), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for line, (_, prompt, _, _, completion) in enumerate(rows):
        input_ids[line, wide - len(prompt) : wide + len(completion)] = torch.cat([prompt, completion])
        mask[line, wide - len(prompt) : wide + len(completion)] = 1
    counts = [row[3] for row in rows]
    media = {
        "pixel_values": torch.cat([row[2] for row in rows]).to(DEVICE),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(counts), device=DEVICE),
        "num_images": counts,
        "mm_token_type_ids": ((input_ids == config.image_token_id).long() * mask).to(DEVICE),
    }
    return {
        "groups": torch.tensor([row[0] for row in rows], device=DEVICE),
        "ids": (input_ids.to(DEVICE), mask.to(DEVICE), max(longest, 1)),
        "media": media if sum(counts) else {},
    }


def score(trainer, batch, groups):
    from grpo_autotune.speedups.batches.groups import groups_of

    with torch.no_grad(), groups_of(trainer).under_way(groups), warnings.catch_warnings():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, *batch["ids"], compute_entropy=True, **batch["media"]
        )


def test_masks_of_a_sliding_window():
    plain = causal_mask(3, 2, None, torch.device("cpu"))[0, 0]
    assert plain.tolist() == [[True] * 4 + [False], [True] * 5]
    narrow = causal_mask(3, 2, 2, torch.device("cpu"))[0, 0]
    assert narrow.tolist() == [[False, False, True, True, False], [False, False, False, True, True]]


def test_a_layout_holds_each_prompt_once(tiny, tmp_path, text_rows):
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]])
    ids[1, :2] = ids[0, :2]
    batch = batch_of(ids, mask, 2, torch.tensor([7, 7, 8]), {})
    assert batch.groups == [0, 0, 2] and batch.tokens([0, 1, 2]) == 5
    layout = layout_of(batch, [0, 1, 2])
    assert ids.flatten()[layout.source].tolist() == [1, 8, 9, 2, 6]
    assert layout.scored.tolist() == [0, 3, 0, 4, 2]
    assert ids.flatten()[layout.target].tolist() == [2, 3, 6, 7, 10]
    assert layout.place.tolist() == [0, 1, 2, 3, 4]
    assert layout.tokens == 5 and layout.first_rows == [0, 2]
    alone = replace(batch, groups=[0, 1, 2])
    assert alone.tokens([0, 1, 2]) == 6


def test_a_rank_runs_as_many_forwards_as_the_one_that_needs_most(tiny, tmp_path, ragged_picture_rows, monkeypatch):
    """And compares kinds of rows with the others that it has none of; nothing that it computes changes."""

    def build():
        return ready(tiny("qwen3_vl"), ragged_picture_rows, tmp_path, beta=0.05, num_iterations=2, **GROUPS)

    forwards, asked = [], []

    def counted(more):
        def most(numbers, trainer, in_step):
            *kinds, passes = numbers
            asked.append(kinds)
            return [*(True for _ in kinds), passes + more] if more else numbers

        monkeypatch.setattr(speedup, "most", most)
        forwards.clear()
        asked.clear()

        def watched():
            trainer = build()
            trainer.model.register_forward_hook(lambda *_: forwards.append(1))
            return trainer

        return differences(watched, "shared_prefix"), len(forwards)

    alone, few = counted(0)
    found, many = counted(2)
    assert_exact(found)
    assert found["gradients"] == alone["gradients"]
    kinds_without_rows = sum(not any(of_kind) for of_kind in zip(*asked, strict=True))
    assert many - few == 2 * len(asked) + 2 * kinds_without_rows
