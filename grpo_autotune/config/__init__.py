"""The configuration: one YAML file that says what to train, in the keys of TRL, PEFT and vLLM."""
