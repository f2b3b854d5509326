"""Predictions: seconds and memory of a configuration that has not run, for the advice and for the search."""
