"""Measurement: spans summed into stages, facts about tokens and images, and samples of the machine."""
