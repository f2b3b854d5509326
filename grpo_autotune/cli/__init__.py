"""The command line: a module for each kind of command, and the one place that catches this package's errors."""
