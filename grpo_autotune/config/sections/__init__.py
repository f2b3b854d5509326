"""The sections of a configuration: keys, defaults, and what each section can judge alone."""
