"""Seconds by stage, out of the logs of other frameworks."""
