"""Files that let a reward function of another framework be called as TRL calls one, unchanged."""
