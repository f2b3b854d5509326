"""Speed-ups of `generate`."""
