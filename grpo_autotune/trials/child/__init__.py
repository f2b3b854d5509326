"""The child's side of a trial: run it, measure it, write its outcome."""
