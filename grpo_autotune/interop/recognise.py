"""The framework that a file was written for."""
