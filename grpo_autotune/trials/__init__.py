"""Trials: short measurements of one configuration each, in child processes."""
