"""Trained weights on their way to the engine."""
