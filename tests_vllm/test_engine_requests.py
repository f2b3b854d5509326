"""One request for the completions of a prompt: the same completions in the same order as TRL's copies give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from grpo_autotune.rollout.colocate.requests import JoinedRequests, _runs
from grpo_autotune.rollout.parts import part_of
from grpo_autotune.trials.child.fixed_lengths import FixedLengths, length_of
from tests_vllm.engines import NATS, Rows, scored, unlocked

Colocated = Callable[..., Any]

LARGEST = (56, 56)
"""Of the images in `picture_rows`, for which the engine is sized."""

GROUPS = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def asked(trainer: Any, group: int, colours: str, **params: Any) -> tuple[list[list[int]], list[list[int]], int]:
    """Prompt ids and completions of one question about images of these colours, and the requests they took."""
    generation = trainer.vllm_generation
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    text = trainer.processing_class.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    images = [[Image.new("RGB", LARGEST, colour)] for colour in colours.split()]
    ids = trainer.processing_class(images=images[0], text=text, return_tensors="pt")["input_ids"][0].tolist()
    before = part_of(generation, JoinedRequests).sent
    generation.generation_kwargs = params
    prompts, completions, _, _ = generation.generate([ids] * len(images), images, group)
    assert prompts == [ids] * len(images)
    return prompts, completions, part_of(generation, JoinedRequests).sent - before


def test_completions_are_those_of_copies_in_their_order(colocated: Colocated, picture_rows: Rows) -> None:
    trainer = unlocked(colocated, "qwen3_vl", picture_rows, {}, **GROUPS)
    _, apart = scored(trainer)
    requests = part_of(trainer.vllm_generation, JoinedRequests)
    assert (requests.completions, requests.sent) == (8, 2)
    assert apart.max() <= NATS

    colours = "red red red red blue blue blue blue"
    joined, copies = asked(trainer, 4, colours, top_k=1), asked(trainer, 1, colours, top_k=1)
    assert joined[:2] == copies[:2]
    assert (joined[2], copies[2]) == (2, 8)
    assert joined[1][0] != joined[1][4], "the model does not see the images"

    one_group = asked(trainer, 4, "red red blue blue", top_k=1)
    assert one_group[2] == 2, "rows with other images were joined"
    assert one_group[1] == [joined[1][0]] * 2 + [joined[1][4]] * 2

    greedy = asked(trainer, 4, colours, temperature=0.0)
    assert greedy[1] == joined[1] and greedy[2] == 0, "vLLM takes no n above 1 where it decodes greedily"

    seeded = asked(trainer, 4, "red red red red", seed=11)
    assert seeded[2] == 1 and len({tuple(ids) for ids in seeded[1]}) > 1
    assert seeded[1] == [asked(trainer, 1, "red", seed=11 + member)[1][0] for member in range(4)]


def test_completions_of_fixed_lengths(colocated: Colocated, text_rows: Rows) -> None:
    trainer = unlocked(colocated, "qwen3", text_rows, {}, **GROUPS)
    lengths = FixedLengths(trainer, [1, 3, 5], seed=2)
    batch, apart = scored(trainer)
    lengths.remove()
    wanted = [length_of([1, 3, 5], 2, *divmod(row, 4)) for row in range(8)]
    assert batch["completion_mask"].sum(dim=1).tolist() == wanted and len(set(wanted)) > 1
    requests = part_of(trainer.vllm_generation, JoinedRequests)
    assert (requests.completions, requests.sent) == (8, 2)
    assert apart.max() <= NATS


def test_a_group_cut_at_a_ranks_edge() -> None:
    same = {"prompt_token_ids": [1, 2]}
    params = object()
    assert _runs([same] * 6, [params] * 6, [2, 3, 0, 1, 2, 3]) == [[0, 1], [2, 3, 4, 5]]
    other = {"prompt_token_ids": [1, 3]}
    assert _runs([same, other, other], [params] * 3, [1, 2, 3]) == [[0], [1, 2]]
