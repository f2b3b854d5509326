"""The patches on TRL and vLLM: a table of the wrapped functions, and one wrapper for each, with ordered layers."""
