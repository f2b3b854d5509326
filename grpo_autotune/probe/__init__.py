"""Measurement of a trainer: seconds by stage, facts about tokens and images, and samples of the machine."""
