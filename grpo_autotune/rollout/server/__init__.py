"""A vLLM server: its command line, its process, and TRL's client of it."""
