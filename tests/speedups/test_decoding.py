"""The decoding loop: tokens of plain `generate`, in fewer kernels, and without the host waiting for each token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.generation import LogitsProcessor, LogitsProcessorList, StopStringCriteria

from tests.support.kernel_count import per_token
from tests.support.tiny import VISION_KINDS

from grpo_autotune.speedups.generation import cache, decoding  # isort: skip
from grpo_autotune.speedups.generation.decoding import Decoder  # isort: skip
from grpo_autotune.speedups.generation.step import one_kernel_norms  # isort: skip
from grpo_autotune.speedups.generation.step import FixedStep, GeneralStep, Unsupported  # isort: skip
from grpo_autotune.speedups.generation.weights import for_decoding, products, replaced  # isort: skip

PROMPTS = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 8, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
ROWS = torch.tensor([0, 0, 0, 1, 1, 1])
ENDS = list(range(0, 60, 6))


def again(step):
    """Stands for a CUDA graph: the same memory, written by running the step again."""
    result = step()
    return lambda: result.copy_(step()), result


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen2_5_vl", "qwen3_vl"])
def model(request, tiny):
    kind = AutoModelForImageTextToText if request.param in VISION_KINDS else AutoModelForCausalLM
    return kind.from_pretrained(tiny(request.param), dtype=torch.float32)


def dtypes_of(model, dtype=None):
    """As a pass of the model shows them, under autocast where a type is given."""
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
        products(model) as dtypes,
    ):
        model(PROMPTS)
    return dtypes


@pytest.fixture
def llama(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)


def write(model, decoder=None, *, new=24, mask=MASK, seed=0, **config):
    torch.manual_seed(seed)
    rows = ROWS if decoder is None else slice(None)
    config = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 1, **config}
    kwargs = {} if decoder is None else {"custom_generate": decoder}
    ids = model.generate(PROMPTS[rows], attention_mask=mask[rows], max_new_tokens=new, **config, **kwargs)
    return ids, torch.rand(())


WAYS = {
    "each token": {},
    "eight tokens late": {"look_every": 8},
    "captured": {"capture": again},
    "captured, late": {"capture": again, "look_every": 8},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_greedy_tokens_are_those_of_plain_generate(model, monkeypatch, way):
    monkeypatch.setattr(cache, "BUCKET", 8)
    wanted, _ = write(model)
    found, _ = write(model, Decoder(ROWS, **way))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_prompts_of_one_length_to_the_limit(llama, monkeypatch, way):
    monkeypatch.setattr(cache, "BUCKET", 8)
    whole = {"mask": torch.ones_like(MASK), "eos_token_id": None}
    assert torch.equal(write(llama, Decoder(ROWS, **way), **whole)[0], write(llama, **whole)[0])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_random_stream_goes_on_where_plain_generate_leaves_it(llama, way):
    drawn = {"do_sample": True, "top_k": 0, "new": 60, "eos_token_id": list(range(0, 380, 6))}
    wanted, after = write(llama, **drawn)
    found, then = write(llama, Decoder(ROWS, **way), **drawn)
    assert torch.equal(found, wanted) and then == after
    assert len(wanted[0]) < PROMPTS.shape[1] + 60, "all rows were done before the limit"


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"do_sample": True, "min_new_tokens": 9},
        {"do_sample": False, "no_repeat_ngram_size": 2},
    ],
    ids=["truncated", "minimum length", "n-grams"],
)
def test_processors_are_those_of_plain_generate(llama, config):
    wanted, after = write(llama, **config)
    found, then = write(llama, Decoder(ROWS, look_every=8), **config)
    assert torch.equal(found, wanted) and then == after


def test_stop_strings(llama, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    stop = {"stopping_criteria": [StopStringCriteria(tokenizer, ["a", "3"])], "do_sample": True}
    wanted, after = write(llama, **stop)
    found, then = write(llama, Decoder(ROWS, look_every=8), **stop)
    assert torch.equal(found, wanted) and then == after


class Told(LogitsProcessor):
    """A processor of the user's, which counts what it was asked, and looks which attention kernels are on."""

    def __init__(self):
        self.lengths, self.cudnn = [], []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        self.cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return scores


def test_a_processor_of_the_users_is_asked_as_often_as_plain_generate_asks(llama):
    asked = []
    for decoder in (None, Decoder(ROWS, look_every=8)):
        told = Told()
        write(llama, decoder, logits_processor=LogitsProcessorList([told]))
        asked.append(told.lengths)
    assert asked[0] == asked[1]


def test_attention_is_kept_from_cudnns_plans(llama):
    told = Told()
    write(llama, Decoder(ROWS), logits_processor=LogitsProcessorList([told]))
    assert torch.backends.cuda.cudnn_sdp_enabled() and not any(told.cudnn)


def test_a_model_that_prepares_its_steps_itself_is_asked_at_each(llama, monkeypatch):
    class Own(type(llama)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    wanted, _ = write(llama)
    llama.__class__ = Own
    steps = []
    monkeypatch.setattr(GeneralStep, "__call__", lambda self, ids: steps.append(1) or CALL(self, ids))
    found, _ = write(llama, Decoder(ROWS))
    assert torch.equal(found, wanted) and steps


CALL = GeneralStep.__call__


def test_shapes_are_constant_within_a_bucket(llama, monkeypatch):
    """What a captured step needs: one capture for each number of rows and bucket, and the same memory in between."""
    monkeypatch.setattr(cache, "BUCKET", 16)
    captured = []

    def capture(step):
        captured.append(1)
        return again(step)

    write(llama, Decoder(ROWS, capture=capture), new=40, eos_token_id=None)  # 45 tokens in buckets of 16
    assert len(captured) == 3


def test_positions_that_the_host_recomputes_are_not_captured(tiny):
    config = AutoConfig.from_pretrained(tiny("llama"))
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert torch.equal(write(model, Decoder(ROWS))[0], write(model)[0])
    with pytest.raises(Unsupported, match="rope_type dynamic"):
        write(model, Decoder(ROWS, capture=again))


def test_masks_are_those_of_the_text_models_kernel(tiny):
    kernels = {"text_config": "eager", "vision_config": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(
        tiny("qwen3_vl"), dtype=torch.float32, attn_implementation=kernels
    )
    assert torch.equal(write(model, Decoder(ROWS))[0], write(model)[0])


def test_a_compiled_model_is_left_as_it_was_compiled(llama):
    llama._compiled_call_impl = llama._call_impl
    changed = []
    llama.model.norm.register_forward_pre_hook(lambda norm, inputs: changed.append("forward" in vars(norm)))
    write(llama, Decoder(ROWS))
    assert changed and not any(changed) and not dtypes_of(llama)


def test_weights_come_back_as_they_were(llama):
    before = {name: (parameter, parameter.clone()) for name, parameter in llama.named_parameters()}
    with replaced(for_decoding(llama, dtypes_of(llama))):
        assert llama.lm_head.weight.t().is_contiguous()
        assert torch.equal(llama.lm_head.weight, before["lm_head.weight"][1])
    with pytest.raises(ZeroDivisionError), replaced(for_decoding(llama, dtypes_of(llama, torch.bfloat16))):
        assert llama.lm_head.weight.dtype == torch.bfloat16
        raise ZeroDivisionError
    for name, parameter in llama.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


def test_norms_are_one_call_and_come_back(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32)
    torch.nn.init.normal_(model.model.norm.weight)
    before = model.model.norm.forward
    with torch.no_grad():
        wanted = model(PROMPTS).logits
        with one_kernel_norms(model):
            assert model.model.norm.forward != before
            assert torch.allclose(model(PROMPTS).logits, wanted, atol=1e-5)
    assert model.model.norm.forward == before and "forward" not in vars(model.model.norm)


def test_a_tied_embedding_keeps_its_parameter(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"), dtype=torch.float32)
    shared = model.lm_head.weight
    with replaced(for_decoding(model, dtypes_of(model, torch.bfloat16))):
        assert model.get_input_embeddings().weight is shared and model.lm_head.weight is not shared
    assert model.lm_head.weight is shared


def test_weights_cast_once_give_the_numbers_of_autocast(llama):
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = llama(ids).logits
        with replaced(for_decoding(llama, dtypes_of(llama, torch.bfloat16))):
            assert torch.equal(llama(ids).logits, wanted)


def test_the_host_waits_once_in_eight_tokens(llama, monkeypatch):
    looks = []
    look = decoding._Text.left
    monkeypatch.setattr(decoding._Text, "left", lambda self: looks.append(look(self)) or looks[-1])

    def run(tokens):
        write(llama, Decoder(ROWS, look_every=8), new=tokens, eos_token_id=None, do_sample=True)

    run(24)
    assert [place for place, left in enumerate(looks, 1) if left is not None] == [8, 16, 24]
    assert per_token(run)[1] == 0, "nothing else waits"


def test_rows_leave_later_where_shapes_cost_more_than_rows(llama, monkeypatch):
    """As on CUDA: the table of devices without this one."""
    on_cpu, as_on_cuda = Decoder(ROWS, look_every=1), Decoder(ROWS, look_every=1)
    ends = {"eos_token_id": list(range(0, 60, 2)), "do_sample": True, "new": 40}
    wanted = write(llama, on_cpu, **ends)
    monkeypatch.setattr(decoding, "SHRINK_AT", {})
    sizes = []
    kept = FixedStep.keep
    monkeypatch.setattr(FixedStep, "keep", lambda step, rows, of: (sizes.append((len(rows), of)), kept(step, rows, of)))
    found = write(llama, as_on_cuda, **ends)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert as_on_cuda.steps == on_cpu.steps and as_on_cuda.row_steps > on_cpu.row_steps
    assert all(rows <= 0.25 * of for rows, of in sizes)


def test_steps_that_are_fixed_take_fewer_kernels_than_transformers_own(llama, monkeypatch):
    def run(tokens):
        write(llama, Decoder(ROWS, look_every=8), new=tokens, eos_token_id=None)

    fixed, _ = per_token(run)
    monkeypatch.setattr(FixedStep, "fits", staticmethod(lambda model, state: False))
    general, _ = per_token(run)
    assert fixed < general


def test_a_rank_that_is_done_goes_on_until_the_others_are(model):
    """The tokens and the random stream are as without; each step of the others' has a forward of this rank."""
    asked, lengths = [], []
    others = 20

    def any_rank(mine):
        asked.append(mine)
        return mine or len(asked) < others

    hook = model.register_forward_hook(lambda *args: lengths.append(len(args[1][0]) if args[1] else 1))
    settings = {"do_sample": True, "eos_token_id": list(range(0, 380, 3)), "pad_token_id": 1}
    wanted, number = write(model, Decoder(ROWS, look_every=1), new=40, **settings)
    plain = len(lengths)
    found, same = write(model, Decoder(ROWS, any_rank=any_rank), new=40, **settings)
    hook.remove()
    assert torch.equal(found, wanted) and number == same
    assert plain < others == len(asked) and asked[-1] is False
    assert len(lengths) - plain == others
