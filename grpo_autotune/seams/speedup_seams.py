"""Seams that only speed-ups use: no stage is measured at them."""

from __future__ import annotations

from grpo_autotune.seams.table import Seam

PREPARE_INPUTS = Seam("prepare_inputs", "", "trainer", "_prepare_inputs")
"""Around TRL's shuffle and split: these are functions of a module, and tell no trainer from another."""

DATALOADER = Seam("dataloader", "", "trainer", "_get_dataloader")
"""transformers builds every loader here, of training and of evaluation."""

IMAGE_PROCESSOR = Seam("image_processor", "", "trainer.processing_class.image_processor", "__call__", "", "class")
"""Where a processor hands over the images of all prompts."""
