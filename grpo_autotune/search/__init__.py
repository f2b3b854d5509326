"""The search: trials in child processes, models of time and memory, and a study that chooses what to measure next."""
