"""From a RunConfig to a trained adapter: data, rewards, the trainer, checkpoints."""
