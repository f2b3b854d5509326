"""Settings with their lines, out of shell scripts, YAML, command lines, Python scripts and notebooks."""
