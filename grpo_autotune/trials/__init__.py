"""Trials of configurations in child processes."""
