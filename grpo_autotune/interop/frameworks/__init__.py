"""A module per framework: its defaults by version, and the meaning of its keys in a `RunConfig`."""
