"""Vision-language models of another layout than Qwen-VL's: what TRL trains, we train, measure and speed up alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support.other_vlms import other_vlm
from tests.support.pairs import gap, trained, weights_of

from grpo_autotune.probe.probe import Probe  # isort: skip
from grpo_autotune.report.build import build_report  # isort: skip
from grpo_autotune.seams.mixed_image_rows import mend  # isort: skip
from grpo_autotune.seams.trainer_access import image_tokens  # isort: skip

EXACT = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idefics3", "llava", "gemma3"])
def test_trained_and_measured_as_plain(tmp_path, picture_rows, kind):
    path, processor = other_vlm(kind, tmp_path)
    arguments, probes = (path, picture_rows, tmp_path), []
    settings = {"processor": processor, "beta": 0.04, "max_steps": 2, "num_generations": 4}

    def probe(trainer):
        mend(trainer)
        probes.append(Probe(trainer))

    plain, _ = trained("none", *arguments, **settings)
    fast, speedups = trained("auto", *arguments, change=probe, **settings)
    assert gap(weights_of(fast), weights_of(plain)) < EXACT
    reasons = {row.name: row.reason for row in speedups.table() if not row.on}
    if kind == "gemma3":
        assert "Gemma3ForConditionalGeneration makes attention masks of its own" in reasons["shared_prefix"]
    report = build_report(probes[0].record())
    assert report.images is not None and report.images.tokens is None and report.images.tokens_at == {}


def test_tokens_of_an_image_are_known_where_it_is_a_grid_of_patches():
    def processor(names, answer, **more):
        images = SimpleNamespace(model_input_names=names, get_number_of_image_patches=lambda *size: answer, **more)
        return SimpleNamespace(image_processor=images)

    assert image_tokens(processor(["pixel_values", "image_grid_thw"], 64, merge_size=2), 128, 128) == 16
    assert image_tokens(processor(["pixel_values"], (5, 2, 2)), 128, 128) is None, "Idefics 3, SmolVLM"
    assert image_tokens(processor(["pixel_values"], 5), 128, 128) is None, "InternVL counts tiles"
    assert image_tokens(SimpleNamespace(), 128, 128) is None
