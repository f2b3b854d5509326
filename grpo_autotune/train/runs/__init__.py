"""A run under way: its log, signals, the best checkpoint, resumption."""
