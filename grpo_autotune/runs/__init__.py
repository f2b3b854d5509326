"""The folder of a run: its checkpoints, their names, and which of them is the best; read without torch."""
