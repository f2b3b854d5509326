"""Images decoded once and processed once: tensors equal to the last bit, rows read on generating steps only."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref

import datasets
import pytest
import torch
from accelerate.utils import send_to_device
from cachetools import LRUCache
from PIL import Image, ImageDraw
from torch.utils.data._utils.pin_memory import pin_memory

from tests.support.pairs import gap, patched, rewards_of, trained, weights_of
from tests.support.trainers import make_trainer, spread_reward

from grpo_autotune.probe.probe import Probe  # isort: skip
from grpo_autotune.seams.layers import AttributeSlot, wrap  # isort: skip
from grpo_autotune.speedups.images.lazy_rows import Row, Rows, image_bytes, private  # isort: skip
from grpo_autotune.speedups.install import speed_up  # isort: skip

GROUPS = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4}


@pytest.fixture
def drawn_rows():
    """Pictures of two sizes with something on them; the first and the last row show the same one."""
    rows = []
    for index in (0, 1, 2, 0):
        image = Image.new("RGB", (56 + 28 * (index % 2), 56), (40 * index, 90, 120))
        ImageDraw.Draw(image).ellipse((10, 10, 30 + index, 40), fill=(250, 10 * index, 0))
        question = [{"role": "user", "content": f"What is shown in {index}?"}]
        rows.append({"prompt": question, "image": image, "answer": str(index)})
    return rows


def batches(trainer):
    """Pixels and grids of every generation batch of a run."""
    seen = []

    def kept(call_next, *args, **kwargs):
        found = call_next(*args, **kwargs)
        seen.append((found["pixel_values"].clone(), found["image_grid_thw"].clone()))
        return found

    wrap(AttributeSlot(trainer, "_generate_and_score_completions"), kept)
    return seen


def run(tiny, tmp_path, rows, names, kind="qwen3_vl", **grpo):
    seen = []
    trainer, speedups = trained(
        names, tiny(kind), rows, tmp_path, change=lambda t: seen.append(batches(t)), **{**GROUPS, **grpo}
    )
    return trainer, speedups, seen[0]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_tensors_and_training_are_the_same(tiny, tmp_path, drawn_rows, kind):
    plain, _, wanted = run(tiny, tmp_path, drawn_rows, "none", kind, max_steps=5)
    mine, speedups, found = run(tiny, tmp_path, drawn_rows, "images_once", kind, max_steps=5)
    assert len(found) == len(wanted) == 5
    for (pixels, grid), (plain_pixels, plain_grid) in zip(found, wanted, strict=True):
        assert torch.equal(pixels, plain_pixels) and torch.equal(grid, plain_grid)
    assert rewards_of(mine) == rewards_of(plain)
    assert gap(weights_of(mine), weights_of(plain)) == 0.0
    facts = speedups.facts()["images_once"]
    assert facts["processed"] == 3.0 and facts["asked"] == 5 * 2 * 8


def probed(tiny, tmp_path, rows, names, first_probe=True, **grpo):
    trainer = make_trainer(tiny("qwen3_vl"), rows, tmp_path, **{**GROUPS, **grpo})
    probe = Probe(trainer) if first_probe else None
    speed_up(trainer, names)
    probe = probe or Probe(trainer)
    trainer.train()
    record = probe.record()
    probe.detach()
    return record.images


@pytest.mark.parametrize("first_probe", [True, False])
def test_decodings_and_processings_are_the_distinct_images(tiny, tmp_path, picture_rows, first_probe):
    """Two prompts a generation; those of the second, which is measured, are new."""
    grpo = {"max_steps": 2, "shuffle_dataset": False}
    plain = probed(tiny, tmp_path, picture_rows, "none", **grpo)
    assert plain.processings_per_image == 2 * 4 and plain.decodes_per_image > 2 * 4
    once = probed(tiny, tmp_path, picture_rows, "images_once", first_probe, **grpo)
    assert once.distinct_per_step == plain.distinct_per_step == 2
    assert once.decodes_per_image == once.processings_per_image == 1.0


def test_later_epochs_decode_and_process_nothing(tiny, tmp_path, drawn_rows):
    grpo = {"per_device_train_batch_size": 4, "max_steps": 4}
    images = probed(tiny, tmp_path, drawn_rows, "images_once", **grpo)
    assert images.decodes_per_image == images.processings_per_image == 0.0


def test_one_generation_decodes_and_processes_each_distinct_image_once(tiny, tmp_path, drawn_rows):
    """Nothing kept from before: three distinct images in four prompts."""
    grpo = {"per_device_train_batch_size": 4, "max_steps": 1, "shuffle_dataset": False}
    images = probed(tiny, tmp_path, drawn_rows, "images_once", **grpo)
    assert images.distinct_per_step == 3
    assert images.decodes_per_image == 1.0
    checked = 3  # the self-check's own
    assert images.processings_per_image == (3 + checked) / 3


def test_rows_of_other_steps_are_not_read(tiny, tmp_path, drawn_rows, monkeypatch):
    read = []
    plain_read = Rows.read
    monkeypatch.setattr(Rows, "read", lambda self, index: (read.append(index), plain_read(self, index))[1])
    trainer, _, _ = run(tiny, tmp_path, drawn_rows, "images_once", max_steps=3)
    assert len(read) == 3 * 8, "a generation of eight rows a step, not one a micro step"
    assert trainer.state.global_step == 3


def test_evaluation_and_loader_workers(tiny, tmp_path, drawn_rows):
    grpo = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 2,
        "dataloader_num_workers": 1,
        "per_device_eval_batch_size": 4,
    }
    plain, _, wanted = run(tiny, tmp_path, drawn_rows, "none", **grpo)
    mine, _, found = run(tiny, tmp_path, drawn_rows, "images_once", **grpo)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True)) and len(found) == len(wanted)
    assert rewards_of(mine) == rewards_of(plain)


def seen_by(reward, tiny, tmp_path, drawn_rows, names):
    _, _, seen = run(tiny, tmp_path, drawn_rows, names, rewards=[reward], max_steps=4)
    return seen


def test_a_reward_that_draws_into_its_images_spoils_nothing(tiny, tmp_path, drawn_rows):
    sizes = []

    def vandal(completions, image, **kwargs):
        sizes.extend(picture.size for picture in image)
        for picture in image:
            picture.thumbnail((8, 8))
        return spread_reward(completions)

    wanted, found = (seen_by(vandal, tiny, tmp_path, drawn_rows, names) for names in ("none", "images_once"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True))
    assert len(set(sizes)) == 2, "each call saw whole images"


def test_a_reward_that_draws_into_the_prompts_spoils_nothing(tiny, tmp_path, drawn_rows):
    def vandal(prompts, completions, **kwargs):
        for part in (part for prompt in prompts for part in prompt[0]["content"] if part["type"] == "image"):
            part["image"].paste((255, 0, 0), (0, 0, 40, 40))
        return spread_reward(completions)

    wanted, found = (seen_by(vandal, tiny, tmp_path, drawn_rows, names) for names in ("none", "images_once"))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True))


def test_held_out_rows_with_a_transform_are_left_alone(tiny, tmp_path, drawn_rows):
    def train(names):
        trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, **GROUPS, per_device_eval_batch_size=4)
        trainer.eval_dataset = trainer.eval_dataset.with_transform(
            lambda rows: {**rows, "image": [image.resize((84, 84)) for image in rows["image"]]}
        )
        seen = batches(trainer)
        speed_up(trainer, names)
        trainer.evaluate()
        return seen

    wanted, found = train("none"), train("images_once")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True))


def test_rows_are_told_apart_by_content_and_kept_within_the_limit(tmp_path, drawn_rows):
    from tests.support.trainers import dataset_of

    encoded = io.BytesIO()
    drawn_rows[0]["image"].save(encoded, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(encoded.getvalue())
    stored = [{**row, "image": str(path)} if index in (0, 3) else row for index, row in enumerate(drawn_rows)]
    cache = LRUCache(1 << 20, getsizeof=image_bytes)
    rows = Rows(dataset_of(stored), cache, lazy=True)
    first, last = rows.__getitems__([0, 3])
    assert isinstance(first, Row) and first["image"] is last["image"] and len(cache) == 1
    assert list(first) == list(first.keys()) and "image" in first and len(first) == 3
    first["extra"] = 1
    assert "extra" not in rows[0] and dict(first.items())["extra"] == 1
    own = private(first)
    assert own["image"] is not first["image"] and own["image"].tobytes() == first["image"].tobytes()
    assert first["prompt"] is not rows[0]["prompt"]


def test_an_image_larger_than_the_cache_is_not_kept(drawn_rows):
    from tests.support.trainers import dataset_of

    size = image_bytes(drawn_rows[0]["image"])
    cache = LRUCache(size - 1, getsizeof=image_bytes)
    rows = Rows(dataset_of(drawn_rows), cache, lazy=True)
    assert rows[0]["image"].tobytes() == drawn_rows[0]["image"].tobytes() and len(cache) == 0
    rows.decoded = None
    assert rows[0]["image"].tobytes() == drawn_rows[0]["image"].tobytes()


def test_a_processor_that_looks_at_other_images_is_noticed(tiny, tmp_path, drawn_rows, monkeypatch, caplog):
    trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, **GROUPS)
    processor = type(trainer.processing_class.image_processor)
    preprocess = processor.preprocess

    def together(self, images, **kwargs):
        found = preprocess(self, images, **kwargs)
        found["pixel_values"] = found["pixel_values"] + len(images)
        return found

    monkeypatch.setattr(processor, "preprocess", together)
    speedups = speed_up(trainer, ["images_once"])
    trainer.train()
    assert "speed-up images_once is off" in caplog.text and trainer.state.global_step == 3
    assert not next(row for row in speedups.table() if row.name == "images_once").on


def test_it_says_where_it_does_not_apply(tiny, tmp_path, text_rows, drawn_rows):
    def reason(trainer):
        row = next(row for row in speed_up(trainer, ["images_once"]).table() if row.name == "images_once")
        assert not row.on
        return row.reason

    assert "model.name_or_path" in reason(make_trainer(tiny("qwen3"), text_rows, tmp_path))
    trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path)
    trainer.train_dataset = trainer.train_dataset.with_transform(lambda rows: rows)
    assert "data.path" in reason(trainer)
    assert "grpo.remove_unused_columns" in reason(
        make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, remove_unused_columns=True)
    )


def test_removal_leaves_nothing(tiny, tmp_path, drawn_rows):
    trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path)
    before = patched(trainer)
    speedups = speed_up(trainer, ["images_once"])
    assert patched(trainer) != before
    speedups.remove()
    assert patched(trainer) == before


def test_the_rows_of_a_loader_that_ended_are_not_kept(tiny, tmp_path, drawn_rows):
    """Every evaluation has a loader of its own, whose rows keep what is stored of 256 of them."""
    trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, **GROUPS)
    speedups = speed_up(trainer, ["images_once"])
    rows = weakref.ref(trainer.get_train_dataloader().dataset)
    trainer.accelerator._dataloaders.clear()  # accelerate keeps every loader that it prepared
    gc.collect()
    assert rows() is None
    speedups.remove()


def test_a_loader_under_way_shares_nothing_after_removal(tiny, tmp_path, drawn_rows):
    """Reward functions get the rows' own images again, and may draw into them."""
    trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, **GROUPS)
    speedups = speed_up(trainer, ["images_once"])
    loader = trainer.get_train_dataloader()
    speedups.remove()
    images = [row["image"] for row in next(iter(loader))]
    assert len({id(image) for image in images}) == len(images) == 8


@pytest.mark.parametrize(
    "use",
    [
        lambda row: isinstance(row, dict) and dict(row),
        lambda row: {**row},
        lambda row: row | {},
        lambda row: {} | row,
        lambda row: (lambda **values: values)(**row),
        copy.copy,
        copy.deepcopy,
        lambda row: row.copy(),
        lambda row: pickle.loads(pickle.dumps(row)),
        lambda row: type(row)(row),
        lambda row: {"n": row.pop("n"), **row},
        lambda row: json.loads(json.dumps(row)),
        lambda row: row if row == {"n": 1, "text": "b"} else None,
    ],
)
def test_a_row_is_a_dictionary_to_all_code(use):
    rows = Rows(datasets.Dataset.from_list([{"n": 0, "text": "a"}, {"n": 1, "text": "b"}]), LRUCache(1), lazy=True)
    assert use(rows[1]) == {"n": 1, "text": "b"} and rows.reads == 1


def test_rows_are_compared_by_their_values():
    rows = Rows(datasets.Dataset.from_list([{"n": 0}, {"n": 0}, {"n": 1}]), LRUCache(1), lazy=True)
    assert [rows[0] == other for other in (rows[1], rows[2], 0)] == [True, False, False]
    assert [rows[0] != other for other in (rows[1], rows[2], 0)] == [False, True, True]


def test_a_row_that_could_not_be_read_is_read_again(monkeypatch):
    rows = Rows(datasets.Dataset.from_list([{"n": 1}]), LRUCache(1), lazy=True)
    row = rows[0]
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Rows, "read", lambda self, index: (_ for _ in ()).throw(OSError("gone")))
        len(row)
    assert row["n"] == 1


def test_a_row_is_not_read_on_its_way_through_the_loader():
    rows = Rows(datasets.Dataset.from_list([{"n": 0}, {"n": 1}]), LRUCache(1), lazy=True)
    batch = pin_memory(send_to_device([rows[0], rows[1]], torch.device("cpu")))
    assert rows.reads == 0 and [row["n"] for row in batch] == [0, 1] and rows.reads == 2


class OnAnotherDevice:
    """The CPU, which is not called so."""

    type = "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_image_goes_to_the_device_once_in_the_towers_type(tiny, tmp_path, drawn_rows, monkeypatch, dtype):
    """Whose copies there are those that the model makes of the processor's output."""
    settings = {"model_init_kwargs": {"dtype": dtype}, "max_steps": 1, "beta": 0.05, **GROUPS}
    seen = {}
    for names in ("none", "images_once"):
        trainer = make_trainer(tiny("qwen3_vl"), drawn_rows, tmp_path, **settings)
        seen[names] = batches(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.accelerator), "device", OnAnotherDevice())
            speedups = speed_up(trainer, names)
        trainer.train()
    facts = speedups.facts()["images_once"]
    assert facts["sent"] == facts["processed"] == 2, "of the two prompts of a step, once for both passes"
    for (mine, grid), (plain, wanted) in zip(seen["images_once"], seen["none"], strict=True):
        assert mine.dtype == getattr(torch, dtype) and torch.equal(mine, plain.to(mine.dtype))
        assert torch.equal(grid, wanted)
