"""The parent's side of a trial: start it, watch it, end it, tell why it ended."""
