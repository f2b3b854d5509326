"""RunConfig: one YAML file that says what to train, in the ecosystem's own keys."""
