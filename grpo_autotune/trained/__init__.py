"""A finished run in use: its checkpoints found, its model loaded, merged, asked and served."""
