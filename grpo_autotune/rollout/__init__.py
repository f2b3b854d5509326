"""Completions by vLLM: TRL's engine corrected and tunable, weight sync, a vLLM server, and measurements of them."""
