"""Measure, tune and train TRL's GRPO: where each second of an optimizer step goes, and what to do about it."""

from __future__ import annotations
