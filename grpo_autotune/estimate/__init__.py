"""Cost formulas: a model's sizes from its config.json, and operations, bytes and memory of each stage."""
