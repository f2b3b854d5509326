"""A user's TRL script: run as it is, with values, probes and speed-ups put in."""
