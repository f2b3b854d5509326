"""vLLM inside TRL: made right, opened for tuning, measured."""
