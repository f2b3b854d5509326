"""Speed-ups of micro batches: their rows, groups and order."""
