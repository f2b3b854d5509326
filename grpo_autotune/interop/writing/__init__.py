"""Tuned values, into the text of the file that a run came from."""
