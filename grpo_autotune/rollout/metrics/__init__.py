"""Counters of the engine's scheduler, in this process and at a server."""
