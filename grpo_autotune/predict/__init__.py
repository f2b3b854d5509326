"""Seconds and memory of a configuration that has not run: the one predictor."""
