"""The folder of a run: checkpoints, log, signals, resumption."""
