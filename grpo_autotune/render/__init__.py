"""Report in, text out; nothing else."""
