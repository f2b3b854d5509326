"""The prompt and its images go through the model once per group."""
