"""Models, processors and adapters."""
