"""Runs to start from, each a YAML file with the data and the model that it names; from the folder above this one."""
