"""Models of cost: a model's sizes from its config.json, and the work each stage does."""
