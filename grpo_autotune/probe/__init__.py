"""Measurement: spans into stages, facts about tokens and images, and what the machine did meanwhile."""
